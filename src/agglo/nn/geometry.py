"""Bringing two feature maps onto one grid (METHOD 3.3, D-11)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Resample two maps that cover the same field of view onto the smaller grid of the two, axis by axis.

    A map already on that grid comes back as it is (the same object). Differentiable.

    Args:
        a: ``(B, C, H, W)``.
        b: ``(B', C', H', W')``; batch and channels are not compared.

    Returns:
        Both maps at ``(min(H, H'), min(W, W'))``.

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
    evenly spaced points inside it, indices clamped at the border (D-11). So an integer ratio is the exact block mean,
    a growing axis is bilinear interpolation, a constant stays that constant, and a linear ramp keeps its value at every
    cell centre that is not touched by the border.

    Args:
        x: ``(B, C, H, W)``, floating point.
        grid: ``(H', W')``, both >= 1.

    Raises:
        ValueError: an axis of ``grid`` is smaller than one cell.
    """
    if min(grid) < 1:
        raise ValueError(f"a grid needs at least one cell per axis; got {grid}")
    height, width = x.shape[-2:]
    if (height, width) == tuple(grid):
        return x
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(x, (height // grid[0], width // grid[1]))
    # Autocast would silently lower the precision of targets, which are resampled here too.
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
