"""The exponential moving average of a model: what is evaluated and exported."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """``w_ema <- d w_ema + (1 - d) w`` with ``d = min(decay, (1 + step) / (10 + step))``.

    The ramp lets a short run average over its own length instead of remembering its first weights. Buffers (running
    statistics) are copied, not averaged. With ``decay == 0`` the average is the model itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval() if decay > 0 else model

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Forget the past: become a copy of ``model``."""
        if self.decay:
            self.model.load_state_dict(model.state_dict())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, good: Tensor | None = None) -> None:
        """Move towards ``model`` after optimiser step ``step`` (from 0).

        Args:
            model: what is averaged.
            step: which.
            good: bool scalar on the model's device; where it is False nothing moves, and nobody waits to find out.
        """
        if self.decay == 0:
            return
        pace: float | Tensor = 1 - min(self.decay, (1 + step) / (10 + step))
        if good is not None:
            pace = pace * good
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, pace)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs if good is None else torch.where(good, theirs, mine))
