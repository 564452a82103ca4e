"""The cheap way to detail: the teacher on every tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from agglo.preprocess import resize
from agglo.types import Features, FeatureSpec
from agglo.upsamplers._tiling import split, stitch
from agglo.upsamplers.base import Upsampler

if TYPE_CHECKING:
    from agglo.teachers.base import Teacher


class Tiles(Upsampler):
    """The teacher on ``u x u`` tiles of its own size, stitched. Sharp, but no tile knows of the others: seams show, and
    whatever is locked to positions is there ``u x u`` times.

    Args:
        spec: of the teacher.
        size: of the teacher.
        factor: how many times finer.
    """

    def __init__(self, spec: FeatureSpec, size: tuple[int, int], /, *, factor: int = 2) -> None:
        super().__init__(spec, size, factor)

    def forward(self, teacher: Teacher, images: Tensor) -> Features:
        self.check(images)
        found = teacher(split(images, self.factor)).spatial
        summary = None if self.spec.summary is None else teacher(resize(images, self.size)).summary
        return Features(summary, stitch(found, self.factor))
