"""Checks that every loss has to pass."""

from __future__ import annotations

import torch

from agglo.losses.base import Loss
from support.models import random_pair


def check_masked_positions_have_no_effect(loss: Loss) -> None:
    """Zeros, NaN and infinity at masked positions give equal gradients, which are zero there."""
    x, y = random_pair((2, 3, 4, 4))
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 1] = False
    grads = []
    for junk in (0.0, float("nan"), float("inf")):
        a, b = (torch.where(mask, t, junk) for t in (x, y))
        a.requires_grad_()
        loss(a, b, mask).backward()
        assert a.grad is not None
        grads.append(a.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    assert torch.equal(grads[0][0, :, 1], torch.zeros(3, 4)) and grads[0].abs().sum() > 0
