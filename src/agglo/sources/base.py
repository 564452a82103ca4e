"""The contract of a source: a finite, indexable collection of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from agglo.types import AggloError, ImageError

if TYPE_CHECKING:
    import numpy as np


class SourceError(AggloError, OSError):
    """A source cannot give images just now: a network, a disk or a shard is gone. No image's fault, so none is skipped.

    Training stops at its last checkpoint instead, and what it would have seen next does not depend on the trouble.
    """


class FilteredImageError(ImageError):
    """A whole image that a filter leaves out. Loops over many images pass it over and count it, without naming each.

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


class ReadRequest(NamedTuple):
    """What a reader will use of an image.

    Args:
        shrink: 1, 2, 4 or 8; the image at ``1 / shrink`` of its resolution (per side) will do.
        rows: so many rows from the top, in pixels of the full image, will do.
    """

    shrink: int
    rows: int


class PartialImage(NamedTuple):
    """An image, or as much of it as was needed.

    Args:
        array: ``(h, w, 3)`` RGB uint8. Each of its pixels stands for ``shrink x shrink`` of the full image, from its
            upper left corner on; rows that were not needed may be missing.
        shrink: at most what was allowed.
        size: ``(H, W)`` of the full, upright image.
    """

    array: np.ndarray
    shrink: int
    size: tuple[int, int]


class Source(ABC):
    """Images by index. Reading the same index twice gives the same pixels. Picklable; safe in several threads.

    What evals ask of sources that know more, each optional:

    - ``classes``: the classes' names; ``label(index)``: an image's class, a position in them or a name;
    - ``annotation(index)``: an object with any of ``semantic`` ``(H, W)`` (0 background, class index + 1, 255 none),
      ``instances`` ``(H, W)`` (0 background), ``depth`` ``(H, W)`` in metres (0 or NaN unknown), ``normals``
      ``(3, H, W)`` (NaN unknown), ``K`` and ``cam_from_world`` (x right, y down, z forward; metres), ``captions``; maps
      lie pixel on pixel on the image;
    - ``annotation_files(index)``: the files on this machine that it is made of, for hashes;
    - ``query(index)`` or ``captions(index)``: what a person would type to find the image, or sentences about it;
    - ``pairs()``: pairs of images, ``first`` and ``second``, with ``points`` ``(N, 2, 2)``, ``box`` and ``category``
      where they are known;
    - ``empty_folders()``: class folders without images;
    - ``file(index)``: where the image lies on this machine.
    """

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A stable name for people and for hashes (a path, ``photos/coffee``, ``scenes/s0003/v1``)."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """The image, decoded, upright, 8-bit RGB.

        Raises:
            ImageError: it cannot be read; the caller skips, counts and names it.
            FilteredImageError: a filter leaves it out; the caller passes it over and counts it.
            SourceError: no image can be read just now; the caller stops.
        """

    def read_part(self, index: int, need: Callable[[tuple[int, int]], ReadRequest]) -> PartialImage | Image.Image:
        """As much of the image as a reader needs, for sources that can save work by reading less. Optional.

        A source that does not override this is read whole, with :meth:`read`.

        Args:
            need: called with the full, upright ``(H, W)`` before pixels are decoded, if the image can be read in part.

        Returns:
            Pixels that depend on the index and on ``ReadRequest.shrink`` alone; ``rows`` only limits how many are read.
            Or what :meth:`read` gives, where the image cannot be read in part; which it is depends on the index alone.

        Raises:
            ImageError: as :meth:`read`, for the same images, whatever is needed of them.
        """
        raise NotImplementedError(f"{type(self).__name__} reads whole images only")
