"""Mean squared error."""

from __future__ import annotations

from torch import Tensor

from agglo.losses._reduce import Pointwise


class MSE(Pointwise):
    """``mean_c (x_c - y_c)²`` per position, averaged over unmasked positions.

    The dense loss of PHI-S (arXiv:2410.01680) on normalised targets, and of C-RADIOv4 (arXiv:2601.17237, eq. 1) with
    the sum over channels replaced by a mean (docs/method.md, 2.4, reduction a).
    """

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean(1)
