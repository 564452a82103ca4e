"""Constant weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from agglo.balancers._weights import Weighted


class Fixed(Weighted):
    """``L = Σ_k w_k L_k`` with the recipe's weights, as in AM-RADIO (arXiv:2312.06709) and C-RADIOv4 (2601.17237).

    A term of weight 0 is left out: it has no gradient, and a NaN in it has no effect.

    Args:
        weights: term name to a finite weight of at least 0.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """

    def combine(
        self, terms: dict[str, Tensor], *, step: int, total: int, per_image: Mapping[str, Tensor] | None
    ) -> Tensor:
        return self.weigh(terms)
