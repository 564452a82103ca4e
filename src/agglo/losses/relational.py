"""Relational distillation: pairwise distances within a batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from agglo.losses._reduce import Relation, check_positions, pairs
from agglo.nn.linalg import unit

Metric = Literal["euclidean", "angle"]


class Relational(Relation):
    """Penalises pairwise distances that change in the unwanted direction (ARKD).

    Asymmetric relational knowledge distillation of SigLino (arXiv:2512.20157; docs/method.md, 8.2).

    With ``T_ij`` and ``S_ij`` the pairwise distances of the teacher's and the student's vectors, each divided by its
    mean over the pairs ``i != j`` (Park et al. 2019, Relational Knowledge Distillation, arXiv:1904.05068),
    ``m`` the median of ``T`` and ``h`` smooth L1::

        L = 1 / (N (N - 1)) sum_{i != j} [ T_ij < m ] h(max(S_ij - T_ij, 0)) + [ T_ij >= m ] h(max(T_ij - S_ij, 0))

    Pairs that are near in the teacher may move closer and far ones apart; only the opposite is penalised. Without
    ``asymmetric`` this is RKD's distance loss, the mean of ``h(S_ij - T_ij)``. Both are invariant to translation, scale
    and rotation: combine them with a loss on the features themselves.

    Vectors are the summaries of this rank's batch, or the positions of one image (with its own mean and median). The
    loss of fewer than three vectors is 0, because the normalised distance of two is 1.

    Args:
        asymmetric: ARKD; False gives RKD.
        metric: ``euclidean`` or ``angle``, the angle between two vectors (for teachers read by cosine).
        beta: transition from quadratic to linear in smooth L1, in mean distances; 0 gives L1.
        tokens: largest number of positions compared per map.

    Raises:
        ValueError: ``beta`` is negative, or fewer than 2 tokens.
    """

    def __init__(
        self, *, asymmetric: bool = True, metric: Metric = "euclidean", beta: float = 1.0, tokens: int = 256
    ) -> None:
        super().__init__()
        if not beta >= 0:
            raise ValueError(f"beta must be at least 0, got {beta}")
        self.asymmetric, self.metric, self.beta = asymmetric, metric, beta
        self.tokens = check_positions(tokens)

    def relate(self, x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty per pair, ``(G, N, N)``."""
        counted = pairs(valid)
        student, teacher = (_relative(self._distances(t, valid), counted) for t in (x, y))
        excess = student - teacher
        if self.asymmetric:
            known = torch.where(counted, teacher, float("nan")).flatten(1)
            near = teacher < known.nanmedian(dim=1).values[:, None, None]  # all False without pairs
            excess = torch.where(near, excess, -excess).clamp(min=0)
        return F.smooth_l1_loss(excess, torch.zeros_like(excess), reduction="none", beta=self.beta), counted

    def _distances(self, x: Tensor, valid: Tensor) -> Tensor:
        """``(G, N, D)`` to ``(G, N, N)``; the gradient of a distance of 0 is 0."""
        if self.metric == "angle":
            x = unit(x, dim=2)
        else:
            # Centred, to reduce cancellation in the differences of squares below.
            number = valid.sum(1).clamp(min=1)[:, None, None]
            x = torch.where(valid[..., None], x - x.sum(1, keepdim=True) / number, 0.0)
        gram = x @ x.mT
        squares = gram.diagonal(dim1=1, dim2=2)
        distance = _root(squares[:, :, None] + squares[:, None, :] - 2 * gram)
        if self.metric == "euclidean":
            return distance
        # As in the angular loss: exact for small angles, unlike arccos.
        return 2 * torch.atan2(distance, _root(squares[:, :, None] + squares[:, None, :] + 2 * gram))


def _relative(distances: Tensor, counted: Tensor) -> Tensor:
    """Distances divided by their mean; 0 if the mean is 0."""
    mean = torch.where(counted, distances, 0.0).sum((1, 2), keepdim=True)
    mean = mean / counted.sum((1, 2), keepdim=True).clamp(min=1)
    return torch.where(mean > 1e-8, distances / mean.clamp(min=1e-8), 0.0)


def _root(squared: Tensor) -> Tensor:
    """Square root, 0 with gradient 0 for values at or, by rounding, below 0."""
    positive = squared > 1e-12
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
