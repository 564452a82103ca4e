"""The plain baseline: one pass, interpolated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from agglo.preprocess import resize
from agglo.types import Features, FeatureSpec
from agglo.upsamplers.base import Upsampler

if TYPE_CHECKING:
    from agglo.teachers.base import Teacher


class Bilinear(Upsampler):
    """The teacher's map of the image at its own size, interpolated between cell centres. One pass, no detail.

    Args:
        spec: of the teacher.
        size: of the teacher.
        factor: how many times finer.
    """

    def __init__(self, spec: FeatureSpec, size: tuple[int, int], /, *, factor: int = 2) -> None:
        super().__init__(spec, size, factor)

    def forward(self, teacher: Teacher, images: Tensor) -> Features:
        self.check(images)
        found = teacher(resize(images, self.size))
        return Features(found.summary, F.interpolate(found.spatial, self.finer, mode="bilinear", align_corners=False))
