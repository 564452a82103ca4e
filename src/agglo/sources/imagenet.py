"""ImageNet-1k, and subsets of it, in folders of classes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal

from agglo.extras import require
from agglo.sources._dataset import Layout
from agglo.sources._encoded import EncodedSource
from agglo.sources.folder import Folder
from agglo.types import ConfigError
from agglo.weights.bundled import imagenet_classes, imagenet_wnids

LAYOUT = Layout(
    "imagenet",
    "image-net.org (an account; ILSVRC 2012, or the Kaggle challenge imagenet-object-localization)",
    "train/n01440764/*.JPEG and val/n01440764/*.JPEG, one folder per class, named by WordNet id or class name",
    ("ILSVRC/Data/CLS-LOC", "ILSVRC2012", "imagenet"),
    ("train", "val"),
)
FULL_SIZE = {"train": 1_281_167, "val": 50_000}


class ImageNet(EncodedSource):
    """ImageNet: ``<path>/<split>/<class>/<image>``, with classes named by WordNet id or class name.

    Labels are indices into all 1000 classes, in subsets too, so that zero-shot classification is always 1000-way.
    Licence: non-commercial research and education only.

    Args:
        path: folder with ``train`` and ``val``; ``~`` and ``${VARIABLES}`` are expanded.
        split: ``train`` or ``val``.
        names: class names: ``short`` (first WordNet synonym) or ``openai`` (used to evaluate CLIP; requires open_clip).

    Raises:
        ConfigError: no such folder or split, an unknown class, or classes without images.
        MissingExtraError: ``names: openai`` without open_clip.
    """

    def __init__(self, *, path: str, split: str = "val", names: Literal["short", "openai"] = "short") -> None:
        super().__init__()
        root = LAYOUT.root(path) / LAYOUT.check_split(split, ("train", "val"))
        if not root.is_dir():
            raise ConfigError(f"source imagenet: {root} does not exist; expected: {LAYOUT.structure}")
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise ConfigError(
                f"source imagenet: {root} has no class folders (val is published without them): sort the images by "
                "the validation labels of the development kit. Expected: " + LAYOUT.structure
            )
        self._number = _numbers(folders)
        self._folder = Folder(path=str(root))
        self._split = split
        seen = {self._folder.label(i) for i in range(len(self._folder))}
        empty = [name for name in folders if name not in seen]
        if empty:
            raise ConfigError(
                f"source imagenet: {len(empty)} of {len(folders)} classes of {root} have no image, first {empty[0]}: "
                f"the dataset is incomplete; get the rest from {LAYOUT.download}"
            )
        if len(folders) == len(imagenet_wnids()) and len(self._folder) < FULL_SIZE[split]:
            warnings.warn(
                f"{root} holds {len(self._folder)} of the {FULL_SIZE[split]} images of the split", stacklevel=2
            )
        self.classes = tuple(
            imagenet_classes() if names == "short" else require("open_clip", "teachers").IMAGENET_CLASSNAMES
        )

    def __len__(self) -> int:
        return len(self._folder)

    def name(self, index: int) -> str:
        """E.g. ``imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG``."""
        return f"imagenet/{self._split}/{self._folder.name(index).partition('/')[2]}"

    def file(self, index: int) -> Path:
        """Local path of an image."""
        return self._folder.file(index)

    def encoded(self, index: int) -> bytes:
        return self._folder.encoded(index)

    def label(self, index: int) -> int:
        """Index into ``classes``."""
        return self._number[str(self._folder.label(index)).partition("/")[0]]


def _numbers(folders: list[str]) -> dict[str, int]:
    """Class index of each folder.

    Raises:
        ConfigError: a folder is not named after an ImageNet class.
    """
    known = {wnid: i for i, wnid in enumerate(imagenet_wnids())}
    known |= {_plain(name): i for i, name in reversed(list(enumerate(imagenet_classes())))}
    unknown = [name for name in folders if name not in known and _plain(name) not in known]
    if unknown:
        raise ConfigError(
            f"source imagenet: {len(unknown)} of {len(folders)} folders are not named after ImageNet-1k classes "
            f"({', '.join(unknown[:3])}): use {{kind: folder}} for other classes"
        )
    return {name: known.get(name, known.get(_plain(name), 0)) for name in folders}


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
