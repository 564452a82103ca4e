"""The contract of a normalizer: an affine map that puts a teacher's features on common footing (docs/method.md, 2.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Normalizer(nn.Module, ABC):
    """``y_hat = forward_matrix (y - mean)`` per position; fitted on a pre-pass, then frozen.

    A kind's constructor takes ``channels`` positionally. Use: ``update`` on batches, ``freeze`` once, then ``forward``.

    Buffers (float32, saved with a run's state, zero-cost to load): ``mean (C,)``, ``whiten (C, C)``,
    ``unwhiten (C, C)``, ``frozen ()`` bool.
    """

    channels: int
    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor
    needs_statistics: bool = True

    @abstractmethod
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Accumulate statistics in float64 of ``(B, C, H, W)``, only where ``mask (B, 1, H, W)`` is True."""

    @abstractmethod
    def freeze(self) -> None:
        """Turn the statistics into the map and forget them.

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
