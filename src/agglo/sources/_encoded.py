"""Sources whose images are files of bytes, wherever those lie: decoding, reading in part, and filters."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable

import numpy as np
from PIL import Image

from agglo.preprocess import decode
from agglo.sources._jpeg import Frame, frame
from agglo.sources.base import FilteredImageError, PartialImage, ReadRequest, Source
from agglo.types import ConfigError

_BLANK = 1.0
_NEARLY_BLANK = 24.0
"""Shrinking a blank JPEG may ring a little; what looks nearly blank in part is looked at whole."""


class EncodedSource(Source):
    """A source of encoded images.

    Args:
        min_side: images whose shorter side is below so many pixels, as stored, are left out; 0 for none.
        skip_uniform: leave out images of one colour: those whose range (largest minus least value, of 255, as a vector
            of three channels) has length 1 or less.
        min_pixels: images of fewer pixels, height times width as stored, are left out; 0 for none.
        max_aspect: images whose longer side is more than so many times the shorter are left out; 0 for none.

    Raises:
        ConfigError: a negative number, or an aspect that no image has.
    """

    def __init__(
        self, min_side: int = 0, skip_uniform: bool = False, min_pixels: int = 0, max_aspect: float = 0.0
    ) -> None:
        for key, value in (("min_side", min_side), ("min_pixels", min_pixels)):
            if value < 0:
                raise ConfigError(f"{key} is a number of pixels, 0 for any; not {value}")
        if max_aspect and not max_aspect >= 1:
            raise ConfigError(f"max_aspect is longer side over shorter, so at least 1, or 0 for any; not {max_aspect}")
        self.min_side, self.min_pixels, self.max_aspect = min_side, min_pixels, max_aspect
        self.skip_uniform = skip_uniform

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The image's file.

        Raises:
            ImageError: this image is missing.
            SourceError: no image can be read just now.
        """

    def read(self, index: int) -> Image.Image:
        return self._whole(self.encoded(index), self.name(index))

    def read_part(self, index: int, need: Callable[[tuple[int, int]], ReadRequest]) -> PartialImage | Image.Image:
        data = self.encoded(index)
        head = frame(data)
        if head is None:
            return self._whole(data, self.name(index))
        part = self._part(head, index, need)
        if part is None:  # still as pixels: a view's place must not depend on which part the decoder refused
            image = self._whole(data, self.name(index))
            part = PartialImage(np.asarray(image), 1, (image.height, image.width))
        return part

    def _part(self, head: Frame, index: int, need: Callable[[tuple[int, int]], ReadRequest]) -> PartialImage | None:
        if self._unfit(head.size) is not None:
            self._check_size(head.size, self.name(index))
        part = head.decode(need(head.size))
        if part is None or not self.skip_uniform or not _within(part.array, _NEARLY_BLANK):
            return part
        # Whether an image is left out must not depend on what was needed of it: all of it decides.
        whole = head.decode(ReadRequest(1, head.size[0]))
        if whole is not None and _within(whole.array, _BLANK):
            raise _blank(self.name(index))
        return part

    def _whole(self, data: bytes, name: str) -> Image.Image:
        if self.min_side or self.min_pixels or self.max_aspect:
            size = _peek(data)  # before the pixels are decoded
            if size is not None:
                self._check_size(size, name)
        image = decode(io.BytesIO(data), name)
        self._check_size((image.height, image.width), name)
        if self.skip_uniform and _within(np.asarray(image), _BLANK):
            raise _blank(name)
        return image

    def _check_size(self, size: tuple[int, int], name: str) -> None:
        if (unfit := self._unfit(size)) is not None:
            why, rule = unfit
            raise FilteredImageError(name, f"{size[1]}x{size[0]} pixels, {why}", rule)

    def _unfit(self, size: tuple[int, int]) -> tuple[str, str] | None:
        """Which filter leaves out an image of this ``(H, W)``: why, and the rule; None where none does."""
        short, long = min(size), max(size)
        if short < self.min_side:
            return f"its shorter side is below {self.min_side}", f"min_side: {self.min_side}"
        if short * long < self.min_pixels:
            return f"{short * long} in all, below {self.min_pixels}", f"min_pixels: {self.min_pixels}"
        if self.max_aspect and long > self.max_aspect * short:
            return (
                f"its sides are {long / short:.3g} to 1, beyond {self.max_aspect:g}",
                f"max_aspect: {self.max_aspect:g}",
            )
        return None


def _blank(name: str) -> FilteredImageError:
    return FilteredImageError(name, "is of one colour", "skip_uniform: true")


def _within(array: np.ndarray, limit: float) -> bool:
    """Whether the channels' range vector is no longer than ``limit``, in 0..255 of each channel."""
    for pixels in (array[::16, ::16], array):  # a few pixels settle it for nearly every image
        flat = pixels.reshape(-1, 3)
        if np.linalg.norm(flat.max(axis=0).astype(np.float64) - flat.min(axis=0)) > limit:
            return False
    return True


def _peek(data: bytes) -> tuple[int, int] | None:
    """``(H, W)`` as the header states it, turned or not; None where the file cannot be opened: decoding says why."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception:  # noqa: BLE001 (readers raise nearly anything on damaged files)
        return None
