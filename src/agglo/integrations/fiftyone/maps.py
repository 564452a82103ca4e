"""Heatmaps: from spatial features to small maps of bytes on a scale that a whole dataset shares."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from agglo.extras import require
from agglo.integrations.fiftyone.options import Options, field_name
from agglo.report.picture import pca_basis

_CELLS = 256
"""Number of cells of an image that principal components are fitted on at most."""
_OUTLIER = 6.0
"""Cells whose norm is further from the median than this many MADs are left out of a PCA (RADIO has a few such tokens
per image, which would fill the first component; NVlabs/RADIO issue 174)."""
_TAILS = (1.0, 99.0)
_RGB = ("red", "green", "blue")

Layers = dict[str, np.ndarray]
"""Name of a layer → ``(D, H, W)`` float32: features to project, or one channel to draw as it is."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Directions and limits of a layer, shared by all images of a dataset.

    Args:
        low, high: ``(K,)`` values drawn as 1 and 255.
        mean: ``(D,)`` of the features, or None for a layer that is drawn as it is.
        axes: ``(K, D)`` principal directions, or None.
    """

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray | None = None
    axes: np.ndarray | None = None

    def values(self, layer: np.ndarray) -> np.ndarray:
        """``(K, H, W)`` of a layer ``(D, H, W)``, in its own units."""
        if self.mean is None or self.axes is None:
            return layer
        flat = layer.reshape(len(layer), -1) - self.mean[:, None]
        return (self.axes @ flat).reshape(-1, *layer.shape[1:])

    def dump(self) -> str:
        """The scale as text."""
        file = io.BytesIO()
        arrays = {"low": self.low, "high": self.high, "mean": self.mean, "axes": self.axes}
        found = {name: array.astype(np.float32) for name, array in arrays.items() if array is not None}
        np.savez_compressed(file, **found)
        return base64.b64encode(file.getvalue()).decode()

    @classmethod
    def parse(cls, text: str) -> Scale:
        """The scale of :meth:`dump`."""
        with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        return cls(found["low"], found["high"], found.get("mean"), found.get("axes"))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A heatmap.

    Args:
        key: its name among those of an image.
        bytes: ``(H, W)`` uint8, one value per cell, in [1, 255]; 0 everywhere for a constant map.
        low, high: values of 1 and 255.
    """

    key: str
    bytes: np.ndarray
    low: float
    high: float


def layers(
    options: Options,
    spatial: Tensor,
    heads: Mapping[str, Tensor],
    text: Tensor | None = None,
    patch: Tensor | None = None,
) -> Iterator[Layers]:
    """The layers of each image of a batch.

    Args:
        options: which heatmaps to draw.
        spatial: ``(B, D, H, W)`` of the backbone.
        heads: ``(B, D', H', W')`` by teacher.
        text: ``(B, prompts, H', W')`` cosine similarities, or None.
        patch: ``(D,)`` features of the chosen patch, or None for the cell at ``options.patch`` in each image.
    """
    found: dict[str, Tensor] = {}
    if {"pca", "rgb"} & set(options.maps):
        found["pca"] = spatial
    if "norm" in options.maps:
        found["norm"] = spatial.float().norm(dim=1, keepdim=True)
    if "heads" in options.maps:
        found |= {f"head:{name}": each for name, each in heads.items()}
    if options.patch is not None:
        chosen = cell_at(spatial, options.patch) if patch is None else patch[None].to(spatial)
        found["patch"] = F.cosine_similarity(spatial.float(), chosen.float()[:, :, None, None], dim=1)[:, None]
    if text is not None:
        found |= {f"text:{prompt}": text[:, i : i + 1] for i, prompt in enumerate(options.prompts)}
    arrays = {name: each.float().cpu().numpy() for name, each in found.items()}
    for index in range(len(spatial)):
        yield {name: array[index] for name, array in arrays.items()}


def layer_names(options: Options, heads: Sequence[str]) -> list[str]:
    """Names of the layers of an image, in the order of :func:`layers`; arguments of :func:`map_keys`."""
    found = [*(["pca"] if {"pca", "rgb"} & set(options.maps) else []), *(["norm"] if "norm" in options.maps else [])]
    found += [f"head:{name}" for name in heads] if "heads" in options.maps else []
    found += ["patch"] if options.patch is not None else []
    return found + [f"text:{prompt}" for prompt in options.prompts]


def cell_at(spatial: Tensor, point: tuple[float, float]) -> Tensor:
    """The features ``(B, D)`` of the cell at ``(x, y)`` in [0, 1] of maps ``(B, D, H, W)``."""
    height, width = spatial.shape[-2:]
    return spatial[:, :, min(int(point[1] * height), height - 1), min(int(point[0] * width), width - 1)]


def fit_scales(images: Sequence[Layers]) -> dict[str, Scale]:
    """A scale for every layer, from a sample of images that have the same layers.

    The directions are principal components without outliers, with the largest loading positive. Limits are the first
    and last percentile over all images, weighted equally.
    """
    names = images[0] if images else {}
    return {name: _fit(name, [each[name] for each in images]) for name in names}


def _fit(name: str, maps: Sequence[np.ndarray]) -> Scale:
    if name == "pca" or name.startswith("head:"):
        cells = [_thinned(each) for each in maps]
        norms = [np.linalg.norm(each, axis=0) for each in cells]
        together = np.concatenate(norms)
        middle = np.median(together)
        spread = np.median(np.abs(together - middle))
        kept = [np.abs(each - middle) <= _OUTLIER * spread for each in norms]
        inside = [each[:, keep] if keep.any() else each for each, keep in zip(cells, kept, strict=True)]
        basis = pca_basis([each[:, :, None] for each in inside])
        return Scale(basis.low, basis.high, basis.mean, basis.axes)
    values = np.concatenate([each[0].ravel() for each in maps])
    low, high = np.percentile(values, _TAILS)
    if name.startswith(("text:", "patch")):
        high = values.max()  # what is looked for may fill less than a percent of the cells
    return Scale(np.array([low]), np.array([high]))


def _thinned(layer: np.ndarray) -> np.ndarray:
    """Evenly spread cells of a layer, ``(D, N)``."""
    flat = layer.reshape(len(layer), -1)
    return flat[:, :: -(-flat.shape[1] // _CELLS)]


def draw(options: Options, image: Layers, scales: Mapping[str, Scale]) -> list[Drawn]:
    """The heatmaps of an image, in the order of its layers."""
    found: list[Drawn] = []
    for name, layer in image.items():
        scale = scales[name]
        values = scale.values(layer)
        keys = [field_name(name.partition(":")[2] or name)]
        if name == "pca":
            keys = [*(["pca"] if "pca" in options.maps else []), *(_RGB if "rgb" in options.maps else [])]
        for key in keys:
            channel = _RGB.index(key) if key in _RGB else 0
            low, high = float(scale.low[channel]), float(scale.high[channel])
            found.append(Drawn(key, _bytes(options, values[channel], low, high), low, high))
    return found


def map_keys(options: Options, heads: Sequence[str]) -> list[str]:
    """Names of the heatmaps of an image, in the order of :func:`draw`.

    Args:
        options: which heatmaps to draw.
        heads: those of ``options.heads`` that have spatial features.
    """
    found = [*(["pca"] if "pca" in options.maps else []), *(_RGB if "rgb" in options.maps else [])]
    found += ["norm"] if "norm" in options.maps else []
    found += [field_name(name) for name in heads] if "heads" in options.maps else []
    found += ["patch"] if options.patch is not None else []
    return found + [field_name(prompt) for prompt in options.prompts]


def _bytes(options: Options, values: np.ndarray, low: float, high: float) -> np.ndarray:
    if options.apply_smoothing:
        values = require("scipy.ndimage", "fiftyone").gaussian_filter(values, options.smoothing_sigma, mode="nearest")
    if high <= low:  # a constant
        return np.zeros(values.shape, np.uint8)
    # FiftyOne draws nothing where a map is 0.
    return np.rint(1 + ((values - low) / (high - low)).clip(0, 1) * 254).astype(np.uint8)


def heatmap(drawn: Drawn) -> Any:
    """A ``fiftyone.Heatmap`` with its range; ``low`` and ``high`` are the features' values at 1 and 255."""
    labels: Any = require("fiftyone.core.labels", "fiftyone")
    return labels.Heatmap(map=drawn.bytes, range=[0, 255], low=drawn.low, high=drawn.high)
