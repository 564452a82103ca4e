"""Pictures of spatial features: their first three principal components as red, green and blue.

The basis is fitted on all maps that are compared, so that equal colours mean equal features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MOST = 16_384
"""Number of positions that the basis is fitted on at most."""
_TAILS = (1.0, 99.0)
"""Percentiles of each component drawn as 0 and full brightness, so that outliers do not dim the rest."""
_NOTHING = 1e-12
"""A component with a smaller share of the features' mean square is rounding noise, drawn as grey."""
_GAP, _CAPTION, _PAPER, _INK = 8, 24, (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True, slots=True)
class Basis:
    """Three directions in feature space and their ranges of brightness.

    Args:
        mean: ``(D,)``, subtracted first.
        axes: ``(3, D)`` orthonormal rows, by falling variance; zeros if the features have fewer dimensions.
        low, high: ``(3,)`` projections drawn as 0 and 1.
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def project(self, features: Any) -> np.ndarray:
        """A map ``(D, H, W)`` as ``(H, W, 3)`` float64, 0 to 1 inside the percentiles; a flat component is 0.5.

        Raises:
            ValueError: not a finite map of D channels.
        """
        array = _as_map(features)
        if array.shape[0] != len(self.mean):
            raise ValueError(f"the basis has {len(self.mean)} channels, the map has {array.shape[0]}")
        values = (array.reshape(len(array), -1).T - self.mean) @ self.axes.T
        span = self.high - self.low
        flat = span <= 0
        scaled = np.where(flat, 0.5, (values - self.low) / np.where(flat, 1.0, span))
        return scaled.reshape(*array.shape[1:], 3)


def pca_basis(maps: Sequence[Any], *, limits: Literal["percentiles", "mad"] = "percentiles") -> Basis:
    """The principal components of all positions of several maps together.

    Every map has the same weight. The largest loading of a component is positive, so that equal features give equal
    colours.

    Args:
        maps: tensors or arrays ``(D, H, W)``, of one D and any H, W.
        limits: drawn as 0 and full brightness: the first and last percentile, or ``mad`` (:func:`mad_limits`) as in
            RADIO.

    Raises:
        ValueError: no maps, maps of different D, or values that are not finite.
    """
    arrays = [_as_map(one) for one in maps]
    if not arrays:
        raise ValueError("a basis needs at least one map")
    widths = sorted({len(array) for array in arrays})
    if len(widths) > 1:
        raise ValueError(f"maps of different channels ({', '.join(map(str, widths))}) have no common basis")
    rows, weights = [], []
    for array in arrays:
        flat = array.reshape(widths[0], -1).T
        # A stride is deterministic; rounding up stays within the map's share.
        flat = flat[:: -(-len(flat) * len(arrays) // _MOST)]
        rows.append(flat)
        weights.append(np.full(len(flat), 1 / (len(flat) * len(arrays))))
    x, weight = np.concatenate(rows), np.concatenate(weights)
    mean = weight @ x
    centred = x - mean
    axes = _principal(centred * np.sqrt(weight)[:, None], _NOTHING * float(weight @ (x**2).sum(1)))
    projected = centred @ axes.T
    low, high = mad_limits(projected) if limits == "mad" else _limits(projected, weight)
    return Basis(mean, axes, low, high)


def mad_limits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum of each column of ``(N, K)`` without outliers: those with ``|c - median| < 2 MAD``.

    MAD is the median of the absolute distances to the median. A column of outliers only keeps its extremes.
    """
    distance = np.abs(values - _median(values))
    inside = distance < 2 * _median(distance)
    inside |= ~inside.any(0)
    low = np.where(inside, values, np.inf).min(0)
    return low, np.where(inside, values, -np.inf).max(0)


def _median(values: np.ndarray) -> np.ndarray:
    """The lower median of each column."""
    return np.sort(values, axis=0)[(len(values) - 1) // 2]


def pca_picture(features: Any, basis: Basis, size: tuple[int, int], *, smooth: bool = True) -> Image.Image:
    """A map ``(D, h, w)`` as an RGB picture.

    Args:
        features: tensor or array.
        basis: from :func:`pca_basis`.
        size: ``(H, W)`` of the picture in pixels.
        smooth: interpolate the projections between cells; False draws each cell as a block.
    """
    values = basis.project(features).astype(np.float32)
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    planes = [Image.fromarray(np.ascontiguousarray(values[..., i])).resize((size[1], size[0]), how) for i in range(3)]
    stacked = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return Image.fromarray(np.rint(stacked.clip(0, 1) * 255).astype(np.uint8))


def fitted(image: Image.Image, longest: int) -> Image.Image:
    """Scale an image to a longer side of ``longest`` pixels."""
    scale = longest / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def side_by_side(images: Sequence[Image.Image], labels: Sequence[str] = ()) -> Image.Image:
    """Pictures in a row, aligned at the top, with an optional caption under each.

    Raises:
        ValueError: no images, or another number of labels.
    """
    if not images or (labels and len(labels) != len(images)):
        raise ValueError(f"expected one or more images and one label for each, got {len(images)} and {len(labels)}")
    caption = _CAPTION if any(labels) else 0
    width = sum(image.width for image in images) + _GAP * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images) + caption), _PAPER)
    draw, x = ImageDraw.Draw(sheet), 0
    for index, image in enumerate(images):
        sheet.paste(image.convert("RGB"), (x, 0))
        if caption:
            text = _shortened(labels[index], image.width)
            draw.text((x + image.width / 2, sheet.height - caption / 2), text, _INK, _font(), anchor="mm")
        x += image.width + _GAP
    return sheet


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, aligned at the left.

    Raises:
        ValueError: no pictures.
    """
    if not rows:
        raise ValueError("nothing to stack")
    height = sum(row.height for row in rows) + _GAP * (len(rows) - 1)
    sheet, y = Image.new("RGB", (max(row.width for row in rows), height), _PAPER), 0
    for row in rows:
        sheet.paste(row.convert("RGB"), (0, y))
        y += row.height + _GAP
    return sheet


def _as_map(features: Any) -> np.ndarray:
    if hasattr(features, "detach"):  # a tensor, of any device and float type
        features = features.detach().cpu().float().numpy()
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"expected one spatial map (D, H, W), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("the spatial features contain NaN or infinity")
    return array


def _principal(weighted: np.ndarray, floor: float) -> np.ndarray:
    """Up to three leading right singular vectors ``(3, D)`` of ``weighted (N, D)``; zeros below ``floor``."""
    count, width = weighted.shape
    gram = weighted.T @ weighted if width <= count else weighted @ weighted.T
    values, vectors = np.linalg.eigh(gram)
    axes = np.zeros((3, width))
    for slot, index in enumerate(np.argsort(values)[::-1][:3]):
        if values[index] <= floor:
            break
        axis = vectors[:, index] if width <= count else weighted.T @ vectors[:, index]
        axis = axis / np.linalg.norm(axis)
        # The first of the nearly largest loadings decides the sign, so that rounding does not flip it.
        leading = int(np.argmax(np.abs(axis) >= np.abs(axis).max() * (1 - 1e-6)))
        axes[slot] = axis * (1.0 if axis[leading] > 0 else -1.0)
    return axes


def _limits(values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted percentiles of each column; a column with equal percentiles keeps its extremes."""
    low, high = np.zeros(3), np.zeros(3)
    for column in range(3):
        order = np.argsort(values[:, column], kind="stable")
        ranked, mass = values[order, column], weight[order]
        middle = (np.cumsum(mass) - mass / 2) * 100
        low[column], high[column] = np.interp(_TAILS, middle, ranked)
        if high[column] - low[column] <= 1e-6 * (ranked[-1] - ranked[0]):
            low[column], high[column] = ranked[0], ranked[-1]
    return low, high


def _font() -> Any:
    return ImageFont.load_default(size=13)


def _shortened(text: str, width: int) -> str:
    """The text, shortened to fit."""
    font = _font()
    while font.getlength(text) > width and len(text) > 1:
        text = text.rstrip("…")[:-1] + "…" if len(text) > 2 else "…"
    return text
