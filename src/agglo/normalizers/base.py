"""The contract of a normalizer: an affine map to targets of comparable scale (PHI-S; docs/method.md, 2.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Normalizer(nn.Module, ABC):
    """``y_hat = whiten (y - mean)`` per position; fitted before training, then frozen.

    A kind's constructor takes ``channels`` positionally. Use: ``update`` on batches, ``freeze`` once, then ``forward``.
    The float32 buffers ``mean (C,)``, ``whiten (C, C)``, ``unwhiten (C, C)`` and ``frozen ()`` are part of a run's
    state.
    """

    channels: int
    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor
    needs_statistics: bool = True

    @abstractmethod
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Accumulate float64 statistics of ``(B, C, H, W)`` where ``mask (B, 1, H, W)`` is True."""

    @abstractmethod
    def freeze(self) -> None:
        """Compute the map from the statistics and discard them.

        Raises:
            RuntimeError: called twice, or before any update.
        """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Teacher space to normalised space, ``(B, C, H, W)`` to the same shape, in float32 with autocast off.

        Raises:
            RuntimeError: not frozen yet.
        """

    @abstractmethod
    def inverse(self, features: Tensor) -> Tensor:
        """Normalised space back to teacher space, ``(B, C, H, W)``."""
