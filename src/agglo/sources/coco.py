"""COCO: instances of 80 classes, and captions."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from agglo.sources._dataset import IGNORE, FileSource, Layout
from agglo.sources.base import AnnotationError
from agglo.types import ConfigError

_log = logging.getLogger(__name__)

LAYOUT = Layout(
    "coco",
    "cocodataset.org (val2017.zip, 1 GB; train2017.zip, 18 GB; annotations_trainval2017.zip)",
    "val2017/*.jpg, train2017/*.jpg, annotations/instances_val2017.json, annotations/captions_val2017.json",
    ("coco", "coco2017", "COCO"),
    ("annotations",),
)
_KEYS = ("category_id", "bbox", "area", "segmentation")
"""What an annotation needs to have."""


@dataclass(frozen=True, slots=True)
class CocoObject:
    """One annotated object.

    Attributes:
        instance: its value in the instance map, starting at 1.
        category: name of its class.
        box: ``xyxy`` in pixels.
        pixels: its annotated area.
    """

    instance: int
    category: str
    box: tuple[float, float, float, float]
    pixels: float


class Coco(FileSource):
    """COCO 2017 (Lin et al. 2014): images with instances of 80 classes.

    Licence: annotations CC BY 4.0; images under Flickr terms.

    ``annotation(index)`` has ``instances`` ``(H, W)`` (0 background; the smaller of two overlapping objects is on top),
    ``masks`` ``(N, H, W)`` bool, the full mask of each of the ``objects``, ``semantic`` (0
    background, class index + 1, 255 in crowds), and ``captions`` if available.

    Args:
        path: folder with ``annotations``, or its parent folder.
        split: ``train`` or ``val``.

    Raises:
        ConfigError: it is absent, images are missing (counted), or the file lacks a key. Annotations of images that
            are not listed are left out and counted.
    """

    def __init__(self, *, path: str, split: str = "val") -> None:
        root = LAYOUT.root(path)
        part = f"{LAYOUT.check_split(split, ('train', 'val'))}2017"
        self._file = root / "annotations" / f"instances_{part}.json"
        facts = _json(self._file, "images", "annotations", "categories")
        images = _checked(self._file, facts, "images", "id", "file_name", "height", "width")
        if not images:
            raise LAYOUT.no_images(root / part)
        super().__init__("coco", root, [f"{part}/{image['file_name']}" for image in images])
        LAYOUT.require_files((self.file(i) for i in range(len(self))), "images")
        categories = _checked(self._file, facts, "categories", "id", "name")
        self.classes = tuple(each["name"] for each in categories)
        self._number = {each["id"]: i for i, each in enumerate(categories)}
        self._sizes = [(int(image["height"]), int(image["width"])) for image in images]
        index = {image["id"]: i for i, image in enumerate(images)}
        self._objects = _by_image(self._file, facts["annotations"], index)
        known = {key for each in facts["annotations"] for key in each} if facts["annotations"] else set(_KEYS)
        self._absent = [key for key in _KEYS if key not in known]
        self._captions_file = captions = root / "annotations" / f"captions_{part}.json"
        found = _json(captions, "annotations")["annotations"] if captions.is_file() else []
        self._captions = [
            [caption for each in group if (caption := str(each.get("caption") or "").strip())]
            for group in _by_image(captions, found, index)
        ]

    def data_files(self) -> list[Path]:
        """Local files that hold the images or annotations, for hashes."""
        return [file for file in (self._file, self._captions_file) if file.is_file()]

    def truth_size(self, index: int) -> tuple[int, int]:
        """Size that the annotations state."""
        return self._sizes[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of an image; empty without ``annotations/captions_*.json``."""
        return tuple(self._captions[index])

    def annotation(self, index: int) -> SimpleNamespace:
        """Instances, masks, semantic map, objects and captions of an image.

        Raises:
            ConfigError: no annotation of the file has an area, a box, a category or a segmentation.
            AnnotationError: one of this image lacks one of them, or cannot be read.
        """
        if self._absent:
            raise ConfigError(
                f"{self._file}: no annotation has the key {self._absent[0]!r}; this needs {', '.join(_KEYS)}: complete "
                f"the file, or get it from {LAYOUT.download}"
            )
        for each in self._objects[index]:
            lacking = [key for key in _KEYS if each.get(key) is None]
            if lacking or each["category_id"] not in self._number:
                what = (
                    f"lacks the key {lacking[0]!r}" if lacking else f"has category_id {each['category_id']!r}, unlisted"
                )
                raise AnnotationError(self.name(index), f"{self._file}: annotation {each.get('id')} {what}")
        try:
            return self._annotation(index)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            if isinstance(error, ConfigError):
                raise
            raise AnnotationError(self.name(index), f"{self._file}: damaged annotation ({error!r})") from error

    def _annotation(self, index: int) -> SimpleNamespace:
        size = self._sizes[index]
        instances, semantic = np.zeros(size, np.int32), np.zeros(size, np.uint8)
        # Crowds first, then from large to small: a crowd covers no object, small objects cover large ones.
        ordered = sorted(
            self._objects[index], key=lambda each: (not each.get("iscrowd"), -each["area"], each.get("id", 0))
        )
        objects: list[CocoObject] = []
        masks: list[np.ndarray] = []
        for each in ordered:
            where = mask_of(each["segmentation"], size, self.name(index))
            if each.get("iscrowd"):
                semantic[where] = IGNORE
                continue
            number = self._number[each["category_id"]]
            semantic[where] = number + 1
            x, y, w, h = (float(value) for value in each["bbox"])
            if not (w >= 0 and h >= 0):
                raise ValueError(f"the box {each['bbox']} has a negative width or height")
            objects.append(
                CocoObject(len(objects) + 1, self.classes[number], (x, y, x + w, y + h), float(each["area"]))
            )
            instances[where] = len(objects)
            masks.append(where)
        captions = self.captions(index)
        return SimpleNamespace(
            instances=instances, semantic=semantic, objects=tuple(objects), captions=captions,
            masks=np.stack(masks) if masks else np.zeros((0, *size), bool),
            caption=captions[0] if captions else None,
        )  # fmt: skip


def mask_of(segmentation: Any, size: tuple[int, int], name: str) -> np.ndarray:
    """``(H, W)`` bool mask of polygons ``[[x, y, x, y, ...], ...]`` or column-major run lengths.

    Raises:
        ConfigError: the run lengths are compressed.
        AnnotationError: they do not match the image size.
    """
    if isinstance(segmentation, list):
        mask = np.zeros(size, bool)
        for polygon in segmentation:
            _fill(mask, np.asarray(polygon, np.float64).reshape(-1, 2))
        return mask
    counts = segmentation["counts"]
    if isinstance(counts, str | bytes):
        raise ConfigError(
            f"{name}: compressed run lengths are not supported; use the official files: {LAYOUT.download}"
        )
    if tuple(segmentation["size"]) != size:
        raise AnnotationError(
            name, f"is {size[0]}x{size[1]} pixels (HxW), but its run lengths are for {segmentation['size']}"
        )
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise AnnotationError(
            name, f"its run lengths are for {sum(counts)} pixels, but it has {size[0] * size[1]} ({size[0]}x{size[1]})"
        )
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(size[1], size[0]).T


def _fill(mask: np.ndarray, corners: np.ndarray) -> None:
    """Set the pixels whose centres (at +0.5) lie inside a polygon of corners ``(x, y)``, ``(N, 2)``."""
    if not np.isfinite(corners).all():
        raise ValueError("a polygon has a corner that is not finite")
    x0, y0 = corners.T
    x1, y1 = np.roll(corners, -1, 0).T
    height, width = mask.shape
    for row in range(max(0, int(y0.min() - 0.5)), min(height, int(np.ceil(y0.max() + 0.5)))):
        y = row + 0.5
        crossed = (y0 <= y) != (y1 <= y)
        at = np.sort(x0[crossed] + (y - y0[crossed]) / (y1[crossed] - y0[crossed]) * (x1[crossed] - x0[crossed]))
        edges = np.ceil(at - 0.5).clip(0, width).astype(int)
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            mask[row, start:stop] = True


def _json(path: Path, *keys: str) -> dict[str, Any]:
    LAYOUT.require_files([path], "annotation files")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"source coco: {path} is damaged ({error}). Get it from {LAYOUT.download}") from error
    for key in keys:
        if not isinstance(found, dict) or not isinstance(found.get(key), list):
            raise ConfigError(f"source coco: {path} has no list {key!r}; complete it, or get it from {LAYOUT.download}")
    return found


def _checked(path: Path, facts: dict[str, Any], what: str, *keys: str) -> list[dict[str, Any]]:
    """The entries of a list that have all of these keys, sorted by their ids; of one id the first entry."""
    seen: set[Any] = set()

    def check(entry: dict[str, Any]) -> dict[str, Any]:
        for key in keys:
            _ = entry[key]
        if entry["id"] in seen:
            raise ValueError(f"repeats the id {entry['id']!r}")
        seen.add(entry["id"])
        return entry

    found = LAYOUT.valid({f"{path}: {what}[{i}]": entry for i, entry in enumerate(facts[what])}, check)
    if len({type(each["id"]) for each in found}) > 1:
        raise ConfigError(f"source coco: {path}: some ids of {what} are text and others numbers; use one type")
    return sorted(found, key=lambda each: each["id"])


def _by_image(path: Path, annotations: list[Any], index: dict[Any, int]) -> list[list[dict[str, Any]]]:
    """The annotations of each image; those of unlisted images are left out and counted."""
    found: list[list[dict[str, Any]]] = [[] for _ in index]
    lost = 0
    kinds = {type(key) for key in index}
    for number, each in enumerate(annotations):
        key = each.get("image_id") if isinstance(each, dict) else None
        if key is None:
            raise ConfigError(f"source coco: {path}: annotations[{number}] lacks the key 'image_id'; add it")
        if type(key) not in kinds:
            raise ConfigError(
                f"source coco: {path}: annotations[{number}] has image_id {key!r} ({type(key).__name__}), but the ids "
                f"of images are {' or '.join(sorted(kind.__name__ for kind in kinds))}; use one type"
            )
        if key in index:
            found[index[key]].append(each)
        else:
            lost += 1
    if lost:
        _log.warning("%s: left out %d of %d annotations, whose images are not listed", path, lost, len(annotations))
    return found
