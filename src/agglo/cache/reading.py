"""A cache for reading: is it this recipe's, is everything there, and what did the teachers say of this batch."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agglo.cache import identity
from agglo.cache.coding import Coding
from agglo.cache.crops import Rows
from agglo.cache.records import Record, Shelf, key_of
from agglo.data.loader import Batch
from agglo.recipe import Recipe
from agglo.sources.base import Source
from agglo.teachers.base import Teacher
from agglo.types import AssetError, ConfigError, Features
from agglo.weights.reading import read_safetensors


class Absent(Teacher):
    """Stands where a teacher stood whose words are read: it has the teacher's spec and licence, and is silent."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = identity.spec_from(known["fingerprint"]["spec"])
        self.licence = known["licence"]

    def forward(self, images: torch.Tensor) -> Features:
        """Not to be asked.

        Raises:
            RuntimeError: always.
        """
        del images
        raise RuntimeError("this teacher's words are read from a feature cache; it is not here to be asked for more")


class FeatureCache:
    """What teachers said of fixed crops, as ``agglo cache`` wrote it; safe to read while it grows.

    Args:
        folder: the cache.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = identity.read_manifest(self.folder)
        self.known = {
            path.parent.name: identity.read_teacher(self.folder, path.parent.name)
            for path in sorted(self.folder.glob(f"*/{identity.TEACHER}"))
        }
        self._shelves: dict[str, Shelf] = {}
        self._codings: dict[str, Coding] = {}

    def absent(self, name: str) -> Teacher:
        """A stand-in for one of its teachers.

        Raises:
            ConfigError: it holds none of that name.
        """
        if name not in self.known:
            has = ", ".join(self.known) or "none"
            raise ConfigError(
                f"{self.folder} holds nothing from teachers.{name} (it holds: {has}); add it with {self.command()}"
            )
        return Absent(self.known[name])

    def command(self) -> str:
        """What to type to write what is missing."""
        return f"`agglo cache RECIPE --out {shlex.quote(str(self.folder))}`, which computes only what is missing"

    def shelf(self, name: str) -> Shelf:
        """A teacher's records."""
        if name not in self._shelves:
            self._shelves[name] = Shelf(self.folder / name)
        return self._shelves[name]

    def coding(self, name: str) -> Coding:
        """How a teacher's features are written.

        Raises:
            AssetError: the statistics are not those the records were written with.
        """
        if name not in self._codings:
            self._codings[name] = read_coding(self.folder / name, self.known[name])
        return self._codings[name]

    # ------------------------------------------------------------------------------------------------ refusing

    def check_geometry(self, recipe: Recipe, stride: int) -> None:
        """Refuse a recipe whose canvases are others.

        Raises:
            ConfigError: says what changed.
        """
        check_geometry(self.folder, self.manifest, recipe, stride)

    def check_teacher(self, recipe: Recipe, name: str, teacher: Teacher, stride: int, device: torch.device) -> None:
        """Refuse a teacher that is not the one whose words these are; :meth:`check_geometry` comes before.

        Args:
            teacher: the real one, on its device; a stand-in is compared by its keys in the recipe alone.
            stride: the student's.

        Raises:
            ConfigError: says what changed.
        """
        self.absent(name)
        real = None if isinstance(teacher, Absent) else teacher
        known, entry = self.known[name]["fingerprint"], recipe.teachers[name]
        if told := identity.changes(known, entry, real, recipe.data.views, stride, device):
            raise ConfigError(
                f"{self.folder} is from another teachers.{name} ({'; '.join(told)}): name the folder of a cache that "
                f"was written with this teacher, or write one with `agglo cache RECIPE --out OTHER_FOLDER`"
            )

    def check_images(self, recipe: Recipe, sources: Sequence[Source]) -> None:
        """Refuse a recipe that needs entries which are not there.

        Raises:
            ConfigError: how many are missing, one by name, and the next move.
        """
        sizes = sorted({size for partition in recipe.partitions for size in partition.sizes})
        absent = set(self.manifest["absent"])
        names = [source.name(index) for source in sources for index in range(len(source))]
        check_names(names)
        needed = [
            (name, crop, size)
            for name in names
            if name not in absent
            for crop in range(recipe.data.views.crops)
            for size in sizes
        ]
        missing, example = 0, ""
        for name, crop, size in needed:
            key = key_of(name, crop, (size, size))
            for shelf in map(self.shelf, recipe.teachers):
                if key not in shelf:
                    missing += 1
                    example = example or f"{name}, crop {crop} at {size} px, teacher {shelf.folder.name}"
        if missing:
            total = len(needed) * len(recipe.teachers)
            raise ConfigError(
                f"{self.folder} lacks {missing} of the {total} entries that this recipe needs, e.g. {example}: finish "
                f"it with {self.command()}"
            )

    # ------------------------------------------------------------------------------------------------ reading

    def fetch(self, names: Sequence[str], batch: Batch, crops: Sequence[int]) -> dict[str, Rows]:
        """The records of a batch. Runs in the loader's threads, so without torch kernels.

        Args:
            names: of the teachers.
            batch: whose canvases are compared with what the teachers saw.
            crops: number of each canvas among its image's.

        Raises:
            ConfigError: an entry is missing, or was made of other pixels.
            AssetError: an entry is damaged.
        """
        keys = [key_of(name, crop, batch.size) for name, crop in zip(batch.names, crops, strict=True)]
        seen = [identity.pixels_crc(image) for image in batch.images]
        return {name: self._fetch(name, batch, keys, seen) for name in names}

    def _fetch(self, name: str, batch: Batch, keys: list[int], seen: list[int]) -> Rows:
        shelf, rows, first = self.shelf(name), None, None
        for sample, key in enumerate(keys):
            if key not in shelf:
                shelf.refresh()
            if key not in shelf:
                raise ConfigError(
                    f"{self.folder} holds nothing from teachers.{name} of {batch.names[sample]} at {batch.size[0]} px: "
                    f"add it with {self.command()}"
                )
            if rows is None:
                rows = np.empty((len(keys), shelf.places[key].bytes), dtype=np.uint8)
            record = shelf.read(key, rows[sample].data)
            first = first or record
            if record.canvas != seen[sample]:
                raise ConfigError(
                    f"{batch.names[sample]} is not what teachers.{name} saw: the image, or how it is decoded and "
                    f"resized, changed since {self.folder} was written; write a new cache with "
                    "`agglo cache RECIPE --out OTHER_FOLDER`, or bring the image back"
                )
        assert rows is not None and isinstance(first, Record)  # a batch has at least one image
        return Rows(rows, first.grid)


def check_geometry(folder: Path, manifest: Mapping[str, Any], recipe: Recipe, stride: int) -> None:
    """See :meth:`FeatureCache.check_geometry`."""
    now, then = identity.geometry(recipe, stride), manifest["geometry"]
    names = {"margin": "the margin of data.views.shift and data.views.roam", "stride": "the student's stride"}
    told = [
        f"{names.get(key, f'data.views.{key}')}: {then.get(key)!r} then, {value!r} now"
        for key, value in now.items()
        if then.get(key) != value
    ]
    if told:
        raise ConfigError(
            f"{folder} holds other canvases ({'; '.join(told)}): set these back, or write a cache of its own for this "
            "recipe with `agglo cache RECIPE --out OTHER_FOLDER`"
        )


def check_names(names: Sequence[str]) -> None:
    """Refuse two images of one name: their features could not be told apart.

    Raises:
        ConfigError: names one.
    """
    if len(set(names)) < len(names):
        known: set[str] = set()
        twice = next(name for name in names if name in known or known.add(name))
        raise ConfigError(
            f"data.sources: two images are called {twice!r}, and a feature cache goes by names: rename one's folder, "
            "or leave the source out that is there twice"
        )


def read_coding(folder: Path, known: Mapping[str, Any]) -> Coding:
    """See :meth:`FeatureCache.coding`."""
    coding = Coding(identity.spec_from(known["fingerprint"]["spec"]), known["dtype"])
    if coding.needs_statistics:
        path = folder / identity.STATISTICS
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != known["statistics"]:
            raise AssetError(
                f"{path} is missing or damaged, and no record can be read without it: write the cache anew"
            )
        coding.load_state_dict({name: tensor.clone() for name, tensor in read_safetensors(path).tensors.items()})
    return coding.requires_grad_(False)
