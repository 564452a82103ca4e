"""Sources of encoded image files, wherever the bytes are stored: decoding, partial reading, and filters."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

from agglo.decoding import decode, turns
from agglo.sources._jpeg import JpegFrame, parse_frame
from agglo.sources.base import FilteredImageError, PartialImage, ReadRequest, Source
from agglo.types import ConfigError

_BLANK = 1.0
_NEARLY_BLANK = 24.0
"""Decoding a blank JPEG at a reduced size may ring slightly; a nearly blank part is checked on the whole image."""


class EncodedSource(Source):
    """A source of encoded images.

    Args:
        min_side: exclude images whose shorter side, as stored, is smaller (pixels); 0 disables.
        skip_uniform: exclude single-colour images: those whose per-channel range (max - min, of 255), as a vector, has
            length 1 or less.
        min_pixels: exclude images with fewer pixels (height times width, as stored); 0 disables.
        max_aspect: exclude images whose longer side exceeds this multiple of the shorter; 0 disables.

    Raises:
        ConfigError: a negative number, or ``max_aspect`` between 0 and 1.
    """

    def __init__(
        self, min_side: int = 0, skip_uniform: bool = False, min_pixels: int = 0, max_aspect: float = 0.0
    ) -> None:
        for key, value in (("min_side", min_side), ("min_pixels", min_pixels)):
            if value < 0:
                raise ConfigError(f"{key}: {value} is negative; use a number of pixels, or 0 to disable")
        if max_aspect and not max_aspect >= 1:
            raise ConfigError(f"max_aspect: {max_aspect} is below 1; use longer side / shorter side, or 0 to disable")
        self.min_side, self.min_pixels, self.max_aspect = min_side, min_pixels, max_aspect
        self.skip_uniform = skip_uniform

    upright = True
    """Whether the EXIF orientation is applied; false if ground truth lies on the stored pixels."""

    def truth_size(self, index: int) -> tuple[int, int] | None:
        """``(H, W)`` of the ground truth of an image, by which a sideways image finds its frame; None if unknown."""
        return None

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of an image file.

        Raises:
            ImageError: this image is missing.
            SourceError: the source is unavailable.
        """

    def read(self, index: int) -> Image.Image:
        return self._whole(self.encoded(index), index)

    def read_part(self, index: int, need: Callable[[tuple[int, int]], ReadRequest]) -> PartialImage | Image.Image:
        data = self.encoded(index)
        frame = parse_frame(data)
        if frame is None:
            return self._whole(data, index)
        if frame.orientation != 1:
            stored = frame.height, frame.width
            if not turns(stored, frame.orientation, self.upright, self.truth_size(index)):
                frame = replace(frame, orientation=1)
        part = self._part(frame, index, need)
        if part is None:  # still a PartialImage: a view's position must not depend on which part the decoder refused
            image = self._whole(data, index)
            part = PartialImage(np.asarray(image), 1, (image.height, image.width))
        return part

    def _part(
        self, frame: JpegFrame, index: int, need: Callable[[tuple[int, int]], ReadRequest]
    ) -> PartialImage | None:
        self._check_size(frame.size, index)
        part = frame.decode(need(frame.size))
        if part is None or not self.skip_uniform or not _in_range(part.array, _NEARLY_BLANK):
            return part
        # Exclusion must not depend on the requested part, so the whole image decides.
        whole = frame.decode(ReadRequest(1, frame.size[0]))
        if whole is not None and _in_range(whole.array, _BLANK):
            raise _uniform(self.name(index))
        return part

    def _whole(self, data: bytes, index: int) -> Image.Image:
        name = self.name(index)
        if self.min_side or self.min_pixels or self.max_aspect:
            size = _stored_size(data)  # before the pixels are decoded
            if size is not None:
                self._check_size(size, name)
        image = decode(data, name, upright=self.upright, size=self.truth_size(index))
        self._check_size((image.height, image.width), name)
        if self.skip_uniform and _in_range(np.asarray(image), _BLANK):
            raise _uniform(name)
        return image

    def _check_size(self, size: tuple[int, int], image: int | str) -> None:
        """Raise FilteredImageError if a filter excludes images of this ``(H, W)``."""
        short, long = min(size), max(size)
        if short < self.min_side:
            why, rule = f"its shorter side is below {self.min_side}", f"min_side: {self.min_side}"
        elif short * long < self.min_pixels:
            why, rule = f"{short * long} in total, below {self.min_pixels}", f"min_pixels: {self.min_pixels}"
        elif self.max_aspect and long > self.max_aspect * short:
            why = f"its aspect ratio is {long / short:.3g}, above {self.max_aspect:g}"
            rule = f"max_aspect: {self.max_aspect:g}"
        else:
            return
        name = image if isinstance(image, str) else self.name(image)
        raise FilteredImageError(name, f"{size[1]}x{size[0]} pixels, {why}", rule)


def _uniform(name: str) -> FilteredImageError:
    return FilteredImageError(name, "has a single colour", "skip_uniform: true")


def _in_range(array: np.ndarray, limit: float) -> bool:
    """Whether the vector of per-channel ranges (0 to 255 each) is at most ``limit`` long."""
    for pixels in (array[::16, ::16], array):  # a few pixels decide for nearly every image
        flat = pixels.reshape(-1, 3)
        if np.linalg.norm(flat.max(axis=0).astype(np.float64) - flat.min(axis=0)) > limit:
            return False
    return True


def _stored_size(data: bytes) -> tuple[int, int] | None:
    """``(H, W)`` from the header, ignoring orientation; None if the file cannot be opened (decoding reports why)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception:  # noqa: BLE001 (damaged files raise many exception types)
        return None
