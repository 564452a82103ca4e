"""PHI-S: PCA-Hadamard isotropic standardisation."""

from __future__ import annotations

import torch
from torch import Tensor

from agglo.nn.linalg import equalise_variance, isotropic_rotation
from agglo.normalizers._affine import AffineNormalizer


class PhiS(AffineNormalizer):
    """Rotates the variance evenly over all channels, then divides by one scalar (PHI-S, arXiv 2410.01680).

    With ``cov(y) = U Λ Uᵀ`` and a normalised Hadamard matrix ``H``::

        y_hat = H Uᵀ (y - mu) / phi,    phi = sqrt(mean(Λ)),    inverse: y = phi U Hᵀ y_hat + mu

    Every channel of ``y_hat`` has unit variance, and the map is a rotation times a scalar: distances and angles keep
    their ratios, no noise direction is amplified, and a rank-deficient covariance is fine.

    Where no Hadamard matrix of order ``channels`` is at hand, ``H`` is a random rotation that is turned further until
    the variances are equal all the same (:func:`agglo.nn.linalg.equalise_variance`).

    Args:
        channels: ``C`` of the teacher's features.
    """

    def __init__(self, channels: int, /) -> None:
        super().__init__(channels)

    def solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0)
        # An eigenvector's sign is arbitrary and differs between solvers: make its largest entry positive.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0).double()
        rotation, exact = isotropic_rotation(self.channels)
        if not exact:
            rotation = equalise_variance(rotation, values.diag())
        rotation = rotation @ vectors.T
        phi = values.mean().sqrt()
        return rotation / phi, rotation.T * phi
