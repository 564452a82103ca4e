"""Whitening: PCA, ZCA and Hadamard."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from agglo.normalizers._affine import AffineNormalizer
from agglo.normalizers._eigen import even_rotation, principal, shortage


class Whiten(AffineNormalizer):
    """Unit variance in every direction: the three whitenings of PHI-S's comparison (arXiv:2410.01680).

    With ``cov(y) = U Λ Uᵀ`` and a normalised Hadamard matrix ``H``::

        pca        y_hat = Λ^-½ Uᵀ (y - mu)        y = U Λ^½ y_hat + mu
        zca        y_hat = U Λ^-½ Uᵀ (y - mu)      y = U Λ^½ Uᵀ y_hat + mu
        hadamard   y_hat = H Λ^-½ Uᵀ (y - mu)      y = U Λ^½ Hᵀ y_hat + mu

    The three differ by a rotation of ``y_hat``, to which MSE is invariant; losses that treat channels separately
    (smooth L1) are not. ZCA is closest to the teacher's own channels; Hadamard spreads an error in ``y`` evenly over
    the channels of ``y_hat``. Unlike PHI-S, whitening amplifies weak directions, noise included, to the variance of the
    strong ones. Eigenvalues below ``floor * mean(Λ)`` are therefore raised to it: no direction is amplified more than
    ``floor^-½`` times as much as by PHI-S, a rank-deficient map is invertible, and directions under the floor have less
    than unit variance.

    Args:
        channels: ``C`` of the teacher's features.
        rotation: one of the three. If no Hadamard matrix of order ``channels`` is known, an equivalent rotation is
            used, with a warning.
        floor: smallest eigenvalue, in units of the mean one, in (0, 1]. Rounding to bfloat16 has a relative variance of
            about 2e-6, which the default keeps below 2 % of the target's variance in every direction.

    Raises:
        ValueError: ``floor`` is not in (0, 1].
    """

    def __init__(
        self, channels: int, /, *, rotation: Literal["pca", "zca", "hadamard"] = "zca", floor: float = 1e-4
    ) -> None:
        super().__init__(channels)
        if not 0 < floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {floor}")
        self.rotation = rotation
        self.floor = floor

    def check_count(self, count: int) -> None:
        problem = shortage(count, self.channels)
        if problem:
            raise ValueError(f"{problem}, or set `normalizer: {{kind: phi_s}}`")

    def solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = principal(covariance)
        values = values.clamp(min=self.floor * float(values.mean()))
        if self.rotation == "pca":
            turn = torch.eye(self.channels, dtype=torch.float64)
        elif self.rotation == "zca":
            turn = vectors
        else:
            turn = even_rotation(values)
        sigma = values.sqrt()
        return (turn / sigma) @ vectors.T, (vectors * sigma) @ turn.T
