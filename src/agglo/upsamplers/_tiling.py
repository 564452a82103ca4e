"""An image as tiles of the teacher's size, and their maps as one."""

from __future__ import annotations

from torch import Tensor


def split(images: Tensor, factor: int) -> Tensor:
    """``(B, 3, u H, u W)`` to ``(B u u, 3, H, W)``: tiles row by row, all of one image together."""
    batch, channels, height, width = images.shape
    tiles = images.view(batch, channels, factor, height // factor, factor, width // factor)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // factor, width // factor)


def stitch(maps: Tensor, factor: int) -> Tensor:
    """``(B u u, C, h, w)`` to ``(B, C, u h, u w)``; the inverse of :func:`split`."""
    count, channels, height, width = maps.shape
    tiles = maps.view(count // factor**2, factor, factor, channels, height, width)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, factor * height, factor * width)
