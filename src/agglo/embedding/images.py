"""The images to embed: folders, files and objects in memory as sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from agglo.config import build
from agglo.preprocess import image_name, read_image
from agglo.sources.base import Source
from agglo.types import ConfigError, ImageError


def as_files(path: str | Path) -> Source:
    """The images in a folder, or one image file, named by their paths.

    Raises:
        ConfigError: no such path, or no image in it.
    """
    folder = build("sources", {"kind": "folder", "path": str(path)})
    return ImageList([folder.file(index) for index in range(len(folder))])


class Rest(Source):
    """Some images of a source.

    Args:
        source: the images.
        indices: those to keep.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self._source.name(self.indices[index])

    def read(self, index: int) -> Image.Image:
        return self._source.read(self.indices[index])

    def has_images(self, skipped: dict[str, str], *, needed: bool) -> bool:
        """Whether an image can be read, or ``needed``; adds the unreadable ones before it to ``skipped``."""
        for index in range(0 if needed else len(self)):
            try:
                self.read(index)
            except ImageError as error:
                skipped[error.name] = error.why
            else:
                return True
        return needed


class ImageList(Source):
    """A source of images passed by the caller; paths are opened when read."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = list(items)

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        return image_name(self._items[index], f"image {index}")

    def file(self, index: int) -> Path:
        """Path of the image; raises TypeError for one that is not a file."""
        return Path(self._items[index]).expanduser()

    def read(self, index: int) -> Image.Image:
        try:
            return read_image(self._items[index], self.name(index))
        except TypeError as error:
            raise ImageError(self.name(index), str(error)) from None


def as_source(images: str | Path | Source | Iterable[Any]) -> Source:
    """Anything that :func:`agglo.embed` accepts, as a source.

    Raises:
        ConfigError: no such path, no image in it, or an empty sequence.
    """
    if isinstance(images, Source):
        return images
    if isinstance(images, str | Path):
        return as_files(images)
    # An array or tensor is one image or a batch, never a list of rows; bytes are one file.
    file = isinstance(images, Image.Image | bytes | bytearray | memoryview) or hasattr(images, "read")
    single = file or getattr(images, "ndim", 4) in (2, 3)
    items = [images] if single else list(images)
    if not items:
        raise ConfigError("no images were given")
    return ImageList(items)
