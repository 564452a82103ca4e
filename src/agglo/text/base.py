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

    @abstractmethod
    def encode(self, texts: list[str]) -> Tensor:
        """``(N, width)`` float32 unit-norm embeddings of N sentences, in order; ``(0, width)`` for none."""
