"""Weights that are learned as uncertainties."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from agglo.balancers._weights import Weighted


class Uncertainty(Weighted):
    """``L = Σ_k w_k (e^{-b_k} L_k + softplus(b_k))`` with a learned ``b_k`` a term (arXiv:2312.06709, E.1).

    ``b = log σ²``. Kendall et al. (arXiv:1705.07115) add ``b / 2``; softplus takes its place so that weights above 1
    are not rewarded. At the optimum ``λ = e^{-b}`` solves ``L λ² + L λ = 1``: large losses count less.

    AM-RADIO lets the student predict ``b`` for each image; here it is one number a term, which needs no further head
    and is the same idea. ``b`` starts at 0 (λ = 1), is a parameter of this module and must reach the optimizer,
    without weight decay. The scalar holds the softplus terms: it is not comparable with that of other balancers.

    Off by default (C-RADIOv4 uses ``fixed``).

    Args:
        weights: term name to the recipe's weight; it multiplies both parts, so that it does not move the optimum of b.
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
