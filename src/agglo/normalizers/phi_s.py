"""PHI-S: PCA-Hadamard isotropic standardisation."""

from __future__ import annotations

import warnings

from torch import Tensor

from agglo.normalizers._affine import AffineNormalizer
from agglo.normalizers._eigen import even_rotation, principal, too_few


class PhiS(AffineNormalizer):
    """Rotates the variance evenly over all channels, then divides by one scalar (PHI-S, arXiv:2410.01680).

    With ``cov(y) = U Λ Uᵀ`` and a normalised Hadamard matrix ``H``::

        y_hat = H Uᵀ (y - mu) / phi,    phi = sqrt(mean(Λ)),    inverse: y = phi U Hᵀ y_hat + mu

    Every channel of ``y_hat`` has unit variance, and the map is a rotation times a scalar: distances and angles keep
    their ratios, no noise direction is amplified, and a rank-deficient covariance is fine. Fewer positions than
    channels are therefore only warned about.

    Where no Hadamard matrix of order ``channels`` is at hand, ``H`` is a random rotation that is turned further until
    the variances are equal all the same (:func:`agglo.nn.linalg.equalise_variance`); a warning says so.

    Args:
        channels: ``C`` of the teacher's features.
    """

    def __init__(self, channels: int, /) -> None:
        super().__init__(channels)

    def check_count(self, count: int) -> None:
        problem = too_few(count, self.channels)
        if problem:
            warnings.warn(problem, stacklevel=3)  # this, freeze: whoever froze the normalizer

    def solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = principal(covariance)
        rotation = even_rotation(values) @ vectors.T
        phi = values.mean().sqrt()
        return rotation / phi, rotation.T * phi
