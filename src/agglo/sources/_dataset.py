"""Shared parts of published datasets: folder layout, file-backed images, masks, and reports of missing files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from agglo.decoding import check_tiff, check_wrapped, grey_step, read_regular
from agglo.files import printable
from agglo.sources._encoded import EncodedSource
from agglo.sources._paths import expanded, not_found
from agglo.types import ConfigError, ImageError

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

IGNORE = 255
"""Semantic value of pixels without a class."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Origin and folder structure of a dataset.

    Args:
        kind: kind of the source.
        download: where to get the dataset.
        structure: the expected content of its folder, for messages.
        nested: sub-folders that may hold the dataset, relative to the configured path.
        markers: glob patterns that identify its root; one match is enough.
    """

    kind: str
    download: str
    structure: str
    nested: tuple[str, ...]
    markers: tuple[str, ...]

    def root(self, path: str) -> Path:
        """The dataset's root at or below a path.

        Raises:
            ConfigError: it is absent; names the download and the expected structure.
        """
        base = Path(expanded(path))
        for candidate in (base, *(base / name for name in self.nested)):
            if any(next(candidate.glob(marker), None) is not None for marker in self.markers):
                return candidate
        why = f"{path!r} holds none of {', '.join(self.markers)}" if base.exists() else not_found(path, base)
        raise ConfigError(f"source {self.kind}: {why}. Get it from {self.download}; expected: {self.structure}")

    def check_split(self, split: str, known: Sequence[str]) -> str:
        """Return the split; raise ConfigError if the dataset does not have it."""
        if split not in known:
            raise ConfigError(f"source {self.kind}: no split {split!r}; choose from: {', '.join(known)}")
        return split

    def require_files(self, files: Iterable[Path], what: str) -> None:
        """Raise ConfigError with the number of missing files, if any is missing."""
        total, missing, first = 0, 0, None
        for file in files:
            total += 1
            if not file.is_file():
                missing += 1
                first = first or file
        if missing:
            raise ConfigError(
                f"source {self.kind}: {missing} of {total} {what} are missing, first {first}: the dataset is "
                f"incomplete; get the rest from {self.download}"
            )

    def valid(self, items: Mapping[str, Any], read: Callable[[Any], Result]) -> list[Result]:
        """What ``read`` returns for each item; damaged ones are left out, counted, and the first one named.

        Args:
            items: by file and place, for messages.
            read: raises KeyError, ValueError or TypeError for a damaged item.

        Raises:
            ConfigError: all are damaged.
        """
        found, damaged = [], []
        for where, item in items.items():
            try:
                found.append(read(item))
            except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
                damaged.append(
                    f"{where} " + (f"lacks the key {error}" if isinstance(error, KeyError) else f"({error})")
                )
        if damaged:
            message = f"source {self.kind}: {len(damaged)} of {len(items)} entries are damaged, first {damaged[0]}"
            if not found:
                raise ConfigError(f"{message}. Get it from {self.download}")
            _log.warning("%s: left out", message)
        return found

    def no_images(self, where: Path) -> ConfigError:
        """The error for a split without images."""
        return ConfigError(f"source {self.kind}: no image in {where}; expected: {self.structure}")


class FileSource(EncodedSource):
    """Images in files below a root, with ground truth on the stored pixels: EXIF orientations are not applied.

    A sideways image (a quarter turn) is turned upright if its ground truth has the size of the upright image.

    Args:
        kind: first part of every image's name.
        root: the folder.
        files: paths relative to it, with ``/``.
    """

    upright = False

    def __init__(self, kind: str, root: Path, files: Sequence[str]) -> None:
        super().__init__()
        self.root = root
        self._kind = kind
        self._files = tuple(files)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The kind and the path inside the dataset."""
        return printable(f"{self._kind}/{self._files[index]}")

    def file(self, index: int) -> Path:
        """Local path of an image."""
        return self.root / self._files[index]

    def encoded(self, index: int) -> bytes:
        return read_regular(self.file(index), self.name(index))


class MaskedFiles(FileSource):
    """Images in files, each with one mask file.

    Args:
        kind: first part of every image's name.
        root: the folder.
        files: paths of the images relative to it, with ``/``.
        masks: path of each image's mask.
    """

    def __init__(self, kind: str, root: Path, files: Sequence[str], masks: Sequence[Path]) -> None:
        super().__init__(kind, root, files)
        self._masks = tuple(masks)

    def annotation_files(self, index: int) -> tuple[Path, ...]:
        """Path of the mask."""
        return (self._masks[index],)

    def truth_size(self, index: int) -> tuple[int, int] | None:
        """Size of the mask."""
        return map_size(self._masks[index])

    def class_map(self, index: int, highest: int) -> np.ndarray:
        """The mask ``(H, W)`` uint8 with values 0 to ``highest``, and 255 where ignored.

        Raises:
            ConfigError: another value: the masks use another class list.
            ImageError: the mask cannot be read.
        """
        path = self._masks[index]
        mask = read_mask(path)
        wrong = mask[(mask > highest) & (mask != IGNORE)]
        if wrong.size:
            raise ConfigError(
                f"{path} holds class {wrong.max()}; expected 0 to {highest}, and {IGNORE} for ignored pixels: this "
                f"mask uses another class list. Renumber its classes, or get the masks of source {self._kind}"
            )
        return mask.astype(np.uint8)


def list_files(folder: Path, *extensions: str) -> list[str]:
    """Sorted names of a folder's visible files with one of these extensions; empty if the folder is absent."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in extensions and not p.name.startswith("."))


def map_size(path: Path) -> tuple[int, int] | None:
    """``(H, W)`` of a mask or depth map, from its header; None if it cannot be opened (reading it reports why)."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # noqa: BLE001 (damaged files raise many exception types)
        return None


def read_mask(path: Path) -> np.ndarray:
    """Stored values of a mask or map, ``(H, W)``: palette indices, or grey levels of 1 to 16 bits.

    Raises:
        ImageError: it cannot be read, or is a colour image.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "I", "I;16", "I;16B", "1"):
                what = "holds floats" if image.mode == "F" else f"is a colour picture ({image.mode})"
                raise ImageError(str(path), f"{what}; a mask or map has one channel of whole numbers")
            check_tiff(image, str(path))
            if image.format == "TIFF" and image.tag_v2.get(262) == 0:
                # Pillow inverts the values.
                raise ImageError(str(path), "is a TIFF in which 0 is white; save the mask or map as PNG")
            step = grey_step(image)
            array = np.array(image)
            check_wrapped(image, str(path))
    except ImageError:
        raise
    except Exception as error:  # damaged files raise many exception types
        raise ImageError(str(path), str(error)) from error
    if array.dtype == bool:
        return array.astype(np.uint8)
    return (array // step if step > 1 else array).astype(array.dtype.newbyteorder("="))


def read_depth(path: Path) -> np.ndarray:
    """Stored values of a depth map of 16 bits, float64 ``(H, W)``.

    Raises:
        ImageError: it cannot be read, or has another number of bits: its unit is unknown.
    """
    stored = read_mask(path)
    if stored.dtype.itemsize < 2:
        raise ImageError(str(path), "is a depth map of 8 bits, without a unit; use the 16-bit maps of the data set")
    return stored.astype(np.float64)


def read_text(path: Path) -> str:
    """A text file; bytes that are not UTF-8 are kept as in file names."""
    return path.read_text(encoding="utf-8-sig", errors="surrogateescape")


def normals_from_depth(depth: np.ndarray, K: np.ndarray, jump: float = 0.05) -> np.ndarray:
    """Unit normals ``(3, H, W)`` float32 of a depth map, facing the camera; NaN where undefined.

    The cross product of central differences of the points. Pixels with an invalid neighbour, or one whose depth differs
    by more than ``jump`` times their own, have no normal.

    Args:
        depth: ``(H, W)`` metres along the optical axis, 0 or NaN where unknown.
        K: ``(3, 3)`` intrinsics in pixels, centres at +0.5.
        jump: relative depth step that counts as an edge.
    """
    height, width = depth.shape
    z = np.where(np.isfinite(depth) & (depth > 0), depth, np.nan).astype(np.float64)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    points = np.stack(((x - K[0, 2]) / K[0, 0] * z, (y - K[1, 2]) / K[1, 1] * z, z))
    found = np.full((3, height, width), np.nan)
    if min(height, width) >= 3:
        right, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
        normal = np.cross(down, right, axis=0)
        length = np.linalg.norm(normal, axis=0)
        centre = z[1:-1, 1:-1]
        near = [z[1:-1, 2:], z[1:-1, :-2], z[2:, 1:-1], z[:-2, 1:-1]]
        with np.errstate(invalid="ignore", divide="ignore"):
            smooth = np.all([np.abs(each - centre) <= jump * centre for each in near], axis=0) & (length > 0)
            found[:, 1:-1, 1:-1] = np.where(smooth, normal / length, np.nan)
    return found.astype(np.float32)
