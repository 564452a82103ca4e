"""Base of the balancers: the recipe's weights, the active terms, and the weighted sum."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from agglo import dist
from agglo.balancers.base import Balancer


class Weighted(Balancer):
    """Checks terms against the recipe's weights and passes those of positive weight to a kind's :meth:`combine`.

    A term of weight 0 is left out: it has no gradient, and a NaN in it has no effect.

    Args:
        weights: term name to a finite weight of at least 0.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """

    def __init__(self, weights: Mapping[str, float], /) -> None:
        super().__init__()
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {name!r} must be finite and at least 0, got {weight}")
        if not any(weights.values()):
            raise ValueError("all loss weights are 0: at least one must be positive")
        self.weights = {name: float(weight) for name, weight in weights.items()}
        # The order of a kind's per-term buffers.
        self.names = tuple(name for name, weight in self.weights.items() if weight > 0)
        self._shares: Mapping[str, float] = {}  # of the current call

    def forward(
        self,
        terms: Mapping[str, Tensor],
        *,
        step: int = 0,
        total: int = 1,
        per_image: Mapping[str, Tensor] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> Tensor:
        """See the base class. A step without a term of positive weight gives 0.

        Raises:
            KeyError: a term is not in ``weights``.
            ValueError: there are no terms.
        """
        if not terms:
            raise ValueError(f"no loss terms to balance; expected are {', '.join(self.weights)}")
        for name in terms:
            if name not in self.weights:
                raise KeyError(f"loss term {name!r} has no weight; {nearest(name, self.weights)}")
        active = {name: terms[name] for name in self.names if name in terms}
        if not active:
            return self.zero(terms)
        self._shares = shares or {}
        return self.combine(active, step=step, total=total, per_image=per_image)

    @abstractmethod
    def combine(
        self, terms: dict[str, Tensor], *, step: int, total: int, per_image: Mapping[str, Tensor] | None
    ) -> Tensor:
        """The scalar to minimise from at least one term, all of positive weight, in the order of ``names``."""

    def zero(self, terms: Mapping[str, Tensor]) -> Tensor:
        """A scalar 0 on which backward() can be called."""
        return next(iter(terms.values())).new_zeros((), requires_grad=torch.is_grad_enabled())

    def weigh(self, terms: Mapping[str, Tensor], factors: Mapping[str, Tensor | float] | None = None) -> Tensor:
        """``Σ_k s_k w_k f_k L_k``; factors ``f_k`` and shares ``s_k`` are 1 by default."""
        weights = {name: self.weights[name] * self._shares.get(name, 1.0) for name in terms}
        if factors is None:
            return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return torch.stack([weights[name] * factors[name] * term for name, term in terms.items()]).sum()

    def values(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Terms as one detached float32 vector in the order of ``names``, averaged over ranks; NaN where absent."""
        absent = next(iter(terms.values())).new_full((), float("nan"), dtype=torch.float32)
        mine = torch.stack([terms[name].detach().float() if name in terms else absent for name in self.names])
        return dist.average(mine)

    def by_name(self, factors: Tensor) -> dict[str, Tensor]:
        """Split a vector in the order of ``names`` into scalars by name."""
        return dict(zip(self.names, factors.unbind(), strict=True))


def teacher_of(term: str) -> str | None:
    """The teacher of a term, None for a term without one."""
    teacher, slash, _ = term.partition("/")
    return teacher if slash else None


def nearest(name: str, known: Mapping[str, object]) -> str:
    """A suggestion for an unknown name: the closest known one, or all of them."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
