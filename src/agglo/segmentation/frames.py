"""The frames of a video: a folder of images, an animation, a video file, or images in memory."""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence, UnidentifiedImageError

from agglo.config import build
from agglo.decoding import as_rgb
from agglo.extras import require
from agglo.model.inputs import ImageLike
from agglo.preprocess import image_name, read_image
from agglo.types import ConfigError, ImageError

VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif")
"""Files that the command takes for videos."""
_WHERE = "segment"


class Frames(ABC):
    """The frames of one video, all of one size, read when they are needed.

    Attributes:
        size: ``(H, W)`` of the frames in pixels.
    """

    size: tuple[int, int] = (0, 0)

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of a frame."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """A frame in RGB.

        Raises:
            ImageError: it cannot be read.
        """

    @abstractmethod
    def reopen(self) -> Frames:
        """The same frames with a position of their own: a file is decoded in order, and going back starts it again."""


def as_frames(video: str | Path | Sequence[ImageLike]) -> Frames:
    """Open a video and read it once, so that a frame that cannot be read is reported before a model is loaded.

    Args:
        video: a folder of images, in the order of the numbers in their names; a file: an animation (GIF, WebP, APNG)
            or, with the extra ``video``, whatever FFmpeg decodes; or images.

    Raises:
        ConfigError: no such path, or no frames.
        ImageError: a frame cannot be read, or has another size than the first.
        MissingExtraError: a video file, and PyAV is not installed.
    """
    found: Frames
    if not isinstance(video, str | Path):
        if not len(video):
            raise ConfigError(f"{_WHERE}: a video without frames")
        names = [image_name(frame, f"frame{index:05d}") for index, frame in enumerate(video)]
        found = _Images(video, names)
    elif Path(video).expanduser().is_dir():
        folder: Any = build("sources", {"kind": "folder", "path": str(video)})
        files = sorted((folder.file(index) for index in range(len(folder))), key=_by_number)
        found = _Images(files, [str(file) for file in files])
    else:
        return _File.counted(Path(video).expanduser())
    for index in range(len(found)):
        found.size = _checked(found.read(index), found.name(index), found.size)
    return found


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sort key: numbers in a path by value, so that ``9.png`` precedes ``10.png``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]


def _checked(image: Image.Image, name: str, size: tuple[int, int]) -> tuple[int, int]:
    if size != (0, 0) and (image.height, image.width) != size:
        raise ImageError(
            name, f"is {image.height}x{image.width} pixels (HxW) and the frames before it {size[0]}x{size[1]}"
        )
    return image.height, image.width


class _Images(Frames):
    def __init__(self, images: Sequence[ImageLike], names: Sequence[str]) -> None:
        self._images, self._names = images, names

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> Image.Image:
        return read_image(self._images[index])

    def reopen(self) -> Frames:
        return self


class _File(Frames):
    """An animation or a video file, decoded in order."""

    def __init__(self, path: Path, count: int = 0, size: tuple[int, int] = (0, 0)) -> None:
        self._path, self._count, self.size = path, count, size
        self._decoder: Iterator[Image.Image] = iter(())
        self._last: tuple[int, Image.Image | None] = (-1, None)
        self._next = count + 1  # past the end: the first read starts the decoder

    @classmethod
    def counted(cls, path: Path) -> _File:
        """Decode all frames once, to count and check them."""
        if not path.is_file():
            raise ConfigError(f"{_WHERE}: no video {path}: name a file, or a folder of frames")
        count, size = 0, (0, 0)
        for frame in _decoded(path):
            size = _checked(frame, f"{path}/{count:05d}", size)
            count += 1
        if not count:
            raise ConfigError(f"{_WHERE}: {path} is a video without frames")
        return cls(path, count, size)

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"{self._path}/{index:05d}"

    def read(self, index: int) -> Image.Image:
        number, frame = self._last
        if number == index and frame is not None:
            return frame
        if index < self._next:
            self._decoder, self._next = _decoded(self._path), 0
        found = next(itertools.islice(self._decoder, index - self._next, None), None)
        if found is None:
            raise ImageError(self.name(index), "cannot be decoded: the file changed since it was opened")
        self._next, self._last = index + 1, (index, found)
        return found

    def reopen(self) -> Frames:
        return _File(self._path, self._count, self.size)


def _decoded(path: Path) -> Iterator[Image.Image]:
    """The frames of a file in RGB.

    Raises:
        ImageError: a frame cannot be read; names its number.
    """
    try:
        animation = Image.open(path)
    except (UnidentifiedImageError, OSError):
        yield from _by_ffmpeg(path)
        return
    count = 0
    with animation:
        try:
            for frame in ImageSequence.Iterator(animation):
                yield as_rgb(frame, f"{path}/{count:05d}")
                count += 1
        except ImageError:
            raise
        except (OSError, ValueError, SyntaxError) as error:
            raise ImageError(f"{path}/{count:05d}", f"cannot be decoded ({error})") from error


def _by_ffmpeg(path: Path) -> Iterator[Image.Image]:
    av = require("av", "video")
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ImageError(str(path), "has no video stream")
            for frame in container.decode(video=0):
                image = frame.to_image()
                # PyAV leaves the rotation that phones write into the file to the caller; in degrees, anticlockwise.
                yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
                count += 1
    except av.error.FFmpegError as error:
        raise ImageError(f"{path}/{count:05d}", f"cannot be decoded ({error.strerror})") from error
