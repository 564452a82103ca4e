"""The contract of a text tower: sentences to unit vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class TextTower(nn.Module, ABC):
    """A frozen sentence encoder.

    Attributes:
        width: D, the length of an embedding.
        licence: licence of the weights.
    """

    width: int
    licence: str = ""

    def train(self, mode: bool = True) -> TextTower:
        """Stay in eval mode: no dropout."""
        del mode
        return super().train(False)

    @abstractmethod
    def encode(self, texts: list[str]) -> Tensor:
        """Float32 unit-norm embeddings ``(N, width)`` of N sentences, in order.

        Raises:
            TypeError: ``texts`` is one string.
        """
