"""Reading a cache: checks that it belongs to the recipe and is complete, and reads the features of a batch."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agglo.cache import identity
from agglo.cache.coding import Coding
from agglo.cache.records import Record, ShardReader, key_of
from agglo.data.loader import Batch
from agglo.recipe import Recipe
from agglo.sources.base import Source
from agglo.teachers.base import Teacher
from agglo.types import AssetError, ConfigError, Features, FeatureSpec
from agglo.weights.reading import read_safetensors


@dataclass(frozen=True, slots=True)
class Rows:
    """One teacher's encoded features of a batch.

    Args:
        data: uint8 ``(B, bytes)``.
        grid: ``(h, w)`` of the maps.
    """

    data: np.ndarray
    grid: tuple[int, int]


class CachedTeacher(Teacher):
    """Placeholder for a cached teacher: carries its spec and licence; calling it raises."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = FeatureSpec(**description["fingerprint"]["spec"])
        self.licence = description["licence"]

    def forward(self, images: torch.Tensor) -> Features:
        """Not available.

        Raises:
            RuntimeError: always.
        """
        del images
        raise RuntimeError("this teacher's features are read from a feature cache: the teacher itself is not loaded")


class FeatureCache:
    """Features of fixed crops, as ``agglo cache`` wrote them; may be read while it grows.

    Args:
        folder: the cache.

    Raises:
        ConfigError: it is not a cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = identity.read_manifest(self.folder)
        self.teachers = {
            path.parent.name: identity.read_teacher(self.folder, path.parent.name)
            for path in sorted(self.folder.glob(f"*/{identity.TEACHER}"))
        }
        self._readers: dict[str, ShardReader] = {}
        self._codings: dict[str, Coding] = {}

    def placeholder(self, name: str) -> CachedTeacher:
        """A :class:`CachedTeacher` for one of the cache's teachers.

        Raises:
            ConfigError: the cache has none of that name.
        """
        if name not in self.teachers:
            raise ConfigError(
                f"{self.folder} has no features of teachers.{name} (it has: {', '.join(self.teachers) or 'none'}); add "
                f"them with {self.command()}"
            )
        return CachedTeacher(self.teachers[name])

    def command(self) -> str:
        """The command that writes what is missing."""
        return f"`agglo cache RECIPE --out {shlex.quote(str(self.folder))}`, which computes only what is missing"

    def reader(self, name: str) -> ShardReader:
        """A teacher's records."""
        if name not in self._readers:
            self._readers[name] = ShardReader(self.folder / name)
        return self._readers[name]

    def coding(self, name: str) -> Coding:
        """A teacher's coding.

        Raises:
            AssetError: its statistics are not those that the records were written with.
        """
        if name not in self._codings:
            self._codings[name] = read_coding(self.folder / name, self.teachers[name])
        return self._codings[name]

    # --- checks -------------------------------------------------------------------------------------------------------

    def check_geometry(self, recipe: Recipe, stride: int) -> None:
        """Refuse a recipe with other crops.

        Raises:
            ConfigError: names the keys that differ.
        """
        check_geometry(self.folder, self.manifest, recipe, stride)

    def check_teacher(self, recipe: Recipe, name: str, teacher: Teacher, stride: int, device: torch.device) -> None:
        """Refuse a teacher other than the one in the cache; call :meth:`check_geometry` before.

        Args:
            recipe: the run.
            name: of the teacher.
            teacher: on ``device``; a :class:`CachedTeacher` is compared by its recipe keys only.
            stride: of the student.
            device: of the teacher.

        Raises:
            ConfigError: names what differs.
        """
        self.placeholder(name)
        real = None if isinstance(teacher, CachedTeacher) else teacher
        written, entry = self.teachers[name]["fingerprint"], recipe.teachers[name]
        if changed := identity.changes(written, entry, real, recipe.data.views, stride, device):
            raise ConfigError(
                f"{self.folder} has features of another teachers.{name} ({'; '.join(changed)}): use a cache of this "
                "teacher, or write one with `agglo cache RECIPE --out OTHER_FOLDER`"
            )

    def check_images(self, recipe: Recipe, sources: Sequence[Source]) -> None:
        """Refuse a recipe that needs records which are missing.

        Raises:
            ConfigError: the number of missing records, one of them, and the command that adds them.
        """
        absent = set(self.manifest["absent"])
        names = [source.name(index) for source in sources for index in range(len(source))]
        check_names(names)
        needed = [
            (name, crop, size)
            for name in names
            if name not in absent
            for crop in range(recipe.data.views.crops)
            for size in recipe.sizes
        ]
        missing, example = 0, ""
        for name, crop, size in needed:
            key = key_of(name, crop, (size, size))
            for reader in map(self.reader, recipe.teachers):
                if key not in reader:
                    missing += 1
                    example = example or f"{name}, crop {crop} at {size} px, teacher {reader.folder.name}"
        if missing:
            total = len(needed) * len(recipe.teachers)
            raise ConfigError(
                f"{self.folder} lacks {missing} of the {total} records that this recipe needs, e.g. {example}: add "
                f"them with {self.command()}"
            )

    # --- reading ------------------------------------------------------------------------------------------------------

    def fetch(self, names: Sequence[str], batch: Batch, crops: Sequence[int]) -> dict[str, Rows]:
        """The encoded features of a batch. Runs in the loader's threads, so without torch kernels.

        Args:
            names: of the teachers.
            batch: its crops are compared with those that the teachers saw.
            crops: crop number of each sample.

        Raises:
            ConfigError: a record is missing, or belongs to other pixels.
            AssetError: a record is damaged.
        """
        keys = [key_of(name, crop, batch.size) for name, crop in zip(batch.names, crops, strict=True)]
        checksums = [identity.pixels_crc(image) for image in batch.images]
        return {name: self._fetch(name, batch, keys, checksums) for name in names}

    def _fetch(self, name: str, batch: Batch, keys: list[int], checksums: list[int]) -> Rows:
        reader, rows, first = self.reader(name), None, None
        for sample, key in enumerate(keys):
            if key not in reader:
                reader.refresh()
            if key not in reader:
                raise ConfigError(
                    f"{self.folder} has no features of teachers.{name} for {batch.names[sample]} at {batch.size[0]} "
                    f"px: add them with {self.command()}"
                )
            if rows is None:
                rows = np.empty((len(keys), reader.locations[key].bytes), dtype=np.uint8)
            record = reader.read(key, rows[sample].data)
            first = first or record
            if record.checksum != checksums[sample]:
                raise ConfigError(
                    f"{batch.names[sample]} is not the image that teachers.{name} saw: the file, or how it is decoded "
                    f"and resized, changed since {self.folder} was written; restore the image, or write a new cache "
                    "with `agglo cache RECIPE --out OTHER_FOLDER`"
                )
        assert rows is not None and isinstance(first, Record)  # a batch has at least one image
        return Rows(rows, first.grid)


def check_geometry(folder: Path, manifest: Mapping[str, Any], recipe: Recipe, stride: int) -> None:
    """See :meth:`FeatureCache.check_geometry`."""
    now, then = identity.geometry(recipe, stride), manifest["geometry"]
    names = {"margin": "the margin of data.views.shift and data.views.roam", "stride": "the student's stride"}
    changed = [
        f"{names.get(key, f'data.views.{key}')} was {then.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if then.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} has other crops ({'; '.join(changed)}): restore these keys, or write a cache for this recipe "
            "with `agglo cache RECIPE --out OTHER_FOLDER`"
        )


def check_names(names: Sequence[str]) -> None:
    """Refuse two images of one name, which is their key in the cache.

    Raises:
        ConfigError: names one.
    """
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise ConfigError(
            f"data.sources: two images have the name {twice!r}, which is their key in a feature cache: rename the "
            "folder of one, or remove the duplicate source"
        )


def read_coding(folder: Path, description: Mapping[str, Any]) -> Coding:
    """See :meth:`FeatureCache.coding`."""
    coding = Coding(FeatureSpec(**description["fingerprint"]["spec"]), description["dtype"])
    if coding.needs_statistics:
        path = folder / identity.STATISTICS
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != description["statistics"]:
            raise AssetError(f"{path} is missing or damaged, and the records cannot be decoded without it: write the "
                             "cache again")  # fmt: skip
        coding.load_state_dict({name: tensor.clone() for name, tensor in read_safetensors(path).tensors.items()})
    return coding.requires_grad_(False)
