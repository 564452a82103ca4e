"""Per-channel standardisation."""

from __future__ import annotations

import torch
from torch import Tensor

from agglo.normalizers._affine import AffineNormalizer


class Standard(AffineNormalizer):
    """Zero mean and unit variance per channel: ``y_hat_c = (y_c - mu_c) / sigma_c``, as in EUPE (arXiv:2603.22387).

    A constant channel is divided by the root mean variance of all channels instead, so that the map is invertible and
    does not amplify rounding noise.

    Args:
        channels: ``C`` of the teacher's features.
    """

    def solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        variance = covariance.diagonal()
        typical = variance.mean()
        sigma = torch.where(variance > 1e-12 * typical, variance, typical).sqrt()
        return (1 / sigma).diag(), sigma.diag()

    def multiply(self, matrix: Tensor, features: Tensor) -> Tensor:
        return features * matrix.diagonal().view(-1, 1, 1)
