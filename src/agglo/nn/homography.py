"""Homography views of images and feature maps (docs/method.md, 4.2, 6.2 and D-16).

Coordinates ``(x, y)`` are normalised: the corners of any grid are ``(+-1, +-1)``, and cell ``k`` of ``n`` has its
centre at ``(2 k + 1) / n - 1``. A matrix maps points of the view to points of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CORNERS = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
"""A view's corners, clockwise from the upper left."""


def from_corners(corners: Tensor) -> Tensor:
    """Homographies that map the corners of a view to given points of the image.

    Args:
        corners: ``(N, 4, 2)`` float64, the images of :data:`CORNERS`.

    Returns:
        ``(N, 3, 3)`` float64 with a last entry of 1.
    """
    x, y = corners.new_tensor(CORNERS).unbind(-1)
    u, v = corners.unbind(-1)
    one, zero = torch.ones_like(u), torch.zeros_like(u)
    x, y = x.expand_as(u), y.expand_as(u)
    rows = torch.cat([
        torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1),
        torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1),
    ], 1)  # fmt: skip
    found = torch.linalg.solve(rows, torch.cat([u, v], 1))
    return torch.cat([found, one[:, :1]], 1).view(-1, 3, 3)


def cell_centres(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions in the image of a view's cell centres: ``(N, 3, 3)`` to float32 ``(N, h, w, 2)``."""
    y, x = ((2 * torch.arange(n, dtype=torch.float64, device=matrix.device) + 1) / n - 1 for n in grid)
    base = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x)), torch.ones(grid).to(x)], -1)
    found = torch.einsum("nij,hwj->nhwi", matrix.double(), base)
    return (found[..., :2] / found[..., 2:]).float()


def warp(x: Tensor, matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """Warp images or maps ``(N, C, H, W)`` by ``(N, 3, 3)`` to ``(N, C, h, w)``; bilinear, mirrored at the border."""
    positions = cell_centres(matrix, grid).to(x.device, x.dtype)
    return F.grid_sample(x, positions, mode="bilinear", padding_mode="reflection", align_corners=False)


def inside_mask(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells of a view whose centre is inside the image, ``(N, 1, h, w)`` bool."""
    return (cell_centres(matrix, grid).abs() <= 1).all(-1)[:, None]
