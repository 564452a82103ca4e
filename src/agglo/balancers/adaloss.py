"""Weights that follow the inverse of each loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agglo.balancers._weights import Weighted


class AdaLoss(Weighted):
    """``L = Σ_k w_k λ_k L_k`` with ``λ_k = c / EMA[L_k]``, so every term is worth the same (arXiv:2312.06709, E.2).

    ``c`` makes the λ of the terms seen so far sum to their number; then each is clipped, and none has a gradient. A
    term that is absent or not finite at a step leaves its average as it was; one that was never seen has λ = 1.
    AM-RADIO found it best on ImageNet and worst in segmentation: summary losses are small, so they are favoured.

    Off by default (C-RADIOv4 uses ``fixed``).

    Args:
        weights: term name to the recipe's weight, which multiplies λ.
        momentum: of the average, in [0, 1).
        clip: least and greatest λ.

    Raises:
        ValueError: ``momentum`` out of range, or ``clip`` not two positive numbers in order.
    """

    average: Tensor

    def __init__(
        self, weights: Mapping[str, float], /, *, momentum: float = 0.99, clip: tuple[float, float] = (0.2, 5.0)
    ) -> None:
        super().__init__(weights)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not 0 < clip[0] <= 1 <= clip[1]:
            raise ValueError(f"clip must be [least, greatest] with 0 < least <= 1 <= greatest, got {list(clip)}")
        self.momentum = momentum
        self.clip = clip
        self.register_buffer("average", torch.zeros(len(self.names)))  # 0: not seen yet

    def combine(
        self, terms: dict[str, Tensor], *, step: int, total: int, per_image: Mapping[str, Tensor] | None
    ) -> Tensor:
        if self.training:
            self._remember(self.values(terms))
        return self.weigh(terms, self.by_name(self.factors()))

    @torch.no_grad()
    def factors(self) -> Tensor:
        """``λ (K,)``, in the order of the positive weights."""
        seen = self.average > 0
        inverse = torch.where(seen, 1 / self.average.clamp(min=1e-12), 0.0)
        scale = seen.sum() / inverse.sum()  # NaN when nothing was seen, and then unused
        return torch.where(seen, (inverse * scale).clamp(*self.clip), 1.0)

    @torch.no_grad()
    def _remember(self, values: Tensor) -> None:
        mixed = torch.lerp(values, self.average, self.momentum)
        started = torch.where(self.average > 0, mixed, values)
        usable = values.isfinite() & (values >= 0)
        self.average.copy_(torch.where(usable, started, self.average))
