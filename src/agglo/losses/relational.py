"""Relational distillation: the geometry of a batch, not its points."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from agglo.losses._reduce import Relation, check_positions, pairs
from agglo.nn.linalg import unit

Metric = Literal["euclidean", "angle"]


class Relational(Relation):
    """Distances between samples, compared with the teacher's in the direction that does harm (ARKD).

    Asymmetric relational knowledge distillation of SigLino (arXiv:2512.20157; docs/method.md, 8.2).

    With ``T_ij`` and ``S_ij`` the pairwise distances of the teacher's and the student's vectors, each divided by its
    mean over the pairs ``i != j`` (Park et al. 2019, Relational Knowledge Distillation, arXiv:1904.05068, eq. 4-6),
    ``m`` the median of ``T`` and ``h`` smooth L1::

        L = 1 / (N (N - 1)) sum_{i != j} [ T_ij < m ] h(max(S_ij - T_ij, 0)) + [ T_ij >= m ] h(max(T_ij - S_ij, 0))

    What is near in the teacher may come nearer, what is far may go farther; only the opposite costs. Without
    ``asymmetric`` this is RKD's distance loss, the mean of ``h(S_ij - T_ij)``. Both ignore position, scale and any
    rotation of the vectors, and the asymmetric loss is 0 for much else: use them beside a loss that has a target.

    The vectors are the summaries of this device's batch, or the positions of one image (mean and median are then the
    image's own). Two vectors make one distance, which is 1 after the division: at least three have something to say.

    Args:
        asymmetric: ARKD; False gives RKD.
        metric: ``euclidean`` or ``angle``, the angle between two vectors (for teachers read by cosine).
        beta: where smooth L1's square turns into a line, in mean distances; 0 gives L1.
        tokens: positions of a map that are compared, drawn where there are more.

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
        """A penalty a pair ``(G, N, N)``; 0 where no distance is worse than the teacher's, so for two vectors."""
        counted = pairs(valid)
        student, teacher = (_relative(self._distances(t, valid), counted) for t in (x, y))
        excess = student - teacher
        if self.asymmetric:
            known = torch.where(counted, teacher, float("nan")).flatten(1)
            near = teacher < known.nanmedian(dim=1).values[:, None, None]  # all False where no pair counts
            excess = torch.where(near, excess, -excess).clamp(min=0)
        return F.smooth_l1_loss(excess, torch.zeros_like(excess), reduction="none", beta=self.beta), counted

    def _distances(self, x: Tensor, valid: Tensor) -> Tensor:
        """``(G, N, D)`` to ``(G, N, N)``; where a distance is 0, so is its gradient."""
        if self.metric == "angle":
            x = unit(x, dim=2)
        else:
            # Around their mean, where the differences of squares below lose the least.
            number = valid.sum(1).clamp(min=1)[:, None, None]
            x = torch.where(valid[..., None], x - x.sum(1, keepdim=True) / number, 0.0)
        gram = x @ x.mT
        squares = gram.diagonal(dim1=1, dim2=2)
        apart = _root(squares[:, :, None] + squares[:, None, :] - 2 * gram)
        if self.metric == "euclidean":
            return apart
        # As in the angular loss: exact for small angles, where arccos is not.
        return 2 * torch.atan2(apart, _root(squares[:, :, None] + squares[:, None, :] + 2 * gram))


def _relative(distances: Tensor, counted: Tensor) -> Tensor:
    """Distances over their mean; 0 where the mean is."""
    mean = torch.where(counted, distances, 0.0).sum((1, 2), keepdim=True)
    mean = mean / counted.sum((1, 2), keepdim=True).clamp(min=1)
    return torch.where(mean > 1e-8, distances / mean.clamp(min=1e-8), 0.0)


def _root(squared: Tensor) -> Tensor:
    """The root of what rounding may have made negative, with gradient 0 at 0 and below."""
    positive = squared > 1e-12
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
