"""Shift-equivariant MESA: agree with the averaged student's view of the same place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from agglo.losses._reduce import Pointwise


class SeMesa(Pointwise):
    """``mean_c (LN(F)_c - LN(F~)_c)^2`` a position, ``LN`` a layer norm over channels without affine part.

    ``F`` is the student's map, ``F~`` the averaged student's of another crop, brought onto common cells before
    (C-RADIOv4, arXiv:2601.17237, eq. 2; Du et al. 2022, "Sharpness-aware training for free", arXiv:2205.14083). What is
    locked to a position in the view, and not to the content, cannot agree between the two crops.
    """

    def __init__(self) -> None:
        super().__init__()

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See the base class. Blind to each position's mean and scale."""
        return (_norm(prediction) - _norm(target)).square().mean(1)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1)
