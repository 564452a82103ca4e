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
    "train/n01440764/*.JPEG and val/n01440764/*.JPEG, a folder for each class, called by its WordNet id or its name",
    ("ILSVRC/Data/CLS-LOC", "ILSVRC2012", "imagenet"),
    ("train", "val"),
)
WHOLE = {"train": 1_281_167, "val": 50_000}


class ImageNet(EncodedSource):
    """ImageNet: ``<path>/<split>/<class>/<image>``, classes called by WordNet ids or by names.

    Labels are positions among the 1000 classes, also in a subset of them, so that a zero-shot answer is among all 1000.

    Args:
        path: the folder with ``train`` and ``val``; ``~`` and ``${VARIABLES}`` are expanded.
        split: ``train`` or ``val``.
        names: what the classes are called: ``short`` (first words of WordNet) or ``openai``, as CLIP was measured with,
            read from the open_clip package.

    Raises:
        ConfigError: no such folder or split, a class that is none of ImageNet's, or classes without an image.
        MissingExtraError: ``names: openai``, and open_clip is not installed.
    """

    def __init__(self, *, path: str, split: str = "val", names: Literal["short", "openai"] = "short") -> None:
        super().__init__()
        root = LAYOUT.root(path) / LAYOUT.split(split, ("train", "val"))
        if not root.is_dir():
            raise ConfigError(f"source imagenet: there is no {root}; it must look like this: {LAYOUT.looks}")
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise ConfigError(
                f"source imagenet: {root} has no folders of classes; the images of val come without them: sort them by "
                "the validation labels of the development kit. It must look like this: " + LAYOUT.looks
            )
        self._number = _numbers(folders)
        self._folder = Folder(path=str(root))
        self._split = split
        seen = {self._folder.label(i) for i in range(len(self._folder))}
        empty = [name for name in folders if name not in seen]
        if empty:
            raise ConfigError(
                f"source imagenet: {len(empty)} of {len(folders)} classes of {root} have no image, {empty[0]} is the "
                f"first: the data set is only partly here. Get the rest from {LAYOUT.get}"
            )
        if len(folders) == len(imagenet_wnids()) and len(self._folder) < WHOLE[split]:
            warnings.warn(f"{root} holds {len(self._folder)} images; the whole split has {WHOLE[split]}", stacklevel=2)
        self.classes = tuple(
            imagenet_classes() if names == "short" else require("open_clip", "teachers").IMAGENET_CLASSNAMES
        )

    def __len__(self) -> int:
        return len(self._folder)

    def name(self, index: int) -> str:
        """E.g. ``imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG``."""
        return f"imagenet/{self._split}/{self._folder.name(index).partition('/')[2]}"

    def file(self, index: int) -> Path:
        """Where the image is on this machine."""
        return self._folder.file(index)

    def encoded(self, index: int) -> bytes:
        return self._folder.encoded(index)

    def label(self, index: int) -> int:
        """Position in ``classes``."""
        return self._number[str(self._folder.label(index)).partition("/")[0]]


def _numbers(folders: list[str]) -> dict[str, int]:
    """Each folder's class.

    Raises:
        ConfigError: one is called by no class of ImageNet.
    """
    known = {wnid: i for i, wnid in enumerate(imagenet_wnids())}
    known |= {_plain(name): i for i, name in reversed(list(enumerate(imagenet_classes())))}
    strange = [name for name in folders if name not in known and _plain(name) not in known]
    if strange:
        raise ConfigError(
            f"source imagenet: {len(strange)} of {len(folders)} folders are called by no class of ImageNet-1k "
            f"({', '.join(strange[:3])}): read other classes with {{kind: folder}}"
        )
    return {name: known.get(name, known.get(_plain(name), 0)) for name in folders}


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
