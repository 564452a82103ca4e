"""Standardisation by one mean and one scale."""

from __future__ import annotations

import torch
from torch import Tensor

from agglo.normalizers._affine import AffineNormalizer


class GlobalStandard(AffineNormalizer):
    """One mean and one scale for all channels and positions: ``y_hat = (y - mu_g) / sigma_g`` (arXiv:2410.01680).

    ``mu_g = mean_c(mu_c)`` and ``sigma_g² = mean_c(sigma_c²) + mean_c((mu_c - mu_g)²)``: the moments of all feature
    values. Channels keep their offsets and relative scales, so a channel of large variance still dominates within its
    teacher, but no teacher dominates another.

    Args:
        channels: ``C`` of the teacher's features.
    """

    def centre(self, mean: Tensor) -> Tensor:
        return mean.mean().expand(self.channels)

    def solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        # The scatter around mu_g, which includes the channels' offsets.
        sigma = covariance.diagonal().mean().sqrt()
        eye = torch.eye(self.channels, dtype=torch.float64)
        return eye / sigma, eye * sigma

    def multiply(self, matrix: Tensor, features: Tensor) -> Tensor:
        return features * matrix[0, 0]
