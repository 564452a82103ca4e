"""Shift-equivariant MESA: match the EMA student's features of another crop."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from agglo.losses._reduce import Pointwise


class SeMesa(Pointwise):
    """``mean_c (LN(F)_c - LN(F~)_c)^2`` per position, ``LN`` a layer norm over channels without affine part.

    ``F`` is the student's map, ``F~`` the EMA student's map of another crop, resampled to common cells (C-RADIOv4,
    arXiv:2601.17237, eq. 2; Du et al. 2022, "Sharpness-aware training for free", arXiv:2205.14083). Patterns fixed to
    positions in the view instead of the content differ between the crops and are penalised.
    """

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See the base class. Invariant to each position's mean and scale over channels."""
        return (_norm(prediction) - _norm(target)).square().mean(1)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1)
