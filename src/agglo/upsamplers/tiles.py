"""The teacher on every tile: sharp, without training."""

from __future__ import annotations

from torch import Tensor

from agglo.preprocess import resize
from agglo.types import Features, FeatureSpec
from agglo.upsamplers.base import FrozenTeacher, Upsampler


class Tiles(Upsampler):
    """The teacher on ``u x u`` tiles of its own size, stitched.

    Sharp, but tiles have no common context: seams are visible, and positional artefacts repeat ``u x u`` times.

    Args:
        spec: of the teacher.
        size: of the teacher, ``(H, W)`` in pixels.
        factor: ratio of the finer grid to the teacher's.
    """

    def __init__(self, spec: FeatureSpec, size: tuple[int, int], /, *, factor: int = 2) -> None:
        super().__init__(spec, size, factor)

    def forward(self, teacher: FrozenTeacher, images: Tensor) -> Features:
        self.check(images)
        maps = teacher(split(images, self.factor)).spatial
        summary = None if self.spec.summary is None else teacher(resize(images, self.size)).summary
        return Features(summary, stitch(maps, self.factor))


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
