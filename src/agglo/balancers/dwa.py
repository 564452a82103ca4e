"""Weights by the rate at which each loss falls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agglo.balancers._weights import Weighted


class Dwa(Weighted):
    """Dynamic weight averaging: terms that fall slowly get larger weights (Liu, Johns and Davison, arXiv:1803.10704).

    Losses are averaged over windows of ``every`` steps. With the mean loss ``L_k(t)`` of window ``t`` and ``K`` terms::

        L = Σ_k w_k λ_k L_k,    λ_k = K softmax_k(r_k / T),    r_k = L_k(t - 1) / L_k(t - 2)

    ``r_k`` is 1 until two windows are complete, and for a term that is absent from one. Values that are not finite are
    left out of the means. Without ``step`` all λ are 1. C-RADIOv4 uses ``fixed``.

    Args:
        weights: term name to the recipe's weight, which multiplies λ.
        every: steps per window; an epoch in the paper.
        temperature: ``T``, positive; large values make all λ close to 1.

    Raises:
        ValueError: ``every`` is less than 1, or ``temperature`` is not positive.
    """

    sums: Tensor
    counts: Tensor
    last: Tensor
    before: Tensor
    window: Tensor

    def __init__(self, weights: Mapping[str, float], /, *, every: int = 1000, temperature: float = 2.0) -> None:
        super().__init__(weights)
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.every = every
        self.temperature = temperature
        for name in ("sums", "counts", "last", "before"):  # last, before: mean losses of windows, 0 if unknown
            self.register_buffer(name, torch.zeros(len(self.names)))
        self.register_buffer("window", torch.tensor(-1))
        self._window: int | None = -1  # host copy of the buffer; None: not read yet

    def combine(
        self, terms: dict[str, Tensor], *, step: int, total: int, per_image: Mapping[str, Tensor] | None
    ) -> Tensor:
        if self.training:
            self._roll(step // self.every)
            self._update(self.values(terms))
        return self.weigh(terms, self.by_name(self.factors()))

    @torch.no_grad()
    def factors(self) -> Tensor:
        """``λ (K,)``, in the order of the positive weights; their sum is ``K``."""
        known = (self.last > 0) & (self.before > 0)
        ratio = torch.where(known, self.last / self.before.clamp(min=1e-12), 1.0)
        return len(self.names) * torch.softmax(ratio / self.temperature, dim=0)

    @torch.no_grad()
    def _roll(self, window: int) -> None:
        """Close the current window if the step is in another one."""
        if self._window is None:
            self._window = int(self.window)
        if window == self._window:
            return
        if self._window >= 0:
            self.before.copy_(self.last)
            self.last.copy_(self.sums / self.counts.clamp(min=1))
            self.sums.zero_()
            self.counts.zero_()
        self._window = window
        self.window.fill_(window)

    @torch.no_grad()
    def _update(self, values: Tensor) -> None:
        usable = values.isfinite()
        self.sums += torch.where(usable, values, 0.0)
        self.counts += usable

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._window = None
