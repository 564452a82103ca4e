"""COCO: instances of 80 classes, and captions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from agglo.sources._dataset import IGNORE, FileSource, Layout
from agglo.types import ConfigError

LAYOUT = Layout(
    "coco",
    "cocodataset.org (val2017.zip, 1 GB; train2017.zip, 18 GB; annotations_trainval2017.zip)",
    "val2017/*.jpg, train2017/*.jpg, annotations/instances_val2017.json, annotations/captions_val2017.json",
    ("coco", "coco2017", "COCO"),
    ("annotations",),
)


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
        ConfigError: it is absent, or annotated images are missing (counted).
    """

    def __init__(self, *, path: str, split: str = "val") -> None:
        root = LAYOUT.root(path)
        part = f"{LAYOUT.check_split(split, ('train', 'val'))}2017"
        facts = _json(root / "annotations" / f"instances_{part}.json")
        images = sorted(facts["images"], key=lambda image: image["id"])
        if not images:
            raise LAYOUT.no_images(root / part)
        super().__init__("coco", root, [f"{part}/{image['file_name']}" for image in images])
        LAYOUT.require_files((self.file(i) for i in range(len(self))), "images")
        categories = sorted(facts["categories"], key=lambda each: each["id"])
        self.classes = tuple(each["name"] for each in categories)
        self._number = {each["id"]: i for i, each in enumerate(categories)}
        self._sizes = [(int(image["height"]), int(image["width"])) for image in images]
        index = {image["id"]: i for i, image in enumerate(images)}
        self._objects: list[list[dict[str, Any]]] = [[] for _ in images]
        for each in facts["annotations"]:
            self._objects[index[each["image_id"]]].append(each)
        self._captions: list[list[str]] = [[] for _ in images]
        captions = root / "annotations" / f"captions_{part}.json"
        for each in _json(captions)["annotations"] if captions.is_file() else ():
            if each["image_id"] in index:
                self._captions[index[each["image_id"]]].append(each["caption"].strip())

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of an image; empty without ``annotations/captions_*.json``."""
        return tuple(self._captions[index])

    def annotation(self, index: int) -> SimpleNamespace:
        """Instances, masks, semantic map, objects and captions of an image."""
        size = self._sizes[index]
        instances, semantic = np.zeros(size, np.int32), np.zeros(size, np.uint8)
        # Crowds first, then from large to small: a crowd covers no object, small objects cover large ones.
        ordered = sorted(self._objects[index], key=lambda each: (not each.get("iscrowd"), -each["area"], each["id"]))
        objects: list[CocoObject] = []
        masks: list[np.ndarray] = []
        for each in ordered:
            where = mask_of(each["segmentation"], size, self.name(index))
            if each.get("iscrowd"):
                semantic[where] = IGNORE
                continue
            number = self._number[each["category_id"]]
            semantic[where] = number + 1
            x, y, w, h = each["bbox"]
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
        ConfigError: the run lengths are compressed, or do not match the image size.
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
    if tuple(segmentation["size"]) != size or sum(counts) != size[0] * size[1]:
        raise ConfigError(
            f"{name} is {size[0]}x{size[1]} pixels (HxW), but its run lengths are for {segmentation['size']}"
        )
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return values.reshape(size[1], size[0]).T


def _fill(mask: np.ndarray, corners: np.ndarray) -> None:
    """Set the pixels whose centres (at +0.5) lie inside a polygon of corners ``(x, y)``, ``(N, 2)``."""
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


def _json(path: Path) -> dict[str, Any]:
    LAYOUT.require_files([path], "annotation files")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _ = found["annotations"], found["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"source coco: {path} is damaged ({error!r}). Get it from {LAYOUT.download}") from error
    return found
