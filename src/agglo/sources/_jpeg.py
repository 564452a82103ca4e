"""JPEG files decoded no further than a view needs: at 1/2, 1/4 or 1/8 of their resolution, and from the top to a row.

A JPEG is a grid of cosine coefficients. An inverse transform of 4, 2 or 1 samples a side instead of 8 gives the image
at 1/2, 1/4, 1/8 (libjpeg's ``scale_denom``), low-passed, at a part of the cost. Rows are saved by writing a smaller
height into the header: in a file of one sequential scan, the decoder then stops below that row of blocks. One row of
blocks more than asked is decoded, because the interpolation of colour looks at its neighbours; so what is returned
equals the same part of the whole image, bit for bit, and bit for bit with Pillow, which takes simplejpeg's place
where that is not installed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
from PIL import Image

from agglo.extras import require
from agglo.sources.base import PartialImage, ReadRequest
from agglo.types import MissingExtraError

_START_OF_FRAME = {0xC0: True, 0xC1: True, 0xC2: False}
"""Baseline, extended, progressive; whether rows can be left away. All others are left to Pillow."""
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_ORIENTATION = 0x0112
_TAIL = 64
"""The end mark is looked for in so many last bytes: some programs append a few."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A JPEG file that can be read in part.

    Args:
        data: the file.
        height, width: in pixels, as stored.
        at: where the height stands in the file.
        block: rows of pixels in a row of blocks, or 0 where rows cannot be left away.
        orientation: EXIF's, 1 to 8.
    """

    data: bytes
    height: int
    width: int
    at: int
    block: int
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)``, upright."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)

    def decode(self, need: ReadRequest) -> PartialImage | None:
        """What is needed, or None where the decoder refuses: then Pillow has the last word.

        A turned image is read whole, and shrunk only by what divides it: else the pixels at its far sides, which
        stand for less than ``shrink``, would come first.
        """
        shrink, height = need.shrink, self.height
        if self.orientation != 1:
            while self.height % shrink or self.width % shrink:
                shrink //= 2
        elif self.block and need.rows < self.height:
            height = min(self.height, (-(-need.rows // self.block) + 1) * self.block)
        data = self.data
        if height < self.height:
            data = b"".join((data[: self.at], height.to_bytes(2, "big"), data[self.at + 2 :]))
        shape = -(-height // shrink), -(-self.width // shrink), 3
        try:
            array = _decode(data, shape, shrink)
        except Exception:  # noqa: BLE001 (decoders raise nearly anything on damaged files)
            return None
        if array.shape != shape:
            return None
        return PartialImage(_upright(array, self.orientation), shrink, self.size)


def frame(data: bytes) -> Frame | None:
    """The frame of a JPEG file; None for every other file, and for one that only Pillow can judge or read.

    Those are: files without an end mark (truncated, perhaps), more than 8 bits, CMYK, arithmetic coding, lossless
    and hierarchical files, and decompression bombs.
    """
    if data[:3] != b"\xff\xd8\xff" or b"\xff\xd9" not in data[-_TAIL:]:
        return None
    at, found, tagged = 2, None, False
    while at + 5 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF:
            return None
        if marker == 0xFF or marker in _STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _START_OF_FRAME:
            found = at + 4, _START_OF_FRAME[marker]
        elif 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None
        elif marker == 0xE1:
            tagged = True
        elif marker == 0xDA:
            return None if found is None else _frame(data, *found, scan=data[at + 4], tagged=tagged)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _frame(data: bytes, at: int, sequential: bool, *, scan: int, tagged: bool) -> Frame | None:
    """The frame whose header lies at ``at``; ``scan`` is how many components the first scan holds."""
    height, width = int.from_bytes(data[at + 1 : at + 3], "big"), int.from_bytes(data[at + 3 : at + 5], "big")
    components = data[at + 5] if len(data) > at + 5 else 0
    if data[at] != 8 or components not in (1, 3) or not height * width:
        return None
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        return None
    factors = data[at + 7 : at + 6 + 3 * components : 3]
    tallest = max(factor & 15 for factor in factors) if components > 1 else 1
    block = 8 * tallest if sequential and scan == components else 0
    return Frame(data, height, width, at + 1, block, _orientation(data) if tagged else 1)


def _orientation(data: bytes) -> int:
    """As Pillow reads it, from EXIF or XMP; unreadable ones count as none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 (damaged metadata, which fails in many ways, must not cost a readable picture)
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@cache
def _simplejpeg() -> ModuleType | None:
    try:
        return require("simplejpeg", "data")
    except MissingExtraError:
        return None


def _decode(data: bytes, shape: tuple[int, int, int], shrink: int) -> np.ndarray:
    fast = _simplejpeg()
    if fast is not None:
        if shrink == 1:
            return fast.decode_jpeg(data, strict=False)
        return fast.decode_jpeg(data, min_height=shape[0], min_width=shape[1], min_factor=1, strict=False)
    with Image.open(io.BytesIO(data)) as image:
        if shrink > 1:
            image.draft(None, (max(1, image.width // shrink), max(1, image.height // shrink)))
        return np.asarray(image.convert("RGB"))


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """The eight ways a camera may be held (EXIF 2.3, tag 0x0112)."""
    if orientation > 4:
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array if orientation == 1 else np.ascontiguousarray(array)
