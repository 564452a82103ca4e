"""Weights that never change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from agglo.balancers.base import Balancer


class Fixed(Balancer):
    """``L = Σ_k w_k L_k`` with the recipe's weights, as in AM-RADIO (arXiv 2312.06709) and C-RADIOv4 (2601.17237).

    A term of weight 0 is left out altogether: it has no gradient, and a NaN in it does no harm.

    Args:
        weights: term name to a weight that is finite and not negative.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """

    def __init__(self, weights: Mapping[str, float], /) -> None:
        super().__init__()
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {name!r} must be finite and at least 0, got {weight}")
        if not any(weights.values()):
            raise ValueError("no term has a positive weight: there is nothing to learn")
        self.weights = {name: float(weight) for name, weight in weights.items()}

    def forward(self, terms: Mapping[str, Tensor]) -> Tensor:
        """See the base class. Terms of ``weights`` may be absent; a step without any weighed term gives 0.

        Raises:
            KeyError: a term that was not announced in ``weights``.
            ValueError: no terms at all.
        """
        if not terms:
            raise ValueError(f"no loss terms to balance; announced are {', '.join(self.weights)}")
        for name in terms:
            if name not in self.weights:
                near = get_close_matches(name, self.weights, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"announced are {', '.join(self.weights)}"
                raise KeyError(f"loss term {name!r} has no weight; {hint}")
        weighed = [self.weights[name] * term for name, term in terms.items() if self.weights[name] > 0]
        if not weighed:
            # Still something that backward() accepts.
            return next(iter(terms.values())).new_zeros((), requires_grad=torch.is_grad_enabled())
        return torch.stack(weighed).sum()
