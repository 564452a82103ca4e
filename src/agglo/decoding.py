"""Decoding of image files: to 8-bit RGB, upright or as stored, whatever the format and the state of its metadata."""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from agglo.files import printable
from agglo.types import ImageError

ImageFile = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""An encoded image: a path, its bytes, or a seekable binary file object."""

_WITH_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""From stored to upright pixels, by EXIF orientation (EXIF 2.3, tag 0x0112)."""
_BACK = {**_TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""From upright to stored pixels."""


def decode(
    source: ImageFile, name: str | None = None, *, upright: bool = True, size: tuple[int, int] | None = None
) -> Image.Image:
    """Decode one image file to 8-bit RGB; a file that was opened is closed.

    The EXIF orientation is applied unless ``upright`` is false; damaged metadata is ignored. Greyscale and palette
    images are expanded; transparency is composited over white; CMYK is converted without its colour profile; 16-bit
    greyscale is divided by 257 (65535 is white); other integer and float ranges follow :func:`_eight_bits`; of an
    animation or a document the first frame is read.

    Args:
        source: a path, the bytes of a file, or a seekable binary file object.
        name: of the image in errors; the path when None.
        upright: apply the EXIF orientation; False for the pixels as stored, on which published ground truth lies.
        size: ``(H, W)`` of the image's ground truth. If only one of the upright and the stored image has this size,
            that one is returned, whatever ``upright``.

    Returns:
        A loaded ``PIL.Image`` of mode "RGB", 1x1 or larger.

    Raises:
        ImageError: the file is missing, empty, not a regular file, not an image, truncated, damaged, a decompression
            bomb or of an unsupported mode.
    """
    if name is None:
        name = printable(str(source if isinstance(source, str | os.PathLike) else getattr(source, "name", "image")))
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    try:
        return _decode(source, name, upright, size)
    except ImageError as error:
        for bare in _without_metadata(source):
            try:
                return _decode(io.BytesIO(bare), name, upright, size)
            except ImageError:
                continue
        raise error from error.__cause__


def read_regular(path: str | os.PathLike[str], name: str) -> bytes:
    """The content of a regular file: pipes and devices are not opened, because reading them may never end.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        _check_regular(path, name)
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        raise ImageError(name, _unreadable(error)) from None


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 if it has none or its metadata is damaged."""
    try:
        tags = image.tag_v2 if image.format == "TIFF" and hasattr(image, "tag_v2") else image.getexif()  # type: ignore[attr-defined]
        value = tags.get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 (damaged metadata fails in many ways and must not make an image unreadable)
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turns(stored: tuple[int, int], turn: int, upright: bool, size: tuple[int, int] | None) -> bool:
    """Whether an image is turned upright: ``upright``, unless only the other frame has the ground truth's size.

    Args:
        stored: ``(H, W)`` of the stored pixels.
        turn: EXIF orientation.
        upright: the default.
        size: ``(H, W)`` of the ground truth; None if unknown.
    """
    shown = stored[::-1] if turn > 4 else stored
    if size is not None and shown != stored and size in (shown, stored):
        return size == shown
    return upright


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Upright 8-bit RGB pixels of an image that was opened elsewhere, which is not changed.

    Raises:
        ImageError: its file is damaged, or its mode is not supported.
    """
    try:
        check_tiff(image, name)
        step = grey_step(image)
        image.load()  # Pillow turns TIFF files here
        check_wrapped(image, name)
    except ImageError:
        raise
    except Exception as error:  # PIL's readers raise nearly anything on damaged files
        raise ImageError(name, f"damaged image file ({error})") from error
    method = _TURNS.get(orientation(image))
    return _rgb(image if method is None else image.transpose(method), name, step)


def _decode(
    source: str | os.PathLike[str] | BinaryIO, name: str, upright: bool, size: tuple[int, int] | None
) -> Image.Image:
    try:
        if isinstance(source, str | os.PathLike):
            _check_regular(source, name)
        with Image.open(source) as image:
            if image.format == "EPS":
                # Loading one would run Ghostscript.
                raise ImageError(name, "EPS files are programs and are not executed; convert it to PNG")
            loads_upright = image.format == "TIFF"
            turn = 0
            if loads_upright:
                check_tiff(image, name)
                turn = orientation(image)
            step = grey_step(image)
            image.load()
            check_wrapped(image, name)
            turn = turn or orientation(image)
            shape = image.height, image.width
            turned = turns(shape[::-1] if loads_upright and turn > 4 else shape, turn, upright, size)
            method = None if turned == loads_upright else (_TURNS if turned else _BACK).get(turn)
            return _rgb(image if method is None else image.transpose(method), name, step)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, _not_an_image(source)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"too large to decode safely ({error})") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(name, _unreadable(error)) from None
    except Exception as error:  # PIL's readers raise nearly anything on damaged files: SyntaxError, struct.error, ...
        detail = str(error) or type(error).__name__
        kind = "truncated" if "truncated" in detail.lower() or isinstance(error, EOFError) else "damaged"
        raise ImageError(name, f"{kind} image file ({detail})") from error


def _check_regular(path: str | os.PathLike[str], name: str) -> None:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ImageError(name, "is a pipe or a device, not an image file")


def _unreadable(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not an image"
    if isinstance(error, PermissionError):
        return "cannot be read (permission denied)"
    return f"cannot be read ({error.strerror or error})"


def _not_an_image(source: str | os.PathLike[str] | BinaryIO) -> str:
    """Describe a file that PIL did not recognise."""
    try:
        if isinstance(source, str | os.PathLike):
            with open(source, "rb") as file:
                head, size = file.read(16), os.fstat(file.fileno()).st_size
        else:
            size = source.seek(0, os.SEEK_END)
            source.seek(0)
            head = source.read(16)
    except OSError:
        return "not an image that can be read"
    if size == 0:
        return "is empty (0 bytes)"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "HEIC files cannot be read; convert it to JPEG or PNG"
    return f"not an image that can be read ({size} bytes, beginning with {head[:8]!r})"


def check_tiff(image: Image.Image, name: str) -> None:
    """Refuse the TIFF layouts that Pillow (up to 13.0) decodes to other values without an error.

    Raises:
        ImageError: an opened TIFF file has such a layout.
    """
    if image.format != "TIFF":
        return
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, signed = max(tags.get(258, (1,))), 2 in tags.get(339, (1,))
    channels, packed = int(tags.get(277, 1)), tags.get(259, 1) != 1
    if signed and bits == 8:
        what = "signed 8-bit samples"
    elif bits == 12:
        what = "12-bit samples"
    elif tags.get(262) == 0 and bits > 8:
        what = f"{bits}-bit samples in which 0 is white"
    elif tags.get(284, 1) == 2 and ((bits > 8 and not packed) or channels == 2):
        what = f"{bits}-bit samples in separate planes"
    elif tags.prefix == b"MM" and signed and bits == 16:
        what = "big-endian signed 16-bit samples"
    elif tags.prefix == b"MM" and packed and bits == 32:
        what = "compressed big-endian 32-bit samples"
    else:
        return
    raise ImageError(name, f"TIFF with {what} is not supported; save it as PNG, or as little-endian, interleaved TIFF")


def check_wrapped(image: Image.Image, name: str) -> None:
    """Refuse unsigned 32-bit samples from 2**31, which Pillow loads as negative numbers.

    Raises:
        ImageError: a loaded TIFF file has such samples.
    """
    if image.format != "TIFF" or image.mode != "I" or 2 in image.tag_v2.get(339, (1,)):  # type: ignore[attr-defined]
        return
    if np.asarray(image).min() < 0:
        raise ImageError(name, "TIFF with unsigned samples from 2147483648 is not supported; save it with 16 bits")


def grey_step(image: Image.Image) -> int:
    """Distance of two stored grey levels in the pixels of an image that is not loaded: Pillow spreads 2 and 4 bits."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""  # type: ignore[attr-defined]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return {"L;2": 85, "L;4": 17}.get(str(raw), 1)


def _rgb(image: Image.Image, name: str, step: int) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit "RGB"."""
    if min(image.size) < 1:
        raise ImageError(name, f"has no pixels ({image.width}x{image.height})")
    clear = image.info.get("transparency")
    if image.mode.startswith(("I", "F")) or (image.mode in ("1", "L") and isinstance(clear, int)):
        stored = np.asarray(image)
        grey = stored * np.uint8(255) if stored.dtype == bool else stored
        grey = grey if grey.dtype == np.uint8 else _eight_bits(grey, name)
        if isinstance(clear, int):  # Pillow compares this level with the pixels it has spread
            grey = np.where(stored == clear * step, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")
    if isinstance(clear, tuple) and max(clear) > 255:
        raise ImageError(name, "16-bit PNG with a transparent colour is not supported; save it with an alpha channel")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        result = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        try:
            result = image.convert("RGB")
        except ValueError:
            raise ImageError(name, f"colour mode {image.mode} is not supported; convert it to RGB first") from None
    result.info = {}  # profiles and EXIF would stay in memory with a cached image
    return result


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Convert high-bit-depth greyscale ``(H, W)`` to uint8.

    Integers within 0..65535 are 16-bit samples: ``round(v / 257)``. Floats within [0, 1] are multiplied by 255, floats
    within [0, 255] rounded. Other ranges have no standard white: their minimum and maximum become black and white.
    """
    data = values.astype(np.float64)
    if not np.isfinite(data).all():
        raise ImageError(name, "contains NaN or infinity")
    low, high = float(data.min()), float(data.max())
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        data = data / 257
    elif values.dtype.kind == "f" and low >= 0 and high <= 1:
        data = data * 255
    elif not (values.dtype.kind == "f" and low >= 0 and high <= 255):
        data = (data - low) * (255 / (high - low) if high > low else 0)
    return np.rint(data).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------- damaged metadata


def _without_metadata(source: str | os.PathLike[str] | BinaryIO) -> Iterator[bytes]:
    """A file without the metadata that is not needed for its pixels; first with EXIF, then without.

    Pillow refuses readable images for a wrong checksum of a comment, a truncated colour profile or a wrong EXIF offset.
    """
    try:
        if isinstance(source, str | os.PathLike):
            data = read_regular(source, "")
        else:
            source.seek(0)
            data = source.read()
    except (OSError, ImageError):
        return
    strip = next((found for magic, found in _STRIPS.items() if data.startswith(magic)), None)
    if strip is None:
        return
    for keep_exif in (True, False):
        try:
            bare = strip(data, keep_exif)
        except (struct.error, IndexError):
            return
        if bare != data:
            yield bare


def _strip_png(data: bytes, keep_exif: bool) -> bytes:
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if not kind[0] & 32 or kind == b"tRNS" or (keep_exif and kind == b"eXIf"):  # bit 5: ancillary
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _strip_jpeg(data: bytes, keep_exif: bool) -> bytes:
    kept, at = [data[:2]], 2
    while data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        needed = {0xE0: size >= 16, 0xE1: keep_exif, 0xEE: size >= 14}  # JFIF and Adobe segments decide on colours
        if needed.get(marker, not (0xE0 <= marker <= 0xEF or marker == 0xFE)):
            kept.append(data[at : at + 2 + size])
        at += 2 + size
    return b"".join((*kept, data[at:]))


def _strip_tiff(data: bytes, keep_exif: bool) -> bytes:
    """Without the references to EXIF, GPS, XMP, ICC, IPTC and Photoshop data in the first directory."""
    del keep_exif  # the orientation is a tag of the directory itself
    order = "little" if data[:2] == b"II" else "big"
    start = int.from_bytes(data[4:8], order)
    count = int.from_bytes(data[start : start + 2], order)
    entries = [data[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    removed = {34665, 34853, 40965, 700, 34675, 33723, 34377}
    kept = [entry for entry in entries if int.from_bytes(entry[:2], order) not in removed]
    end = start + 2 + 12 * count
    block = len(kept).to_bytes(2, order) + b"".join(kept) + data[end : end + 4]
    return data[:start] + block.ljust(end + 4 - start, b"\0") + data[end + 4 :]


_STRIPS = {
    b"\x89PNG\r\n\x1a\n": _strip_png,
    b"\xff\xd8": _strip_jpeg,
    b"II*\0": _strip_tiff,
    b"MM\0*": _strip_tiff,
}
"""Functions that remove metadata, by the first bytes of a file."""
