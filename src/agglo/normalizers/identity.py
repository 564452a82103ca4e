"""No normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from agglo.normalizers._affine import AffineNormalizer


class Identity(AffineNormalizer):
    """Leaves features as they are: ``y_hat = y``, as in AM-RADIO (arXiv:2312.06709).

    Frozen from the start. With MSE the teacher with the largest variance dominates (docs/method.md, 2.2).

    Args:
        channels: ``C`` of the teacher's features.
    """

    needs_statistics = False

    def __init__(self, channels: int, /) -> None:
        super().__init__(channels)
        self.frozen.fill_(True)

    def solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.channels, dtype=torch.float64)
        return eye, eye

    def multiply(self, matrix: Tensor, features: Tensor) -> Tensor:
        return features
