"""What data sets in published layouts share: their folder, files as images, masks, and telling what is missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from agglo.preprocess import decode
from agglo.sources._encoded import EncodedSource
from agglo.sources._paths import expanded
from agglo.types import ConfigError, ImageError

NONE = 255
"""The value of a pixel without a class."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a data set is and how it lies.

    Args:
        kind: the source's.
        get: where to get it.
        looks: what its folder must look like.
        nested: sub-folders in which the data set may lie below the path that is named.
        marks: folders or files by which its root is known; one is enough.
    """

    kind: str
    get: str
    looks: str
    nested: tuple[str, ...]
    marks: tuple[str, ...]

    def root(self, path: str) -> Path:
        """The data set's root at or below a path.

        Raises:
            ConfigError: it is not there; says where to get it and what it must look like.
        """
        base = Path(expanded(path)).expanduser()
        for candidate in (base, *(base / name for name in self.nested)):
            if any((candidate / mark).exists() for mark in self.marks):
                return candidate
        if not base.exists():
            names = [p.name for p in base.parent.iterdir()] if base.parent.is_dir() else []
            near = difflib.get_close_matches(base.name, names, n=1)
            why = f"there is no {path!r}" + (f" (did you mean {base.parent / near[0]}?)" if near else "")
        else:
            why = f"{path!r} holds none of {', '.join(self.marks)}"
        raise ConfigError(f"source {self.kind}: {why}. Get it from {self.get}; it must look like this: {self.looks}")

    def split(self, split: str, known: Sequence[str]) -> str:
        """The split, if the data set has it.

        Raises:
            ConfigError: it has not.
        """
        if split not in known:
            raise ConfigError(f"source {self.kind}: no split {split!r}; it has: {', '.join(known)}")
        return split

    def whole(self, files: Iterable[Path], what: str) -> None:
        """Raise unless every file is there: ConfigError that counts those that are not."""
        total, missing, first = 0, 0, None
        for file in files:
            total += 1
            if not file.is_file():
                missing += 1
                first = first or file
        if missing:
            raise ConfigError(
                f"source {self.kind}: {missing} of {total} {what} are missing, {first} is the first: the data set is "
                f"only partly here. Get the rest from {self.get}"
            )

    def nothing(self, where: Path) -> ConfigError:
        """The error of a split without images."""
        return ConfigError(f"source {self.kind}: no image in {where}; it must look like this: {self.looks}")


class Files(EncodedSource):
    """Images that are files below a root.

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
        """The kind and the path inside the data set."""
        return f"{self._kind}/{self._files[index]}"

    def file(self, index: int) -> Path:
        """Where the image is on this machine."""
        return self.root / self._files[index]

    def encoded(self, index: int) -> bytes:
        path = self.file(index)
        try:
            return path.read_bytes()
        except OSError:
            decode(path, self.name(index))  # knows what to call it
            raise


def listed(folder: Path, *endings: str) -> list[str]:
    """Names of the files of a folder with one of these endings, sorted; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith("."))


def read_mask(path: Path) -> np.ndarray:
    """A mask's values ``(H, W)`` as stored: indices of a palette, greys of 8 or 16 bits.

    Raises:
        ImageError: it cannot be read, or is a picture in colours.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "I", "I;16", "I;16B", "1"):
                raise ImageError(str(path), f"is a picture ({image.mode}); a mask holds one number a pixel")
            return np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(str(path), str(error)) from error


def normals_of(depth: np.ndarray, K: np.ndarray, jump: float = 0.05) -> np.ndarray:
    """Unit normals ``(3, H, W)`` float32 of a depth map, facing the camera; NaN where they are not known.

    The cross product of central differences of the points. Pixels whose four neighbours are not all valid, or differ in
    depth from them by more than ``jump`` of it, have none.

    Args:
        depth: ``(H, W)`` metres along the optical axis, 0 or NaN where unknown.
        K: ``(3, 3)`` intrinsics in pixels, centres at +0.5.
        jump: relative step in depth that is an edge.
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
