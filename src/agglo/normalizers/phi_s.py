"""PHI-S: PCA-Hadamard isotropic standardisation."""

from __future__ import annotations

import warnings

from torch import Tensor

from agglo.normalizers._affine import AffineNormalizer
from agglo.normalizers._eigen import even_rotation, principal, shortage


class PhiS(AffineNormalizer):
    """Rotates to equal variance in all channels, then divides by one scalar (PHI-S, arXiv:2410.01680).

    With ``cov(y) = U Λ Uᵀ`` and a normalised Hadamard matrix ``H``::

        y_hat = H Uᵀ (y - mu) / phi,    phi = sqrt(mean(Λ)),    inverse: y = phi U Hᵀ y_hat + mu

    Every channel of ``y_hat`` has unit variance. The map is a rotation times a scalar, so it preserves ratios of
    distances and amplifies no direction. A rank-deficient covariance is allowed: fewer positions than channels cause a
    warning only. If no Hadamard matrix of order ``channels`` is known, ``H`` is a random rotation, rotated further to
    equal variances (:func:`agglo.nn.linalg.equalise_variance`), with a warning.

    Args:
        channels: ``C`` of the teacher's features.
    """

    def check_count(self, count: int) -> None:
        problem = shortage(count, self.channels)
        if problem:
            warnings.warn(problem, stacklevel=3)  # the caller of freeze

    def solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = principal(covariance)
        rotation = even_rotation(values) @ vectors.T
        phi = values.mean().sqrt()
        return rotation / phi, rotation.T * phi
