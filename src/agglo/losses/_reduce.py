"""What every loss shares: checks, float32, masks, and the mean over what counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Odd multipliers of two rounds of integer mixing (a bijection of 32 bits).
_MIX = (0x9E3779B1, 0x85EBCA6B)


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
    _check(prediction, target, mask)
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target = _prepared(prediction, target, mask)
        values = distance(prediction, target)
        if mask is None:
            return values.sum() / max(values.numel(), 1)
        return _mean(values, mask.bool()[:, 0])


def masked_relation(
    relation: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None,
    positions: int,
) -> Tensor:
    """Mean of what ``relation`` says of vectors that belong together, over the entries that count.

    Of summaries ``(B, D)`` the whole batch is one group of B members; of maps ``(B, D, H, W)`` every image is a group,
    of at most ``positions`` of its positions. Which positions is a pseudo-random function of their number and of the
    target: the same call always takes the same, the next batch others, the same ones in all of its images.

    Args:
        relation: float32 ``x (G, N, D)``, ``y (G, N, D)`` and ``valid (G, N)`` to values and which of them count, both
            ``(G, N)`` or ``(G, N, N)``; members that are not valid are zero vectors. Must be finite at zero vectors,
            with finite gradient.
        prediction: ``(B, D)`` or ``(B, D, H, W)``.
        target: the same shape; detached here.
        mask: as in :func:`masked_mean`.
        positions: at least 1; does not limit summaries.

    Returns:
        Float32 scalar, 0 where nothing counts. Whatever a masked position holds, NaN included, has no effect.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check(prediction, target, mask)
    with torch.autocast(prediction.device.type, enabled=False):
        x, y = _prepared(prediction, target, mask)
        valid = torch.ones_like(y[:, 0], dtype=torch.bool) if mask is None else mask.bool()[:, 0]
        if x.ndim == 2:
            x, y, valid = x[None], y[None], valid[None]
        else:
            x, y, valid = x.flatten(2).mT, y.flatten(2).mT, valid.flatten(1)
            if x.shape[1] > positions:
                taken = _sampled(y, positions)
                x, y, valid = x[:, taken], y[:, taken], valid[:, taken]
        return _mean(*relation(x, y, valid))


def pairs(valid: Tensor) -> Tensor:
    """``(G, N)`` members that count to ``(G, N, N)`` pairs of two different ones that do."""
    both = valid[:, :, None] & valid[:, None, :]
    return both & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)


def check_positions(positions: int) -> int:
    """The number itself.

    Raises:
        ValueError: fewer than 2: one position has no relations.
    """
    if positions < 2:
        raise ValueError(f"tokens must be at least 2, got {positions}: one position has no relations")
    return positions


def _check(prediction: Tensor, target: Tensor, mask: Tensor | None) -> None:
    shape = tuple(prediction.shape)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {shape} and target {tuple(target.shape)} differ in shape")
    if prediction.ndim not in (2, 4):
        raise ValueError(f"expected (B, D) or (B, D, H, W), got {shape}")
    if mask is not None and mask.shape != (shape[0], 1, *shape[2:]):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit {shape}: it must be {(shape[0], 1, *shape[2:])}")


def _prepared(prediction: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in float32, the target detached, zeros where masked."""
    prediction, target = prediction.float(), target.detach().float()
    if mask is None:
        return prediction, target
    # Before the distance and not after it: the gradient of a discarded NaN is still NaN.
    return torch.where(mask.bool(), prediction, 0.0), torch.where(mask.bool(), target, 0.0)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def _sampled(target: Tensor, count: int) -> Tensor:
    """``count`` different positions of ``(G, N, D)``, as indices, without waiting for the device."""
    # The bits of one channel, added as integers: exact in any order, and drawing from no generator.
    key = target[:1, :, :1].contiguous().view(torch.int32).sum(dtype=torch.int64)
    mixed = torch.arange(target.shape[1], device=target.device) + key
    for multiplier in _MIX:
        mixed = (mixed * multiplier) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 15)
    return mixed.argsort()[:count]
