"""Where the cells of a feature map lie, and how one map is brought onto the cells of another (METHOD 6.3).

Student and teachers look at crops of one canvas that are shifted against each other. A :class:`Placement` says, for
each sample, which part of the canvas a map's cells cover; :func:`meet` brings two maps onto common cells and says which
of them both have seen. Crops that differ by whole cells are compared by indexing: no interpolation, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WHOLE = 1e-6
"""How far an offset in cells may be from a whole number and still be one: rounding of a division, not of a view."""


@dataclass(frozen=True)
class Placement:
    """The cells of maps ``(B, C, h, w)`` on a canvas: cell ``k`` covers ``[start + k cell, start + (k + 1) cell)``.

    Args:
        start: ``(B, 2)`` float64 on the CPU, ``(y, x)`` on the canvas where each sample's first cell begins.
        cell: extent of a cell on the canvas, ``(y, x)``; whatever the unit, all views of a step share it.
        grid: ``(h, w)``.
    """

    start: Tensor
    cell: tuple[float, float]
    grid: tuple[int, int]

    @classmethod
    def whole(cls, batch: int, canvas: tuple[int, int], grid: tuple[int, int]) -> Placement:
        """A map that covers the whole canvas."""
        start = torch.zeros(batch, 2, dtype=torch.float64)
        return cls(start, (canvas[0] / grid[0], canvas[1] / grid[1]), grid)

    def on(self, grid: tuple[int, int]) -> Placement:
        """The same field of view, cut into another grid (a head that is finer than its backbone)."""
        cell = tuple(self.cell[axis] * self.grid[axis] / grid[axis] for axis in (0, 1))
        return Placement(self.start, (cell[0], cell[1]), grid)


def meet(a: Tensor, at: Placement, b: Tensor, bt: Placement) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring two maps onto the cells of the coarser one (D-11).

    Args:
        a: ``(B, C, h, w)``, placed at ``at``; gradients flow through it.
        b: ``(B, C', h', w')``, placed at ``bt``.

    Returns:
        Both maps on common cells, and a mask ``(B, 1, h, w)`` of the cells that both have seen in full, or None where
        they have seen all.

    Raises:
        ValueError: a map's shape is not that of its placement.
    """
    for name, x, place in (("first", a, at), ("second", b, bt)):
        if tuple(x.shape[-2:]) != place.grid or len(x) != len(place.start):
            raise ValueError(f"the {name} map is {tuple(x.shape)}, its placement {len(place.start)} x {place.grid}")
    if _finer(at, bt):
        a, mask = bring(a, at, bt)
    else:
        b, mask = bring(b, bt, at)
    return a, b, mask


def common(at: Placement, bt: Placement) -> int:
    """How many cells of a batch :func:`meet` leaves to be compared: those that both maps have seen in full."""
    source, target = (at, bt) if _finer(at, bt) else (bt, at)
    rows, columns = (_Axis.between(source, target, axis).valid.sum(1) for axis in (0, 1))
    return int((rows * columns).sum())


def _finer(at: Placement, bt: Placement) -> bool:
    """Whether the first is the one that is resampled."""
    return math.prod(at.cell) <= math.prod(bt.cell) * (1 + _WHOLE)


def bring(x: Tensor, source: Placement, target: Placement) -> tuple[Tensor, Tensor | None]:
    """Resample a map onto another's cells.

    Per axis target cell ``k`` has its centre at ``u(k) = (t + (k + 1/2) c_t - s) / c_s - 1/2`` source cells. Equal
    cells and whole offsets: indexing. Else the mean of the linear interpolation at ``ceil(c_t / c_s)`` points inside
    each target cell, as :func:`agglo.nn.geometry.resample` does it.

    Args:
        x: ``(B, C, h, w)`` placed at ``source``.
        source, target: of one batch size.

    Returns:
        ``(B, C, h', w')`` on the target's grid, and the mask ``(B, 1, h', w')`` of cells that lie wholly within the
        source's field of view (None: all). What a masked cell holds is finite and means nothing.
    """
    axes = [_Axis.between(source, target, axis) for axis in (0, 1)]
    if all(axis.indices is not None for axis in axes):
        rows, columns = (axis.indices for axis in axes)
        if not (axes[0].trivial and axes[1].trivial):
            x = _pick(x, rows, columns)  # type: ignore[arg-type]
    else:
        # Autocast would lower the precision of targets, which are resampled here too.
        with torch.autocast(x.device.type, enabled=False):
            weights = [_sent(axis.matrix().to(x.dtype), x.device) for axis in axes]
            x = weights[0][:, None] @ x @ weights[1][:, None].transpose(-1, -2)
    if all(bool(axis.valid.all()) for axis in axes):
        return x, None
    rows, columns = (_sent(axis.valid, x.device) for axis in axes)
    return x, (rows[:, :, None] & columns[:, None, :])[:, None]


def _pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``out[b, :, i, j] = x[b, :, rows[b, i], columns[b, j]]``."""
    width = x.shape[-1]
    rows, columns = _sent(rows, x.device), _sent(columns, x.device)
    flat = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    picked = x.flatten(2).gather(2, flat[:, None].expand(-1, x.shape[1], -1))
    return picked.unflatten(2, (rows.shape[1], columns.shape[1]))


def _sent(small: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it is doing: from page-locked memory where it has its own."""
    if device.type != "cuda":
        return small.to(device)
    return small.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class _Axis:
    """One axis of :func:`bring`.

    Args:
        centres: ``(B, n')`` float64, target cells' centres in source cells (0: the centre of the first).
        ratio: source cells a target cell.
        length: n, source cells.
        valid: ``(B, n')``, target cells inside the source's field of view.
        indices: ``(B, n')`` where every centre falls on a source cell's, else None.
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
    def trivial(self) -> bool:
        """Whether every cell stays where it is."""
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
