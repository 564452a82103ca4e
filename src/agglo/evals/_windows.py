"""Sources made of another source's images: windows of them, or the same ones changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from agglo.evals._probe import truth_of
from agglo.sources.base import Source
from agglo.types import ConfigError, ImageError


class Window(NamedTuple):
    """A window of a scaled image.

    Args:
        image: index in the source.
        box: ``xyxy`` in pixels of the scaled image.
        scaled: ``(H, W)`` of the scaled image.
        full: ``(H, W)`` of the image as it is stored.
    """

    image: int
    box: tuple[int, int, int, int]
    scaled: tuple[int, int]
    full: tuple[int, int]


class Windows(Source):
    """Overlapping windows that cover each image, scaled so that its shorter side is ``short``.

    Args:
        source: the images.
        crop: ``(H, W)`` of a window in pixels.
        stride: pixels from one window to the next; the last one of a row ends at the border.
        short: pixels of the scaled image's shorter side.

    Raises:
        ConfigError: a window is larger than the scaled image can be, or windows leave gaps.
    """

    def __init__(self, source: Source, crop: tuple[int, int], stride: int, short: int) -> None:
        if not 1 <= stride <= min(crop):
            raise ConfigError(f"windows of {crop[0]}x{crop[1]} pixels cover an image at strides 1 to {min(crop)}")
        if short < max(crop):
            raise ConfigError(
                f"a shorter side of {short} pixels holds no window of {crop[0]}x{crop[1]}: take {max(crop)}"
            )
        self.source = source
        self.windows: list[Window] = []
        self._last: tuple[int, Image.Image] | None = None
        for i in range(len(source)):
            try:
                image = source.read(i)
            except ImageError:
                self.windows.append(Window(i, (0, 0, crop[1], crop[0]), crop, crop))  # read() names it
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
        if last is None or last[0] != window.image:  # the windows of one image come one after the other
            image = self.source.read(window.image)
            size = window.scaled[1], window.scaled[0]
            last = window.image, image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
            self._last = last
        return last[1].crop(window.box)

    def annotation(self, index: int) -> SimpleNamespace:
        """``semantic`` of the window, nearest neighbours of the full mask.

        Raises:
            ConfigError: the mask is of another size than its image.
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
    """Where windows of ``side`` begin along an axis: every ``stride``, the last one flush with the end."""
    count = math.ceil((length - side) / stride) + 1
    return [min(i * stride, length - side) for i in range(count)]


class Changed(Source):
    """The images of a source, each changed by a function of the picture and its index; labels stay.

    Args:
        source: the images.
        change: returns another picture; deterministic.
        suffix: what names get, so that no one takes the changed image for the original.
        indices: which images, in this order; all when None.
    """

    def __init__(
        self,
        source: Source,
        change: Callable[[Image.Image, int], Image.Image],
        suffix: str,
        indices: list[int] | None = None,
    ) -> None:
        self.source = source
        self.change = change
        self.suffix = suffix
        self.indices = list(range(len(source))) if indices is None else indices

    @property
    def classes(self) -> Any:
        """Of the source."""
        return getattr(self.source, "classes", ())

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f"{self.source.name(self.indices[index])}#{self.suffix}"

    def read(self, index: int) -> Image.Image:
        return self.change(self.source.read(self.indices[index]), self.indices[index])

    def label(self, index: int) -> int | str | None:
        """Of the original."""
        label = getattr(self.source, "label", None)
        return None if label is None else label(self.indices[index])
