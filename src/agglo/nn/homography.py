"""Views of an image under a homography, and the same for its feature maps (METHOD 4.2, 6.2; D-16).

Coordinates are normalised: an image's corners are ``(+-1, +-1)``, ``(x, y)``, whatever its grid, and cell ``k`` of
``n`` has its centre at ``(2 k + 1) / n - 1``. A matrix takes a point of the view to the point of the image it shows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CORNERS = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
"""A view's corners, clockwise from the upper left."""


def from_corners(corners: Tensor) -> Tensor:
    """The homographies that take the corners of a view to given points of the image.

    Args:
        corners: ``(N, 4, 2)`` float64, where :data:`CORNERS` go.

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
    """Where the cell centres of a view lie in the image: ``(N, 3, 3)`` to ``(N, h, w, 2)`` in float32."""
    y, x = ((2 * torch.arange(n, dtype=torch.float64, device=matrix.device) + 1) / n - 1 for n in grid)
    base = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x)), torch.ones(grid).to(x)], -1)
    found = torch.einsum("nij,hwj->nhwi", matrix.double(), base)
    return (found[..., :2] / found[..., 2:]).float()


def warp(x: Tensor, matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """A view of images or maps ``(N, C, H, W)`` under ``(N, 3, 3)``: ``(N, C, h, w)``, bilinear, mirrored outside."""
    at = cell_centres(matrix, grid).to(x.device, x.dtype)
    return F.grid_sample(x, at, mode="bilinear", padding_mode="reflection", align_corners=False)


def inside_mask(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells of a view have their centre on the image, ``(N, 1, h, w)`` bool."""
    return (cell_centres(matrix, grid).abs() <= 1).all(-1)[:, None]
