"""Partial decoding of JPEG files: at 1/2, 1/4 or 1/8 of their resolution, and only the top rows.

An inverse cosine transform of 4, 2 or 1 samples per side instead of 8 gives the low-passed image at 1/2, 1/4, 1/8
(libjpeg's ``scale_denom``) at a fraction of the cost. Rows are skipped by writing a smaller height into the header: in
a file of one sequential scan the decoder stops below that row of blocks. One extra row of blocks is decoded, because
chroma upsampling reads its neighbours. The result equals the same part of the whole image bit for bit, also with
Pillow, the fallback when simplejpeg is not installed.
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
"""Baseline, extended, progressive: whether rows can be skipped. Pillow decodes all others."""
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_ORIENTATION = 0x0112
_TAIL = 64
"""Number of trailing bytes in which the end marker is searched: some programs append a few bytes."""


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """A JPEG file that can be decoded in part.

    Args:
        data: the file.
        height, width: in pixels, as stored.
        at: byte offset of the height field.
        block: pixel rows per row of blocks, or 0 if rows cannot be skipped.
        orientation: EXIF orientation, 1 to 8.
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
        """The requested part, or None if the decoder fails; Pillow then decides whether the file is readable.

        A rotated image is decoded whole, and shrunk only by divisors of its size: otherwise the pixels at its far
        sides, which cover less than ``shrink``, would come first.
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
        except Exception:  # noqa: BLE001 (damaged files raise many exception types)
            return None
        if array.shape != shape:
            return None
        return PartialImage(_upright(array, self.orientation), shrink, self.size)


def parse_frame(data: bytes) -> JpegFrame | None:
    """The frame of a JPEG file; None for other formats and for files left to Pillow.

    Those are files without an end marker (possibly truncated), more than 8 bits, CMYK, arithmetic coding, lossless and
    hierarchical files, and decompression bombs.
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


def _frame(data: bytes, at: int, sequential: bool, *, scan: int, tagged: bool) -> JpegFrame | None:
    """The frame whose header starts at ``at``; ``scan`` is the number of components in the first scan."""
    height, width = int.from_bytes(data[at + 1 : at + 3], "big"), int.from_bytes(data[at + 3 : at + 5], "big")
    components = data[at + 5] if len(data) > at + 5 else 0
    if data[at] != 8 or components not in (1, 3) or not height * width:
        return None
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        return None
    factors = data[at + 7 : at + 6 + 3 * components : 3]
    tallest = max(factor & 15 for factor in factors) if components > 1 else 1
    block = 8 * tallest if sequential and scan == components else 0
    return JpegFrame(data, height, width, at + 1, block, _orientation(data) if tagged else 1)


def _orientation(data: bytes) -> int:
    """Orientation as Pillow reads it, from EXIF or XMP; 1 if unreadable."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 (damaged metadata must not make a readable image fail)
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
    """Apply an EXIF orientation (EXIF 2.3, tag 0x0112)."""
    if orientation > 4:
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array if orientation == 1 else np.ascontiguousarray(array)
