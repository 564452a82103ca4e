"""Weights proportional to the inverse of each loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agglo.balancers._weights import Weighted


class AdaLoss(Weighted):
    """``L = Σ_k w_k λ_k L_k`` with ``λ_k = c / EMA[L_k]``, so all terms contribute equally (AM-RADIO, arXiv:2312.06709,
    E.2).

    ``c`` makes the λ of the terms with an average sum to their number; each is then clipped, without gradient. A term
    that is absent or not finite does not update its average; one without average has λ = 1. In AM-RADIO's ablation best
    on ImageNet and worst in segmentation, because it favours the small summary losses. C-RADIOv4 uses ``fixed``.

    Args:
        weights: term name to the recipe's weight, which multiplies λ.
        momentum: of the average, in [0, 1).
        clip: smallest and largest λ.

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
            raise ValueError(f"clip must be [low, high] with 0 < low <= 1 <= high, got {list(clip)}")
        self.momentum = momentum
        self.clip = clip
        self.register_buffer("average", torch.zeros(len(self.names)))  # 0: no value yet

    def combine(
        self, terms: dict[str, Tensor], *, step: int, total: int, per_image: Mapping[str, Tensor] | None
    ) -> Tensor:
        if self.training:
            self._update(self.values(terms))
        return self.weigh(terms, self.by_name(self.factors()))

    @torch.no_grad()
    def factors(self) -> Tensor:
        """``λ (K,)``, in the order of the positive weights."""
        seen = self.average > 0
        inverse = torch.where(seen, 1 / self.average.clamp(min=1e-12), 0.0)
        scale = seen.sum() / inverse.sum()  # NaN, and unused, while there are none
        return torch.where(seen, (inverse * scale).clamp(*self.clip), 1.0)

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        mixed = torch.lerp(values, self.average, self.momentum)
        started = torch.where(self.average > 0, mixed, values)
        usable = values.isfinite() & (values >= 0)
        self.average.copy_(torch.where(usable, started, self.average))
