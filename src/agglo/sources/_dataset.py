"""Shared parts of published datasets: folder layout, file-backed images, masks, and reports of missing files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from agglo.preprocess import decode
from agglo.sources._encoded import EncodedSource
from agglo.sources._paths import expanded, not_found
from agglo.types import ConfigError, ImageError

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
        base = Path(expanded(path)).expanduser()
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

    def no_images(self, where: Path) -> ConfigError:
        """The error for a split without images."""
        return ConfigError(f"source {self.kind}: no image in {where}; expected: {self.structure}")


class FileSource(EncodedSource):
    """Images in files below a root.

    Args:
        kind: first part of every image's name.
        root: the folder.
        files: paths relative to it, with ``/``.
    """

    def __init__(self, kind: str, root: Path, files: Sequence[str]) -> None:
        super().__init__()
        self.root = root
        self._kind = kind
        self._files = tuple(files)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The kind and the path inside the dataset."""
        return f"{self._kind}/{self._files[index]}"

    def file(self, index: int) -> Path:
        """Local path of an image."""
        return self.root / self._files[index]

    def encoded(self, index: int) -> bytes:
        path = self.file(index)
        try:
            return path.read_bytes()
        except OSError:
            decode(path, self.name(index))  # raises an ImageError that says why
            raise


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


def list_files(folder: Path, *extensions: str) -> list[str]:
    """Sorted names of a folder's visible files with one of these extensions; empty if the folder is absent."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in extensions and not p.name.startswith("."))


def read_mask(path: Path) -> np.ndarray:
    """Stored values of a mask, ``(H, W)``: palette indices, or 8 or 16 bit grey levels.

    Raises:
        ImageError: it cannot be read, or is a colour image.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "I", "I;16", "I;16B", "1"):
                raise ImageError(str(path), f"is a colour picture ({image.mode}); a mask has one channel")
            return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(str(path), str(error)) from error


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
