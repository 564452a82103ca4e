"""Images of FiftyOne samples, read and resized in the workers of a data loader.

The classes are at the top of an installed module, so that workers started by spawn or forkserver can unpickle them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.extras import require
from agglo.preprocess import aspect_size, crop, read_image, stretch
from agglo.types import ImageError, MissingExtraError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class InputSize:
    """The size at which a model reads an image.

    Args:
        side: of the square, or the longer (``shorter``: the shorter) side of the whole image, in pixels.
        step: sides are multiples of it.
        square: the centre square, cropped; False for the whole image.
        shorter: ``side`` is that of the shorter side.
    """

    side: int
    step: int
    square: bool
    shorter: bool = False

    def fit(self, image: Image.Image) -> Tensor:
        """The pixels of an upright RGB image, as :func:`agglo.preprocess.fit` treats them, uint8 ``(3, H, W)``."""
        if self.square:
            resized = crop(image, (self.side, self.side))
        else:
            full = image.height, image.width
            resized = stretch(image, aspect_size(full, (self.side, self.side), self.step, inside=not self.shorter))
        # Bytes, a quarter of floats: they pass from the workers to the main process.
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def __str__(self) -> str:
        if self.square:
            return f"{self.side}x{self.side} centre square"
        return f"whole image, {'shorter' if self.shorter else 'longer'} side {self.side}"


@dataclass(frozen=True, slots=True)
class Read:
    """An image as a worker returns it: its pixels, or the reason why there are none.

    Args:
        pixels: uint8 ``(3, H, W)``, or None.
        why: the reason, or None.
        sample: id of the sample, or None.
        dataset: id of its dataset, or None.
    """

    pixels: Tensor | None
    why: str | None = None
    sample: str | None = None
    dataset: str | None = None


def read(image: Any, size: InputSize, sample: str | None = None, dataset: str | None = None) -> Read:
    """Read and resize one image; an unreadable one gives a reason instead of an exception.

    Args:
        image: a path, or anything that :func:`agglo.preprocess.read_image` accepts.
        size: of the model's input.
        sample: id of the sample.
        dataset: id of the dataset.
    """
    try:
        if image is None:
            return Read(None, "the sample has no filepath", sample, dataset)
        return Read(size.fit(read_image(image)), None, sample, dataset)
    except ImageError as error:
        return Read(None, error.why, sample, dataset)


def collate(batch: Sequence[Any]) -> list[Any]:
    """The items of a batch as a list: images of several sizes cannot be stacked."""
    return list(batch)


def base(*names: str) -> Any:
    """FiftyOne's classes, ``module:class``, joined as one base; a plain object without FiftyOne.

    This module stays importable without FiftyOne, and its classes picklable by their name with it.
    """
    try:
        found = tuple(getattr(require(n.partition(":")[0], "fiftyone"), n.partition(":")[2]) for n in names)
    except MissingExtraError:
        return object
    return found[0] if len(found) == 1 else type("Base", found, {})


_GetItem: Any = base("fiftyone.utils.torch:GetItem")


class ReadSample(_GetItem):
    """Reads the image of a sample in a worker.

    Args:
        size: of the model's input.
        field_mapping: FiftyOne's: another field for ``filepath``.
    """

    def __init__(self, size: InputSize, field_mapping: dict[str, str] | None = None) -> None:
        self.size = size
        super().__init__(field_mapping=field_mapping)

    @property
    def required_keys(self) -> list[str]:
        """The fields that are read."""
        return ["filepath", "id", "_dataset_id"]

    def __call__(self, d: dict[str, Any]) -> Read:
        """Read the image at ``d["filepath"]``."""
        dataset = d.get("_dataset_id")
        return read(d["filepath"], self.size, d.get("id"), None if dataset is None else str(dataset))


def spread_frames(paths: Sequence[str], count: int) -> Iterator[np.ndarray]:
    """Frames ``(H, W, 3)`` uint8 spread over videos: the same number of each, or one of each of ``count`` videos.

    Videos that cannot be read are left out.
    """
    video: Any = require("eta.core.video", "fiftyone")
    chosen = [paths[i] for i in dict.fromkeys(i * len(paths) // count for i in range(count))]
    each = -(-count // len(chosen))
    for path in chosen:
        try:
            total = video.get_frame_count(path)
            frames = sorted({1 + (2 * i + 1) * total // (2 * each) for i in range(each)} & set(range(1, total + 1)))
            with video.FFmpegVideoReader(path, frames=frames) as reader:
                yield from reader
        except Exception as error:  # noqa: BLE001 (ffmpeg's errors have no common class)
            _log.warning("no frames of %s for the scales of heatmaps: %s", path, str(error).strip()[:200])


class FitPatch:
    """FiftyOne's ``transforms``: prepares a box that FiftyOne cut out of an image.

    Args:
        size: of the model's input; boxes are always cropped to its square.
    """

    def __init__(self, size: InputSize) -> None:
        self.size = size

    def __call__(self, image: Any) -> Tensor:
        """Uint8 ``(3, H, W)`` of a PIL image or array."""
        return self.size.fit(read_image(image))
