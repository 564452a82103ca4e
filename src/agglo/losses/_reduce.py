"""Bases of the losses: shape checks, float32, masks, and means per batch or per image."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from agglo.losses.base import Loss

# Odd multipliers of two rounds of integer mixing (a bijection of 32 bits).
_MIX = (0x9E3779B1, 0x85EBCA6B)


class Pointwise(Loss):
    """The mean of a :meth:`distance` over the unmasked positions (docs/method.md, 2.4, reduction a).

    0 if all are masked. Values at masked positions, NaN included, have no effect.
    """

    counts_positions = True

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The distance per position, ``(B, ...)``, of two float32 ``(B, D, ...)``.

        It must be finite at zero vectors, with finite gradient: masked positions are set to zero.
        """

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        values = self._values(prediction, target, mask)
        return values.sum() / max(values.numel(), 1) if mask is None else _mean(values, mask.bool()[:, 0])

    def by_image(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return _means(self._values(prediction, target, mask), None if mask is None else mask.bool()[:, 0])

    def _values(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        _check(prediction, target, mask)
        with torch.autocast(prediction.device.type, enabled=False):
            return self.distance(*_prepared(prediction, target, mask))


class Relation(Loss):
    """The mean of :meth:`relate` over the unmasked relations within groups of vectors.

    Summaries ``(B, D)`` of a batch are one group; an image's own value is the mean over its row. Of maps each
    image is a group of at most :attr:`tokens` positions, chosen pseudo-randomly from their number and the
    target: the same in all images of a batch and in repeated calls. Each rank relates its own part of the batch.

    0 if everything is masked. Values at masked positions, NaN included, have no effect.

    Attributes:
        tokens: largest number of positions per map, at least 1; does not limit summaries.
    """

    tokens: int

    @abstractmethod
    def relate(self, x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Values and their mask, both ``(G, N)`` or ``(G, N, N)``, of float32 ``x, y (G, N, D)`` and ``valid (G, N)``.

        Invalid members are zero vectors: values must be finite there, with finite gradient.
        """

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        return _mean(*self._related(prediction, target, mask))

    def by_image(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        values, counted = self._related(prediction, target, mask)
        return _means(values[0], counted[0]) if prediction.ndim == 2 else _means(values, counted)

    def _related(self, prediction: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        _check(prediction, target, mask)
        with torch.autocast(prediction.device.type, enabled=False):
            x, y = _prepared(prediction, target, mask)
            valid = torch.ones_like(y[:, 0], dtype=torch.bool) if mask is None else mask.bool()[:, 0]
            if x.ndim == 2:
                x, y, valid = x[None], y[None], valid[None]
            else:
                x, y, valid = x.flatten(2).mT, y.flatten(2).mT, valid.flatten(1)
                if x.shape[1] > self.tokens:
                    chosen = _sampled(y, self.tokens)
                    x, y, valid = x[:, chosen], y[:, chosen], valid[:, chosen]
            return self.relate(x, y, valid)


def pairs(valid: Tensor) -> Tensor:
    """Pairs ``(G, N, N)`` of two different valid members ``(G, N)``."""
    both = valid[:, :, None] & valid[:, None, :]
    return both & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)


def check_positions(positions: int) -> int:
    """Return ``positions``; raise a ValueError if there are fewer than 2."""
    if positions < 2:
        raise ValueError(f"tokens must be at least 2, got {positions}")
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
    # Masked before the distance: the gradient of a NaN that is masked afterwards is still NaN.
    return torch.where(mask.bool(), prediction, 0.0), torch.where(mask.bool(), target, 0.0)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def _means(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean per image, ``(B, ...)`` to ``(B,)``; 0 where everything is masked."""
    values = values.reshape(len(values), -1)
    if counted is None:
        return values.sum(1) / max(values.shape[1], 1)
    counted = counted.reshape(len(counted), -1)
    return torch.where(counted, values, 0.0).sum(1) / counted.sum(1).clamp(min=1)


def _sampled(target: Tensor, count: int) -> Tensor:
    """Indices of ``count`` different positions of ``(G, N, D)``, without synchronising the device."""
    # The seed is an integer sum of one channel's bits: independent of the order, and no generator is used.
    key = target[:1, :, :1].contiguous().view(torch.int32).sum(dtype=torch.int64)
    mixed = torch.arange(target.shape[1], device=target.device) + key
    for multiplier in _MIX:
        mixed = (mixed * multiplier) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 15)
    return mixed.argsort()[:count]
