"""The difference of Gram matrices: how alike the tokens of an image are to one another."""

from __future__ import annotations

from torch import Tensor

from agglo.losses._reduce import Relation, check_positions
from agglo.nn.linalg import unit


class Gram(Relation):
    """``1/N² ||X X^T - Y Y^T||_F²``, the Gram anchoring of DINOv3 (arXiv:2508.10104, section 4.2).

    The rows of X and Y are the L2-normalised tokens of an image (of summaries: of the batch). Only cosines between
    tokens count, so any rotation of the features, and any length, costs nothing: the loss keeps the relations of dense
    features and leaves the features free. Masked tokens leave the matrix; the mean is over the entries that remain.

    Args:
        tokens: positions of a map that are compared, drawn where there are more; 512 make matrices of 1 MB an image.

    Raises:
        ValueError: fewer than 2 tokens.
    """

    def __init__(self, *, tokens: int = 512) -> None:
        super().__init__()
        self.tokens = check_positions(tokens)

    def relate(self, x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Squared differences of the Gram matrices ``(G, N, N)``; 0 wherever all cosines agree, so for one token."""
        x, y = unit(x, dim=2), unit(y, dim=2)
        return (x @ x.mT - y @ y.mT).square(), valid[:, :, None] & valid[:, None, :]
