"""The contract of a source: a finite, indexable collection of images."""

from __future__ import annotations

from abc import ABC, abstractmethod

from PIL import Image


class Source(ABC):
    """Images by index. Reading the same index twice gives the same pixels. Picklable; safe in several threads."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A stable name for people and for hashes (a path, ``photos/coffee``, ``scenes/s0003/v1``)."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The image, decoded, upright, 8-bit RGB.

        Raises:
            ImageError: it cannot be read; the caller skips, counts and names it.
        """
