"""Baseline: one pass, interpolated."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from agglo.preprocess import resize
from agglo.types import Features, FeatureSpec
from agglo.upsamplers.base import FrozenTeacher, Upsampler


class Bilinear(Upsampler):
    """The teacher's map at its own size, interpolated between cell centres: one pass, no added detail.

    Args:
        spec: of the teacher.
        size: of the teacher, ``(H, W)`` in pixels.
        factor: ratio of the finer grid to the teacher's.
    """

    def __init__(self, spec: FeatureSpec, size: tuple[int, int], /, *, factor: int = 2) -> None:
        super().__init__(spec, size, factor)

    def forward(self, teacher: FrozenTeacher, images: Tensor) -> Features:
        self.check(images)
        features = teacher(resize(images, self.size))
        return Features(
            features.summary, F.interpolate(features.spatial, self.finer, mode="bilinear", align_corners=False)
        )
