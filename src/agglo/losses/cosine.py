"""Cosine distance."""

from __future__ import annotations

from torch import Tensor

from agglo.losses._reduce import Pointwise
from agglo.nn.linalg import unit


class Cosine(Pointwise):
    """``1 - cos(x, y)``, the summary loss of AM-RADIO (arXiv:2312.06709); range [0, 2], scale-invariant.

    Computed as ``||x/|x| - y/|y|||² / 2``, which is exactly 0 at equality. A zero vector gets no gradient.
    """

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (unit(prediction) - unit(target)).square().sum(1) / 2
