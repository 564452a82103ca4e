"""Exponential moving average of a model's weights, which is evaluated and exported."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """``w_ema <- d w_ema + (1 - d) w`` with ``d = min(decay, (1 + step) / (10 + step))``.

    The ramp keeps the initial weights out of the average of a short run. Buffers (running statistics) are copied, not
    averaged. With ``decay == 0`` the average is the model itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval() if decay > 0 else model

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Copy the state of ``model``."""
        if self.decay:
            self.model.load_state_dict(model.state_dict())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, good: Tensor | None = None) -> None:
        """Update from ``model`` after optimiser step ``step`` (from 0).

        Args:
            model: the trained model.
            step: index of the step.
            good: bool scalar on the model's device; if False nothing changes. It is not synchronised.
        """
        if self.decay == 0:
            return
        pace: float | Tensor = 1 - min(self.decay, (1 + step) / (10 + step))
        if good is not None:
            pace = pace * good
        for average, current in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(current, pace)
        for average, current in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(current if good is None else torch.where(good, current, average))
