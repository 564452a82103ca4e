"""Whitening: PCA, ZCA and Hadamard."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from agglo.normalizers._affine import AffineNormalizer
from agglo.normalizers._eigen import even_rotation, principal, too_few


class Whiten(AffineNormalizer):
    """Unit variance in every *direction*: the three whitenings that PHI-S is compared with (arXiv:2410.01680).

    With ``cov(y) = U Λ Uᵀ`` and a normalised Hadamard matrix ``H``::

        pca        y_hat = Λ^-½ Uᵀ (y - mu)        y = U Λ^½ y_hat + mu
        zca        y_hat = U Λ^-½ Uᵀ (y - mu)      y = U Λ^½ Uᵀ y_hat + mu
        hadamard   y_hat = H Λ^-½ Uᵀ (y - mu)      y = U Λ^½ Hᵀ y_hat + mu

    The three differ by a rotation of ``y_hat``, which a head's last layer can learn and MSE does not see; losses that
    treat channels one by one (smooth L1) do. ZCA stays nearest to the teacher's own channels; Hadamard gives every
    channel of ``y_hat`` the same share of an error in ``y``. Against PHI-S, all weak directions of the teacher are
    amplified until they count as much as the strong ones, noise included. Hence the floor: an eigenvalue below
    ``floor * mean(Λ)`` is raised to that, so no direction is amplified more than ``floor^-½`` times what PHI-S does,
    and the map stays invertible where the covariance is rank deficient. Directions under the floor have less than unit
    variance.

    Args:
        channels: ``C`` of the teacher's features.
        rotation: which of the three. Where no Hadamard matrix of order ``channels`` is at hand, an equivalent
            rotation takes its place and a warning says so.
        floor: smallest eigenvalue, in units of the mean one, in (0, 1]. A number rounded to bfloat16 carries noise of
            some 2e-6 of its square; the default keeps that at 2 % of the target's variance in every direction, where
            1e-6 would let it be most of the target.

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
        problem = too_few(count, self.channels)
        if problem:
            raise ValueError(f"{problem}, or set `normalizer: {{kind: phi_s}}`, which amplifies no direction")

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
