"""The exponential moving average of a model: what is evaluated and exported."""

from __future__ import annotations

import copy

import torch
from torch import nn


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
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model`` after optimiser step ``step`` (from 0)."""
        if self.decay == 0:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
