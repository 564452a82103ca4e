"""Placement of feature maps in a rendered image, and resampling of one map to the cells of another.

Student and teachers receive shifted crops of one rendered image (C-RADIOv4, arXiv:2601.17237; docs/method.md, 6.3). A
:class:`Placement` holds the region that a map's cells cover, per sample; :func:`align_to_common_grid` brings two maps
to common cells. Crops that differ by whole cells are compared by indexing, without interpolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WHOLE = 1e-6
"""Tolerance, in cells, within which an offset counts as a whole number: the rounding of a division."""


@dataclass(frozen=True)
class Placement:
    """Cells of maps ``(B, C, h, w)`` in a rendered image: cell ``k`` covers ``[start + k cell, start + (k + 1) cell)``.

    Args:
        start: ``(B, 2)`` float64 on the CPU, ``(y, x)`` of the first cell's upper left corner, per sample.
        cell: ``(y, x)`` extent of a cell, in the unit of ``start``, which all views of a step share.
        grid: ``(h, w)``.
    """

    start: Tensor
    cell: tuple[float, float]
    grid: tuple[int, int]

    @classmethod
    def full(cls, batch: int, size: tuple[int, int], grid: tuple[int, int]) -> Placement:
        """Placement of maps that cover the whole rendered image of ``size``."""
        start = torch.zeros(batch, 2, dtype=torch.float64)
        return cls(start, (size[0] / grid[0], size[1] / grid[1]), grid)

    def with_grid(self, grid: tuple[int, int]) -> Placement:
        """The same region divided into another grid (of a head that is finer than its backbone)."""
        cell = tuple(self.cell[axis] * self.grid[axis] / grid[axis] for axis in (0, 1))
        return Placement(self.start, (cell[0], cell[1]), grid)


def align_to_common_grid(a: Tensor, at: Placement, b: Tensor, bt: Placement) -> tuple[Tensor, Tensor, Tensor | None]:
    """Resample the finer of two maps to the cells of the coarser one (docs/method.md, D-11).

    Args:
        a: ``(B, C, h, w)`` at ``at``; differentiable.
        b: ``(B, C', h', w')`` at ``bt``.

    Returns:
        Both maps on common cells, and a mask ``(B, 1, h, w)`` of the cells that both cover fully, None for all.

    Raises:
        ValueError: a map's shape is not that of its placement.
    """
    for name, x, place in (("first", a, at), ("second", b, bt)):
        if tuple(x.shape[-2:]) != place.grid or len(x) != len(place.start):
            raise ValueError(f"the {name} map is {tuple(x.shape)}, its placement {len(place.start)} x {place.grid}")
    if _finer(at, bt):
        a, mask = resample_to(a, at, bt)
    else:
        b, mask = resample_to(b, bt, at)
    return a, b, mask


def overlap_count(at: Placement, bt: Placement) -> int:
    """Number of cells of a batch that both maps cover fully, as in :func:`align_to_common_grid`'s mask."""
    source, target = (at, bt) if _finer(at, bt) else (bt, at)
    rows, columns = (_Axis.between(source, target, axis).valid.sum(1) for axis in (0, 1))
    return int((rows * columns).sum())


def _finer(at: Placement, bt: Placement) -> bool:
    """Whether the first placement has the smaller cells, so that its map is resampled."""
    return math.prod(at.cell) <= math.prod(bt.cell) * (1 + _WHOLE)


def resample_to(x: Tensor, source: Placement, target: Placement) -> tuple[Tensor, Tensor | None]:
    """Resample a map to another placement's cells.

    Per axis target cell ``k`` has its centre at ``u(k) = (t + (k + 1/2) c_t - s) / c_s - 1/2`` source cells. Equal
    cells at whole offsets are indexed. Otherwise a cell is the mean of the linear interpolation at ``ceil(c_t / c_s)``
    points inside it, as in :func:`agglo.nn.geometry.resample`.

    Args:
        x: ``(B, C, h, w)`` at ``source``.
        source, target: of equal batch size.

    Returns:
        ``(B, C, h', w')`` on the target's grid, and a mask ``(B, 1, h', w')`` of the cells that lie fully within the
        source's region, None for all. Cells outside the mask are finite and undefined.
    """
    axes = [_Axis.between(source, target, axis) for axis in (0, 1)]
    if all(axis.indices is not None for axis in axes):
        rows, columns = (axis.indices for axis in axes)
        if not (axes[0].is_identity and axes[1].is_identity):
            x = _gather(x, rows, columns)  # type: ignore[arg-type]
    else:
        # Autocast would lower the precision of targets, which are resampled here too.
        with torch.autocast(x.device.type, enabled=False):
            weights = [_to_device(axis.matrix().to(x.dtype), x.device) for axis in axes]
            x = weights[0][:, None] @ x @ weights[1][:, None].transpose(-1, -2)
    if all(bool(axis.valid.all()) for axis in axes):
        return x, None
    rows, columns = (_to_device(axis.valid, x.device) for axis in axes)
    return x, (rows[:, :, None] & columns[:, None, :])[:, None]


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``out[b, :, i, j] = x[b, :, rows[b, i], columns[b, j]]``."""
    width = x.shape[-1]
    rows, columns = _to_device(rows, x.device), _to_device(columns, x.device)
    flat = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    picked = x.flatten(2).gather(2, flat[:, None].expand(-1, x.shape[1], -1))
    return picked.unflatten(2, (rows.shape[1], columns.shape[1]))


def _to_device(small: Tensor, device: torch.device) -> Tensor:
    """Copy to the device asynchronously, through pinned memory for CUDA."""
    if device.type != "cuda":
        return small.to(device)
    return small.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class _Axis:
    """One axis of :func:`resample_to`.

    Args:
        centres: ``(B, n')`` float64, centres of the target cells in source cells (0: centre of the first).
        ratio: source cells per target cell.
        length: n, number of source cells.
        valid: ``(B, n')``, target cells inside the source's region.
        indices: ``(B, n')`` if every target centre coincides with a source centre, else None.
    """

    centres: Tensor
    ratio: float
    length: int
    valid: Tensor
    indices: Tensor | None

    @classmethod
    def between(cls, source: Placement, target: Placement, axis: int) -> _Axis:
        ratio, length = target.cell[axis] / source.cell[axis], source.grid[axis]
        offset = (target.start[:, axis] - source.start[:, axis]) / source.cell[axis]
        cells = torch.arange(target.grid[axis], dtype=torch.float64)
        near, far = offset[:, None] + cells * ratio, offset[:, None] + (cells + 1) * ratio
        valid = (near >= -_WHOLE) & (far <= length + _WHOLE)
        centres = offset[:, None] + (cells + 0.5) * ratio - 0.5
        whole = abs(ratio - 1) < _WHOLE and bool(((offset - offset.round()).abs() < _WHOLE).all())
        indices = centres.round().long().clamp(0, length - 1) if whole else None
        return cls(centres, ratio, length, valid, indices)

    @property
    def is_identity(self) -> bool:
        """Whether every cell keeps its index."""
        if self.indices is None or self.indices.shape[1] != self.length:
            return False
        return bool((self.indices == torch.arange(self.length)).all())

    def matrix(self) -> Tensor:
        """Weights ``(B, n', n)`` float64; every row sums to 1."""
        points = max(1, math.ceil(self.ratio - _WHOLE))
        inside = ((torch.arange(points, dtype=torch.float64) + 0.5) / points - 0.5) * self.ratio
        position = (self.centres[..., None] + inside).clamp(0, self.length - 1)
        low = position.floor().long().clamp(max=max(self.length - 2, 0))
        fraction = position - low
        weights = position.new_zeros(*position.shape, self.length)
        weights.scatter_(-1, low[..., None], (1 - fraction)[..., None])
        weights.scatter_add_(-1, (low + 1).clamp(max=self.length - 1)[..., None], fraction[..., None])
        return weights.mean(-2)
