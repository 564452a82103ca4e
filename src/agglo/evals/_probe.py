"""What linear probes on spatial features share: ground truth, standardisation, upsampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import FeatureError, crop_truth, encode, input_size, open_source
from agglo.evals.base import Backbone, Progress
from agglo.types import AggloError, ConfigError

PIXELS = 2**22
"""Predictions at full resolution are made for about this many numbers at a time."""


class ProbeError(AggloError, RuntimeError):
    """A probe diverged or had nothing to learn from: no number is reported for it."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One split for a probe.

    Args:
        features: ``(N, D, h, w)``, float32.
        truth: N maps ``(H, W)`` at full resolution, cropped as the images were.
    """

    features: Tensor
    truth: list[Tensor]


def load(
    model: Backbone,
    options: Mapping[str, Any],
    size: int | tuple[int, int],
    field: str,
    progress: Progress | None,
) -> Labelled:
    """Encode a source and read ``annotation(index).<field>`` of each of its images.

    Raises:
        ConfigError: the source has no such annotation.
        FeatureError: the model's spatial map is missing or not finite.
    """
    source = open_source(options)
    annotation: Callable[[int], Any] | None = getattr(source, "annotation", None)
    if annotation is None:
        raise ConfigError(f"{type(source).__name__} has no annotation(): probe a source such as {{kind: scenes}}")
    encoded = encode(model, options, size, want="spatial", progress=progress)
    if encoded.spatial is None:
        raise FeatureError(f"{type(model).__name__} promised spatial features and returned none")
    view = input_size(model, size)
    return Labelled(encoded.spatial, [crop_truth(getattr(annotation(i), field), view) for i in encoded.index])


@dataclass(frozen=True, slots=True)
class Standard:
    """Per-channel statistics of the training cells: a batch norm without affine part, frozen.

    Args:
        mean: ``(D,)``.
        scale: ``(D,)``, 1 / standard deviation; 0 for a channel that is constant.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standard:
        """Statistics over all images and cells of ``(N, D, h, w)``, in float64."""
        variance, mean = torch.var_mean(features.double(), dim=(0, 2, 3), correction=0)
        # Rounding leaves a constant channel a variance of about (eps * mean)^2: that is no signal to blow up.
        alive = variance > (1e-6 * mean.abs()).square() + 1e-20
        scale = torch.where(alive, variance.clamp_min(1e-30).rsqrt(), torch.zeros_like(variance))
        return cls(mean.float(), scale.float())

    def __call__(self, features: Tensor) -> Tensor:
        """Standardise ``(N, D, h, w)``."""
        return (features - self.mean[:, None, None]) * self.scale[:, None, None]


def rows(maps: Tensor) -> Tensor:
    """``(N, D, h, w)`` as ``(N*h*w, D)``."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def predictions(features: Tensor, weight: Tensor, bias: Tensor, truth: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The 1x1 probe's output, brought bilinearly to each ground truth's size.

    Args:
        features: ``(N, D, h, w)``, standardised.
        weight: ``(K, D)``.
        bias: ``(K,)``.
        truth: N maps ``(H, W)``.

    Yields:
        ``(n, K, H, W)`` and the truth ``(n, H, W)``, for runs of images whose truths have one shape.
    """
    start = 0
    while start < len(truth):
        shape = truth[start].shape
        limit = max(1, PIXELS // (len(weight) * shape.numel()))
        stop = start + 1
        while stop < min(len(truth), start + limit) and truth[stop].shape == shape:
            stop += 1
        low = F.conv2d(features[start:stop], weight[:, :, None, None], bias)
        yield (
            F.interpolate(low, size=tuple(shape), mode="bilinear", align_corners=False),
            torch.stack(truth[start:stop]),
        )
        start = stop
