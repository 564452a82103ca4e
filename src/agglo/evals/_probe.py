"""Machinery of probes: ground truth, standardisation, ridge and logistic regression, upsampling, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import encode, report_unusable, required
from agglo.evals.base import Backbone, EvalContext, ProbeError, Progress, input_size
from agglo.preprocess import crop_map
from agglo.sources.base import AnnotationError, Source
from agglo.types import ConfigError, ImageError

PIXELS = 2**22
"""Predictions at full resolution are computed in chunks of about this many elements."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Features and ground truth of one split.

    Args:
        features: ``(N, D, h, w)``, float32.
        truth: N maps ``(H, W)`` at full resolution, cropped like the images.
        names: of the N images.
    """

    features: Tensor
    truth: list[Tensor]
    names: tuple[str, ...] = ()


def load(
    model: Backbone,
    options: Mapping[str, Any] | Source,
    size: int | tuple[int, int],
    field: str,
    context: EvalContext,
) -> Labelled:
    """Encode a source and read ``annotation(index).<field>`` of each of its images.

    Images whose annotation is damaged, or of another size, are skipped with a warning.

    Raises:
        ConfigError: the source has no such annotation, or no image has a usable one.
        FeatureError: the model's spatial map is missing or not finite.
    """
    source = context.sources.open(options)
    annotation: Callable[[int], Any] | None = getattr(source, "annotation", None)
    if annotation is None:
        raise ConfigError(f"{type(source).__name__} has no annotation(): use a source such as {{kind: scenes}}")
    encoded = encode(model, options, size, context, want="spatial")
    view = input_size(model, size)
    truth: list[Tensor] = []
    kept: list[int] = []
    unusable: list[ImageError] = []
    for row, (index, full) in enumerate(zip(encoded.index, encoded.sizes, strict=True)):
        try:
            truth.append(truth_of(source, index, field, full, view))
            kept.append(row)
        except ImageError as error:
            unusable.append(error)
    report_unusable(unusable, len(kept))
    spatial = required(encoded.spatial, model)
    whole = len(kept) == len(encoded.index)
    return Labelled(spatial if whole else spatial[kept], truth, tuple(encoded.names[row] for row in kept))


def truth_of(source: Source, index: int, field: str, full: tuple[int, int], view: tuple[int, int]) -> Tensor:
    """``annotation(index).<field>``, cropped like its image to the aspect of ``view``: ``(H, W)`` or ``(C, H, W)``.

    Args:
        source: has ``annotation``.
        index: of the image.
        field: ``semantic``, ``depth``, ``normals``, ...
        full: ``(H, W)`` of the image.
        view: ``(H, W)`` of the model's input.

    Raises:
        ConfigError: the annotation is missing.
        AnnotationError: its size differs from the image's.
        ImageError: it cannot be read.
    """
    annotation: Callable[[int], Any] | None = getattr(source, "annotation", None)
    found = None if annotation is None else getattr(annotation(index), field, None)
    if found is None:
        raise ConfigError(f"{source.name(index)} has no {field}: use a source such as {{kind: scenes}}")
    shape = tuple(found.shape[-2:])
    if shape != full:
        raise AnnotationError(
            source.name(index),
            f"is {full[0]}x{full[1]} pixels (HxW) and its {field} map {shape[0]}x{shape[1]}: sizes must be equal; "
            "resize the map (nearest neighbour) or use the original image",
        )
    planes = found if found.ndim == 3 else found[None]
    cropped = torch.stack([crop_map(plane, view) for plane in planes])
    return cropped if found.ndim == 3 else cropped[0]


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
        # Rounding gives a constant channel a variance of about (eps * mean)^2, which must not be amplified.
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
    """Outputs of a 1x1 probe, resized bilinearly to the size of each ground truth.

    Args:
        features: ``(N, D, h, w)``, standardised.
        weight: ``(K, D)``.
        bias: ``(K,)``.
        truth: N maps ``(H, W)`` or ``(C, H, W)``.

    Yields:
        predictions ``(n, K, H, W)`` and ground truth ``(n, H, W)``, for runs of images with one size of ground truth.
    """
    start = 0
    while start < len(truth):
        shape = truth[start].shape[-2:]
        limit = max(1, PIXELS // (len(weight) * shape.numel()))
        stop = start + 1
        while stop < min(len(truth), start + limit) and truth[stop].shape[-2:] == shape:
            stop += 1
        low = F.conv2d(features[start:stop], weight[:, :, None, None], bias)
        yield (
            F.interpolate(low, size=tuple(shape), mode="bilinear", align_corners=False),
            torch.stack(truth[start:stop]),
        )
        start = stop


def fit_ridge(
    x: Tensor, y: Tensor, w: Tensor, ridges: Sequence[float], what: str = "depth"
) -> list[tuple[Tensor, Tensor]]:
    """Weighted ridge regression with a free bias, for several penalties from one eigendecomposition.

    Args:
        x: ``(n, D)``.
        y: ``(n,)`` or ``(n, K)`` targets; ignored where ``w`` is 0.
        w: ``(n,)`` non-negative weights.
        ridges: penalties on ``||W||^2``, relative to the weighted *mean* squared error.
        what: name of the probe, for errors.

    Returns:
        For each penalty weight ``(K, D)`` and bias ``(K,)``, float32; K is 1 for targets ``(n,)``.

    Raises:
        ProbeError: all weights are 0, or a solution is not finite.
    """
    total = w.double().sum()
    if not float(total) > 0:
        raise ProbeError(f"the training split has no valid {what}: nothing to fit a probe on")
    share = w.double() / total
    y = y[:, None] if y.ndim == 1 else y
    y = torch.where((w > 0)[:, None], y, torch.zeros_like(y)).double()
    x_mean, y_mean = share @ x.double(), share @ y
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for rows_, target, weight in zip(x.split(8192), y.split(8192), share.split(8192), strict=True):
        centred = rows_.double() - x_mean
        gram += centred.T @ (centred * weight[:, None])
        cross += centred.T @ ((target - y_mean) * weight[:, None])
    values, vectors = torch.linalg.eigh(gram)
    rotated = vectors.T @ cross
    probes = []
    for ridge in ridges:
        weight = (vectors @ (rotated / (values.clamp_min(0) + ridge)[:, None])).T
        bias = y_mean - weight @ x_mean
        if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise ProbeError(f"the {what} probe diverged: not finite at ridge {ridge:g}")
        probes.append((weight.float(), bias.float()))
    return probes


def fit_logistic(
    x: Tensor,
    y: Tensor,
    decay: float,
    steps: int,
    start: tuple[Tensor, Tensor] | None = None,
    what: str = "segmentation",
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with soft labels.

    Args:
        x: ``(n, D)`` standardised features.
        y: ``(n, K)`` non-negative; a row's sum is its weight.
        decay: L2 penalty on the weights.
        steps: maximum number of L-BFGS iterations.
        start: weight and bias to start from; zeros otherwise.
        what: name of the probe, for errors.

    Returns:
        weight ``(K, D)`` and bias ``(K,)``.

    Raises:
        ProbeError: no labels, or the final loss is not finite or above that of a zero probe.
    """
    total = float(y.sum())
    if total <= 0:
        unit = "pixel" if what == "segmentation" else "image"
        raise ProbeError(f"the training split has no labelled {unit}: nothing to fit a probe on")
    zeros = x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1])
    weight, bias = (tensor.clone() for tensor in start or zeros)
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def loss() -> Tensor:
        ce = -(y * F.log_softmax(x @ weight.T + bias, 1)).sum() / total
        return ce + 0.5 * decay * weight.square().sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(closure)
    with torch.no_grad():
        final = float(loss())
    chance = math.log(y.shape[1])  # the loss of zero weights
    if not math.isfinite(final) or final > chance * (1 + 1e-6):
        raise ProbeError(f"the {what} probe diverged: loss {final:.4g}, chance level {chance:.4g}")
    return weight.detach(), bias.detach()


def best_logistic(
    x: Tensor,
    y: Tensor,
    decays: Sequence[float],
    steps: int,
    score: Callable[[tuple[Tensor, Tensor]], float],
    what: str,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of :func:`fit_logistic` with the penalty of the highest ``score``; ties: the first."""
    found: tuple[Tensor, Tensor] | None = None
    best: list[tuple[float, tuple[Tensor, Tensor]]] = []
    for decay in decays:  # from strong to weak: each solution initialises the next
        progress(f"{what} probe, decay {decay:g}")
        found = fit_logistic(x, y, decay, steps, start=found, what=what)
        value = score(found) if len(decays) > 1 else 0.0
        if not best or value > best[0][0]:
            best = [(value, found)]
    return best[0][1]


def rank_of(scores: Tensor, truth: Tensor) -> Tensor:
    """Number of classes ranked before the true one, ``(N,)``, for scores ``(N, V)``; ties in class order.

    A truth of -1, a class without a score, is ranked last.
    """
    own = scores.gather(1, truth.clamp_min(0)[:, None])
    earlier = torch.arange(scores.shape[1])[None] < truth[:, None]
    before = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return torch.where(truth < 0, torch.iinfo(before.dtype).max, before)
