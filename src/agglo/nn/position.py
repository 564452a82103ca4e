"""Cropped position embeddings (CPE; AM-RADIO, arXiv:2312.06709; docs/method.md, 2.8): one table for any grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo import dist


def eval_embedding(table: Tensor, grid: tuple[int, int], align_corners: bool = False) -> Tensor:
    """The position embedding at inference: the table resized to the grid's longer side, then cropped top-left.

    Args:
        table: ``(1, C, R, R)``.
        grid: ``(h, w)`` in patches.
        align_corners: of the resize; RADIO's generations differ (docs/checkpoints.md, 2).

    Returns:
        ``(1, C, h, w)`` in the table's dtype.
    """
    # The table's own size needs no special case (resizing to it changes no value), and the crop selects indices:
    # `torch.export` would otherwise restrict a program to sizes that branch, or are strided, like its example.
    side = max(grid)
    resized = F.interpolate(table.float(), size=(side, side), mode="bilinear", align_corners=align_corners)
    return _corner(resized, grid).to(table.dtype)


def corner_embedding(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The table's top-left ``h x w`` without resizing, ``(1, C, h, w)``; stretched if the table is too small.

    For models whose table is as large as their nominal image (docs/checkpoints.md, 2).
    """
    side = table.shape[-1]
    corner = _corner(table, (min(grid[0], side), min(grid[1], side)))
    # No special case for a table that is large enough, see eval_embedding.
    return F.interpolate(corner.float(), size=grid, mode="bilinear", align_corners=False).to(table.dtype)


def _corner(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(1, C, R, R)`` to its top-left ``(1, C, h, w)``."""
    rows, columns = (torch.arange(length, device=table.device) for length in grid)
    return table.flatten(2)[..., (rows[:, None] * table.shape[-1] + columns).flatten()].unflatten(2, grid)


def train_embedding(table: Tensor, grid: tuple[int, int], batch: int, drop: float = 0.1) -> Tensor:
    """A random viewport of the table per sample, in training (docs/method.md, 2.8, steps 1 to 5).

    Scale ``s ~ U(sqrt(0.1), 1)`` and aspect ``a = exp(U(ln 3/4, ln 4/3))`` give an extent ``(s a, s / a)`` in (x, y),
    placed uniformly inside the table; with probability ``drop`` a sample gets a zero embedding.

    Args:
        table: ``(1, C, R, R)``.
        grid: ``(h, w)`` in patches.
        batch: number of samples.
        drop: probability of an all-zero embedding.

    Returns:
        ``(batch, C, h, w)``, or the table ``(1, C, R, R)`` if that is the grid.
    """
    if grid == tuple(table.shape[-2:]):
        return table
    device = table.device
    u_scale, u_aspect = dist.uniform((batch, 1, 1), device=device), dist.uniform((batch, 1, 1), device=device)
    u_place = dist.uniform((batch, 1, 1, 2), device=device)
    scale = math.sqrt(0.1) + u_scale * (1 - math.sqrt(0.1))
    aspect = torch.exp(math.log(3 / 4) + u_aspect * (math.log(4 / 3) - math.log(3 / 4)))
    extent = torch.stack([scale * aspect, scale / aspect], dim=-1).clamp(0, 1)
    height, width = grid
    ys, xs = torch.linspace(0, 1, height, device=device), torch.linspace(0, 1, width, device=device)
    points = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)[None]
    points = (points * extent + u_place * (1 - extent)) * 2 - 1
    # One tall grid for all samples: the gradient is then one table instead of one per sample.
    tall = F.grid_sample(table.float(), points.view(1, batch * height, width, 2), mode="bilinear", align_corners=True)
    window = tall.view(-1, batch, height, width).transpose(0, 1)
    if drop > 0:
        window = window * (dist.uniform((batch, 1, 1, 1), device=device) >= drop)
    return window.to(table.dtype)
