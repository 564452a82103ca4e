"""What every loss shares: checks, float32, and the mean over valid positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def masked_mean(
    distance: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor, mask: Tensor | None
) -> Tensor:
    """Mean of ``distance`` over the positions that count: masked sum over their number (METHOD 2.4, reduction a).

    Args:
        distance: float32 ``(B, D, ...)`` twice to a distance a position ``(B, ...)``; must be finite at zero vectors,
            with finite gradient.
        prediction: ``(B, D)`` or ``(B, D, H, W)``.
        target: the same shape; detached here.
        mask: ``(B, 1)`` or ``(B, 1, H, W)``, True where the position counts; None: all do.

    Returns:
        Float32 scalar, 0 where no position counts. Whatever a masked position holds, NaN included, has no effect.

    Raises:
        ValueError: the shapes do not fit together.
    """
    shape = tuple(prediction.shape)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {shape} and target {tuple(target.shape)} differ in shape")
    if prediction.ndim not in (2, 4):
        raise ValueError(f"expected (B, D) or (B, D, H, W), got {shape}")
    if mask is not None and mask.shape != (shape[0], 1, *shape[2:]):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit {shape}: it must be {(shape[0], 1, *shape[2:])}")
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = prediction.float(), target.detach().float()
        if mask is not None:
            mask = mask.bool()
            # Before the distance and not after it: the gradient of a discarded NaN is still NaN.
            prediction, target = torch.where(mask, prediction, 0.0), torch.where(mask, target, 0.0)
        values = distance(prediction, target)
        if mask is None:
            return values.sum() / max(values.numel(), 1)
        valid = mask[:, 0]
        return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
