"""Sources derived from another source: windows of its images, or transformed images."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from agglo.evals._probe import truth_of
from agglo.preprocess import stretch
from agglo.sources.base import Source
from agglo.types import ConfigError, ImageError


class Window(NamedTuple):
    """A window of a scaled image.

    Args:
        image: index in the source.
        box: ``xyxy`` in pixels of the scaled image.
        scaled: ``(H, W)`` of the scaled image.
        full: ``(H, W)`` of the original image.
    """

    image: int
    box: tuple[int, int, int, int]
    scaled: tuple[int, int]
    full: tuple[int, int]


Read = Callable[[int], Image.Image]
"""Reads an image by its index (:meth:`agglo.sources.base.Source.read`)."""


class Windows(Source):
    """Overlapping windows that cover each image after scaling its shorter side to ``short``.

    Args:
        source: the images.
        crop: ``(H, W)`` of a window in pixels.
        stride: in pixels; the last window of a row ends at the border.
        short: shorter side of the scaled image in pixels.
        read: reads an image of the source by its index; ``source.read`` when None.

    Raises:
        ConfigError: windows larger than the scaled image, or with gaps between them.
    """

    def __init__(
        self, source: Source, crop: tuple[int, int], stride: int, short: int, read: Read | None = None
    ) -> None:
        if not 1 <= stride <= min(crop):
            raise ConfigError(f"windows of {crop[0]}x{crop[1]} pixels need a stride of 1 to {min(crop)}, got {stride}")
        if short < max(crop):
            raise ConfigError(f"short {short} is less than a window of {crop[0]}x{crop[1]}; use at least {max(crop)}")
        self.source = source
        self._read = read or source.read
        self.windows: list[Window] = []
        self._last: tuple[int, Image.Image] | None = None
        for i in range(len(source)):
            try:
                image = self._read(i)
            except ImageError:
                self.windows.append(Window(i, (0, 0, crop[1], crop[0]), crop, crop))  # read() raises and names it
                continue
            scale, full = short / min(image.size), (image.height, image.width)
            size = max(crop[0], round(image.height * scale)), max(crop[1], round(image.width * scale))
            for y in _starts(size[0], crop[0], stride):
                for x in _starts(size[1], crop[1], stride):
                    self.windows.append(Window(i, (x, y, x + crop[1], y + crop[0]), size, full))

    def __len__(self) -> int:
        return len(self.windows)

    def name(self, index: int) -> str:
        window = self.windows[index]
        return f"{self.source.name(window.image)}@{window.box[0]},{window.box[1]}"

    def read(self, index: int) -> Image.Image:
        window = self.windows[index]
        last = self._last
        if last is None or last[0] != window.image:  # windows of one image are read in a row
            last = window.image, stretch(self._read(window.image), window.scaled)
            self._last = last
        return last[1].crop(window.box)

    def annotation(self, index: int) -> SimpleNamespace:
        """``semantic`` of the window, sampled from the full mask by nearest neighbours.

        Raises:
            ConfigError: the size of the mask differs from the image's.
        """
        window = self.windows[index]
        mask = truth_of(self.source, window.image, "semantic", window.full, window.full).numpy()
        rows, columns = (
            ((np.arange(low, high) + 0.5) * full / scaled).astype(int).clip(0, full - 1)
            for low, high, full, scaled in (
                (window.box[1], window.box[3], mask.shape[0], window.scaled[0]),
                (window.box[0], window.box[2], mask.shape[1], window.scaled[1]),
            )
        )
        return SimpleNamespace(semantic=mask[rows][:, columns])


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Offsets of windows of ``side`` along an axis: every ``stride``, the last one at the end."""
    count = math.ceil((length - side) / stride) + 1
    return [min(i * stride, length - side) for i in range(count)]


class Changed(Source):
    """Transformed images of a source, with its labels.

    Args:
        source: the images.
        change: function of image and index that returns another image; deterministic.
        suffix: appended to names, to distinguish the images from the originals.
        indices: of the images, in order; all when None.
        read: reads an image of the source by its index; ``source.read`` when None.
    """

    def __init__(
        self,
        source: Source,
        change: Callable[[Image.Image, int], Image.Image],
        suffix: str,
        indices: list[int] | None = None,
        read: Read | None = None,
    ) -> None:
        self.source = source
        self._read = read or source.read
        self.change = change
        self.suffix = suffix
        self.indices = list(range(len(source))) if indices is None else indices

    @property
    def classes(self) -> Any:
        """Classes of the source."""
        return getattr(self.source, "classes", ())

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f"{self.source.name(self.indices[index])}#{self.suffix}"

    def read(self, index: int) -> Image.Image:
        return self.change(self._read(self.indices[index]), self.indices[index])

    def label(self, index: int) -> int | str | None:
        """Label of the original."""
        label = getattr(self.source, "label", None)
        return None if label is None else label(self.indices[index])
