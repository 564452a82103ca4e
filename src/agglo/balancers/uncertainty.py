"""Weights learned as uncertainties."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from agglo.balancers._weights import Weighted


class Uncertainty(Weighted):
    """``L = Σ_k w_k (e^{-b_k} L_k + softplus(b_k))`` with a learned ``b_k`` per term (AM-RADIO, arXiv:2312.06709, E.1).

    ``b = log σ²``. Softplus replaces the ``b / 2`` of Kendall et al. (arXiv:1705.07115), so that weights above 1 are
    not rewarded. At the optimum ``λ = e^{-b}`` solves ``L λ² + L λ = 1``: large losses get smaller weights.

    In AM-RADIO the student predicts ``b`` per image; here it is one parameter per term, starting at 0 (λ = 1), to be
    optimised without weight decay. The scalar includes the softplus terms and is not comparable with that of other
    balancers. C-RADIOv4 uses ``fixed``.

    Args:
        weights: term name to the recipe's weight; it multiplies both parts, which leaves the optimum of b unchanged.
    """

    def __init__(self, weights: Mapping[str, float], /) -> None:
        super().__init__(weights)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def combine(
        self, terms: dict[str, Tensor], *, step: int, total: int, per_image: Mapping[str, Tensor] | None
    ) -> Tensor:
        learned = self.by_name(self.log_variance)
        return self.weigh(
            {
                name: torch.exp(-learned[name]) * term + nn.functional.softplus(learned[name])
                for name, term in terms.items()
            }
        )
