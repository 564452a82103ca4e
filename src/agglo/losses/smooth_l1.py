"""Smooth L1 (Huber) distance."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from agglo.losses._reduce import Pointwise


class SmoothL1(Pointwise):
    """``d² / (2 beta)`` where ``|d| < beta``, else ``|d| - beta / 2``; mean over channels, then unmasked positions.

    AM-RADIO (arXiv:2312.06709) adds it to the cosine distance to match magnitudes.

    Args:
        beta: transition from quadratic to linear, in units of the target; 0 gives L1.

    Raises:
        ValueError: ``beta`` is negative.
    """

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__()
        if not beta >= 0:
            raise ValueError(f"beta must be at least 0, got {beta}")
        self.beta = beta

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=self.beta).mean(1)
