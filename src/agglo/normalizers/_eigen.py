"""Shared by the rotating kinds: principal axes, variance-equalising rotations, and sample counts."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from agglo.nn.linalg import equalise_variance, isotropic_rotation


def principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``Λ (C,)``, ascending and at least 0, and eigenvectors ``U (C, C)`` in columns: ``cov = U Λ Uᵀ``.

    The sign of an eigenvector differs between solvers: its largest entry is made positive.
    """
    values, vectors = torch.linalg.eigh(covariance)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values.clamp(min=0), vectors * torch.where(largest < 0, -1.0, 1.0).double()


def even_rotation(values: Tensor) -> Tensor:
    """The normalised Hadamard matrix ``(C, C)``; if there is none, an equivalent rotation, with a warning.

    The substitute is a random rotation, rotated further until ``R diag(values) Rᵀ`` has equal diagonal entries
    (:func:`agglo.nn.linalg.equalise_variance`), as a Hadamard matrix gives for any values.

    Args:
        values: eigenvalues ``(C,)``, float64.
    """
    rotation, exact = isotropic_rotation(len(values))
    if not exact:
        warnings.warn(
            f"no Hadamard matrix of order {len(values)}: a random rotation to equal variances is used instead",
            stacklevel=4,  # the caller of freeze
        )
        rotation = equalise_variance(rotation, values.diag())
    return rotation


def shortage(count: int, channels: int) -> str | None:
    """A message if ``count`` positions cannot span ``channels`` dimensions, else None.

    A covariance of ``n`` samples has a rank of at most ``n - 1``, so all of ``C`` eigenvalues need ``C + 1`` samples.
    """
    if count > channels:
        return None
    return (
        f"the covariance of {channels} channels was estimated from {count} positions: at least {channels + 1} are "
        "needed and many times that are better; raise `targets.estimate_images`"
    )
