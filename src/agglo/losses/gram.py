"""Difference of Gram matrices: the similarities between the tokens of an image."""

from __future__ import annotations

from torch import Tensor

from agglo.losses._reduce import Relation, check_positions
from agglo.nn.linalg import unit


class Gram(Relation):
    """``1/N² ||X X^T - Y Y^T||_F²``, the Gram anchoring of DINOv3 (arXiv:2508.10104, section 4.2).

    The rows of X and Y are the L2-normalised tokens of an image (of summaries: of the batch). Invariant to scale and
    rotation of the features. Masked tokens are left out of the matrix and of the mean.

    Args:
        tokens: largest number of positions compared per map; 512 give matrices of 1 MB per image.

    Raises:
        ValueError: fewer than 2 tokens.
    """

    def __init__(self, *, tokens: int = 512) -> None:
        super().__init__()
        self.tokens = check_positions(tokens)

    def relate(self, x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Squared differences of the Gram matrices ``(G, N, N)``; 0 for a single token."""
        x, y = unit(x, dim=2), unit(y, dim=2)
        return (x @ x.mT - y @ y.mT).square(), valid[:, :, None] & valid[:, None, :]
