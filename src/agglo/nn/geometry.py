"""Resampling of feature maps to a common grid (docs/method.md, 3.3 and D-11)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Resample two maps of the same image region to the smaller of their grids, axis by axis. Differentiable.

    Args:
        a: ``(B, C, H, W)``.
        b: ``(B', C', H', W')``.

    Returns:
        Both maps at ``(min(H, H'), min(W, W'))``; a map already on that grid is returned as the same object.

    Raises:
        ValueError: a map is not four-dimensional.
    """
    for map_ in (a, b):
        if map_.ndim != 4:
            raise ValueError(f"a feature map is (B, C, H, W); got shape {tuple(map_.shape)}")
    grid = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
    return resample(a, grid), resample(b, grid)


def resample(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample ``(B, C, H, W)`` to ``grid`` without aliasing, cell centres at ``+0.5`` (``align_corners=False``).

    Per axis with the ratio ``r = n_in / n_out``: a target cell is the mean of the linear interpolation at ``ceil(r)``
    evenly spaced points inside it, indices clamped at the border (docs/method.md, D-11). An integer ratio gives the
    exact block mean, upsampling gives bilinear interpolation, and linear functions are reproduced inside the border.

    Args:
        x: ``(B, C, H, W)``, floating point.
        grid: ``(H', W')``, both >= 1.

    Raises:
        ValueError: an axis of ``grid`` is less than one cell.
    """
    if min(grid) < 1:
        raise ValueError(f"a grid needs at least one cell per axis; got {grid}")
    height, width = x.shape[-2:]
    if (height, width) == tuple(grid):
        return x
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(x, (height // grid[0], width // grid[1]))
    # Autocast would lower the precision of targets, which are resampled here too.
    with torch.autocast(x.device.type, enabled=False):
        rows = _axis(height, grid[0]).to(x)
        columns = _axis(width, grid[1]).to(x)
        return rows @ x @ columns.T


@lru_cache(maxsize=256)
def _axis(n_in: int, n_out: int) -> Tensor:
    """Weights ``(n_out, n_in)`` of one axis, float64; every row sums to 1."""
    points = math.ceil(n_in / n_out)
    position = (torch.arange(n_out * points, dtype=torch.float64) + 0.5) * (n_in / (n_out * points)) - 0.5
    position = position.clamp(0, n_in - 1)
    low = position.floor().long().clamp(max=max(n_in - 2, 0))
    high = (low + 1).clamp(max=n_in - 1)
    fraction = (position - low)[:, None]
    eye = torch.eye(n_in, dtype=torch.float64)
    weights = eye[low] * (1 - fraction) + eye[high] * fraction
    return weights.view(n_out, points, n_in).mean(1)
