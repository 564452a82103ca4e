"""The contract of a text tower: sentences to unit vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from agglo.files import printable
from agglo.types import ConfigError


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
            TypeError: ``texts`` is one string, or holds something else than strings.
            ConfigError: a sentence is not valid Unicode.
        """


def check_texts(texts: list[str]) -> None:
    """Raise what :meth:`TextTower.encode` states for an argument that is not a list of sentences."""
    if isinstance(texts, str):
        raise TypeError("encode takes a list of sentences, not one string: encode([text])")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"sentence {index} is {type(text).__name__}, not a string")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"sentence {index} ({printable(text[:60])}) is not valid Unicode: pass UTF-8") from None
