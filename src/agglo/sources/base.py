"""The contract of a source: a finite, indexable collection of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from agglo.types import AggloError, ConfigError, ImageError

if TYPE_CHECKING:
    import numpy as np


class SourceError(AggloError, OSError):
    """The network, disk or shard behind a source fails. The images are not at fault, so none is skipped.

    Training stops at its last checkpoint; resuming from it gives the same batches as an uninterrupted run.
    """


class FilteredImageError(ImageError):
    """A readable image that a filter of its source excludes. Loops skip and count it without naming each one.

    Args:
        name: the image's name.
        why: the reason, as a phrase ("320x240 pixels, shorter than 512").
        rule: the filter as the recipe states it ("min_side: 512").
    """

    def __init__(self, name: str, why: str, rule: str) -> None:
        super().__init__(name, why)
        self.rule = rule

    def __reduce__(self) -> tuple[type[FilteredImageError], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.name, self.why, self.rule)


class AnnotationError(ImageError, ConfigError):
    """The ground truth of one image cannot be used. Loops over many images skip, count and name the image.

    Args:
        name: the image's name.
        why: the file, and what is wrong in it.
    """


class ReadRequest(NamedTuple):
    """The part of an image that a reader uses.

    Args:
        shrink: 1, 2, 4 or 8; the image may be returned at ``1 / shrink`` of its resolution per side.
        rows: number of rows needed from the top, in pixels of the full image.
    """

    shrink: int
    rows: int


class PartialImage(NamedTuple):
    """An image, or the part of it that was requested.

    Args:
        array: ``(h, w, 3)`` RGB uint8. Each pixel covers ``shrink x shrink`` pixels of the full image, starting at its
            upper left corner; rows that were not requested may be absent.
        shrink: at most the requested one.
        size: ``(H, W)`` of the full, upright image.
    """

    array: np.ndarray
    shrink: int
    size: tuple[int, int]


class Source(ABC):
    """Images by index. Reading an index twice gives the same pixels. Picklable and thread-safe.

    Optional members that evals use where a source has them:

    - ``classes``: class names; ``label(index)``: class of an image, as an index into ``classes`` or a name;
    - ``annotation(index)``: an object with any of ``semantic`` ``(H, W)`` (0 background, class index + 1, 255 ignored),
      ``instances`` ``(H, W)`` (0 background), ``depth`` ``(H, W)`` in metres (0 or NaN unknown), ``normals``
      ``(3, H, W)`` (NaN unknown), ``K`` and ``cam_from_world`` (x right, y down, z forward; metres), ``captions``; maps
      have the size of the image;
    - ``annotation_files(index)``: the local files of the annotation, for hashes;
    - ``data_files()``: local files that hold many images or annotations (archives, tables), for hashes;
    - ``query(index)`` or ``captions(index)``: a text query for the image, or sentences about it;
    - ``pairs()``: pairs of images, ``first`` and ``second``, with ``points`` ``(N, 2, 2)``, ``box`` and ``category``
      where known;
    - ``empty_folders()``: class folders without images;
    - ``file(index)``: local path of the image.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A stable, readable name that is also hashed (a path, ``photos/coffee``, ``scenes/s0003/v1``)."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The decoded 8-bit RGB image: upright, or as stored in sources whose ground truth lies on the stored pixels.

        Raises:
            ImageError: it cannot be read; callers skip, count and name it.
            FilteredImageError: a filter excludes it; callers skip and count it.
            SourceError: the source is unavailable; callers stop.
        """

    def read_part(self, index: int, need: Callable[[tuple[int, int]], ReadRequest]) -> PartialImage | Image.Image:
        """The requested part of an image. Optional, for sources that save work by decoding less than :meth:`read`.

        Args:
            need: called with the full, upright ``(H, W)`` before pixels are decoded, if partial reading is possible.

        Returns:
            Pixels that depend on the index and on ``ReadRequest.shrink`` alone; ``rows`` only limits how many are read.
            The result of :meth:`read` where partial reading is impossible, which depends on the index alone.

        Raises:
            ImageError: as :meth:`read`, for the same images, whatever part is requested.
        """
        raise NotImplementedError(f"{type(self).__name__} reads whole images only")
