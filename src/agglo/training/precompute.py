"""Precomputing teacher features: run every teacher once on every fixed crop of every image, resumably."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import agglo
from agglo.cache import identity
from agglo.cache.coding import DTYPES, Coding
from agglo.cache.disk import exclusive, forecast, record_bytes, size_text, writing_to
from agglo.cache.reading import check_geometry, check_names, read_coding
from agglo.cache.records import SHARD_BYTES, Record, ShardReader, ShardWriter, key_of, shard_numbers
from agglo.config import build
from agglo.data.crops import CropLoader, margin, outer_size
from agglo.data.loader import Batch
from agglo.data.views import Partition
from agglo.files import write_bytes, write_json
from agglo.model.creation import snap_sizes
from agglo.objectives.base import build_teachers, objective_kind, with_teacher_name
from agglo.recipe import Recipe, Views
from agglo.teachers.base import Teacher
from agglo.training.targets import whole_crop_features
from agglo.types import ConfigError, Features

STATISTICS = 256
"""Number of images from which the rotation of the coding is estimated."""


@dataclass
class TeacherWriter:
    """A teacher, its fitted coding and its shard writer."""

    teacher: Teacher
    coding: Coding
    shards: ShardWriter


@dataclass(slots=True)
class Summary:
    """The result of :func:`precompute`.

    Args:
        total: crops of the finished cache: images x crops x sizes.
        done: crops with features of all teachers.
        records, bytes, seconds: written by this run, and its duration.
        crop_bytes: of all teachers, per crop; mean over the sizes.
        errors: of the coding, by teacher (:class:`agglo.cache.coding.Distortion` as a dictionary).
        unreadable: names of images that could not be read.
        filtered: number of images that their source's filters excluded.
        recovered: bytes of partial records of an earlier run that were truncated.
    """

    total: int
    done: int = 0
    records: int = 0
    bytes: int = 0
    seconds: float = 0.0
    crop_bytes: float = 0.0
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    filtered: int = 0
    recovered: int = 0


def precompute(
    recipe: Recipe,
    folder: str | Path,
    *,
    dtype: str = "fp16",
    batch: int = 32,
    device: str | torch.device = "cpu",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    message: Callable[[str], None] | None = None,
) -> Summary:
    """Write the features of a recipe's teachers to a cache, or add what it lacks.

    Images, crops, sizes and teachers may be added later; existing records are kept.

    Args:
        recipe: with ``data.views.crops``.
        folder: of the cache.
        dtype: one of :data:`agglo.cache.coding.DTYPES`.
        batch: crops per forward pass of a teacher.
        device: of the teachers.
        shard_bytes: size at which a file is closed.
        progress: called with ``(done, total)`` crops.
        message: called with lines for the user.

    Raises:
        ConfigError: the recipe has no fixed crops or trains no student, or the folder contains something else.
        StorageError: the disk is full; records already written are intact, and a second call resumes.
    """
    kind = recipe.objective["kind"]
    if not objective_kind(recipe).trains_student:
        raise ConfigError(f"objective {kind} trains no student: cache a recipe that trains one")
    if not objective_kind(recipe).cacheable:
        raise ConfigError(f"objective {kind} has targets that a feature cache does not store: train without one")
    if not recipe.data.views.crops:
        raise ConfigError("a feature cache needs fixed crops: set e.g. data.views.crops=2 for both commands")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    job = _Job(recipe, Path(folder).expanduser(), dtype, batch, torch.device(device), shard_bytes)
    job.message = message or job.message
    with contextlib.ExitStack() as stack:
        with job.disk():
            stack.enter_context(exclusive(job.folder))
        return job.run(progress or (lambda done, total: None))


class _Job:
    """One call of :func:`precompute`."""

    def __init__(
        self, recipe: Recipe, folder: Path, dtype: str, batch: int, device: torch.device, shard_bytes: int
    ) -> None:
        self.folder, self.dtype, self.device, self.shard_bytes = folder, dtype, device, shard_bytes
        self.message: Callable[[str], None] = lambda line: None
        self.views: Views = recipe.data.views
        self.sources = [build("sources", entry.source) for entry in recipe.data.sources]
        self.names = [[source.name(index) for index in range(len(source))] for source in self.sources]
        check_names([name for each in self.names for name in each])
        images = sum(map(len, self.names))
        self.teachers = {name: teacher.to(device) for name, teacher in build_teachers(recipe).items()}
        with torch.device("meta"):
            model: Any = objective_kind(recipe).build_model(recipe, self.teachers, initialize=False)[0]
        self.stride: int = model.spec.stride
        self.recipe, self.notes = snap_sizes(recipe, model.step())
        self.sizes = self.recipe.sizes
        self.batch = max(1, min(batch, images * self.views.crops))
        self.summary = Summary(images * self.views.crops * len(self.sizes))
        self.inputs = {
            name: identity.inputs_of(teacher, self.sizes, self.views, self.stride)
            for name, teacher in self.teachers.items()
        }
        self.writers: dict[str, TeacherWriter] = {}
        self.summary.crop_bytes = sum(
            record_bytes(teacher, dtype, [tuple(each["grid"]) for each in self.inputs[name].values()])
            for name, teacher in self.teachers.items()
        )

    def run(self, progress: Callable[[int, int], None]) -> Summary:
        for line in self.notes:
            self.message(line)
        summary = self.summary
        manifest = self._manifest()
        began = time.perf_counter()
        self.writers = self._writers()
        summary.done = self._count()
        for line in forecast(self.folder, summary.total, summary.crop_bytes, self._remaining(), self.dtype):
            self.message(line)
        self._save_manifest(manifest, finished=False)
        progress(summary.done, summary.total)
        try:
            for loader, size in self._loaders():
                for first, stop in self._missing(loader, size):
                    for batch in loader.iterate(first, stop):
                        self._write(loader, batch)
                        progress(summary.done, summary.total)
                summary.unreadable += [name for name in loader.skipped if name not in summary.unreadable]
            with self.disk():
                for writer in self.writers.values():
                    writer.shards.finish()
        finally:
            for writer in self.writers.values():
                with contextlib.suppress(OSError):
                    writer.shards.close()
        summary.seconds = time.perf_counter() - began
        self._record_absent(manifest)
        manifest["records"] |= {name: len(writer.shards.keys) for name, writer in self.writers.items()}
        self._save_manifest(manifest, finished=True)
        return summary

    def _record_absent(self, manifest: dict[str, Any]) -> None:
        """After all images: record those without features, which are unreadable or filtered."""
        names = [name for each in self.names for name in each]
        keys = [(crop, (size, size)) for crop in range(self.views.crops) for size in self.sizes]
        absent = {name for name in names if not all(self._complete(key_of(name, *key)) for key in keys)}
        self.summary.filtered = len(absent - set(self.summary.unreadable))
        manifest["absent"] = sorted(absent | set(manifest["absent"]) - set(names))

    def _save_manifest(self, manifest: dict[str, Any], *, finished: bool) -> None:
        """Write the manifest; it is unfinished while records are added."""
        manifest["finished"] = finished
        with self.disk():
            write_json(self.folder / identity.MANIFEST, manifest)

    # --- the cache's folder -------------------------------------------------------------------------------------------

    def _manifest(self) -> dict[str, Any]:
        """The cache's manifest; written if the folder is new."""
        if (self.folder / identity.MANIFEST).is_file():
            manifest = identity.read_manifest(self.folder)
            check_geometry(self.folder, manifest, self.recipe, self.stride)
            return manifest
        manifest = {
            "format": identity.FORMAT,
            "agglo": agglo.__version__,
            "geometry": identity.geometry(self.recipe, self.stride),
            "absent": [],
            "records": {},
        }
        self._save_manifest(manifest, finished=False)
        return manifest

    def _writers(self) -> dict[str, TeacherWriter]:
        """The teachers with their codings and shards; codings of new teachers are fitted first."""
        described = {name: identity.read_teacher(self.folder, name) for name in self.teachers}
        for name, each in described.items():
            if each:
                self._check(name, each)
            elif shard_numbers(self.folder / name):
                raise ConfigError(f"{self.folder / name} has records but no {identity.TEACHER}: delete that folder")
        new = {name: self.teachers[name] for name, each in described.items() if not each}
        if new:
            described |= self._describe(new)
        writers = {}
        for name, teacher in self.teachers.items():
            coding = read_coding(self.folder / name, described[name]).to(self.device)
            with self.disk():
                writers[name] = TeacherWriter(teacher, coding, ShardWriter(self.folder / name, self.shard_bytes))
            self.summary.recovered += writers[name].shards.lost
            self.summary.errors[name] = described[name]["error"]
        return writers

    def _check(self, name: str, description: dict[str, Any]) -> None:
        """Refuse to mix features of different teachers; record new sizes."""
        entry, teacher = self.recipe.teachers[name], self.teachers[name]
        fingerprint, inputs = description["fingerprint"], description["fingerprint"]["inputs"]
        changed = identity.changes(fingerprint, entry, teacher, self.views, self.stride, self.device)
        if description["dtype"] != self.dtype:
            changed.append(f"dtype was {description['dtype']}, now {self.dtype}")
        if changed:
            raise ConfigError(
                f"{self.folder / name} has features of another teachers.{name} ({'; '.join(changed)}): name another "
                "folder with --out, or delete that one"
            )
        if any(size not in inputs for size in self.inputs[name]):
            inputs |= self.inputs[name]
            with self.disk():
                write_json(self.folder / name / identity.TEACHER, description)

    def _describe(self, new: dict[str, Teacher]) -> dict[str, dict[str, Any]]:
        """Fit the codings of new teachers, and write their descriptions, which their records depend on."""
        codings = {name: Coding(teacher.spec, self.dtype).to(self.device) for name, teacher in new.items()}
        last: dict[str, Features] = {}
        for size, images in self._samples():
            for name, teacher in new.items():
                last[name] = self._features(name, teacher, images, size)
                with_teacher_name(name, codings[name].update, last[name])
        described = {}
        for name, teacher in new.items():
            with_teacher_name(name, codings[name].freeze)
            folder, statistics = self.folder / name, None
            if codings[name].needs_statistics:
                statistics = save({k: v.cpu().contiguous() for k, v in codings[name].state_dict().items()})
            entry, inputs = self.recipe.teachers[name], self.inputs[name]
            described[name] = {
                "fingerprint": identity.fingerprint(entry, teacher, inputs, self.device),
                "licence": teacher.licence,
                "dtype": self.dtype,
                "statistics": None if statistics is None else hashlib.sha256(statistics).hexdigest(),
                "error": asdict(codings[name].measure(last[name])),
            }
            with self.disk():
                if statistics is not None:
                    write_bytes(folder / identity.STATISTICS, statistics)
                write_json(folder / identity.TEACHER, described[name])
        return described

    def _samples(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Crops for the statistics: some of every source, at the smallest and the largest size."""
        for size in sorted({min(self.sizes), max(self.sizes)}):
            loaders = [loader for loader, at in self._loaders() if at == size]
            for loader in loaders:
                share = math.ceil(STATISTICS / len(loaders) / self.batch)
                steps = math.ceil(len(loader.sources[0]) / self.batch)
                for batch in loader.iterate(0, min(share, steps)):
                    yield size, batch.images.to(self.device)

    # --- what is missing ----------------------------------------------------------------------------------------------

    def _loaders(self) -> Iterator[tuple[CropLoader, int]]:
        """For each size and source a loader whose first steps contain every crop of every image once.

        Same class as the training loader, so that the crops are bit for bit those of training.
        """
        for size in self.sizes:
            for source in self.sources:
                batch = min(self.batch, len(source) * self.views.crops)
                yield CropLoader(
                    [source], None, [Partition([size], batch)], self.views, 0, self.recipe.data.workers,
                    crops=self.views.crops, cache_mb=0, canvas=self.views.canvas,
                    margin=margin(self.views, self.stride),
                ), size  # fmt: skip

    def _missing(self, loader: CropLoader, size: int) -> list[tuple[int, int]]:
        """Ranges ``[first, stop)`` of the loader's steps that lack records."""
        names = self.names[next(i for i, source in enumerate(self.sources) if source is loader.sources[0])]
        steps = math.ceil(len(names) * self.views.crops / loader.partitions[0].batch)
        ranges: list[tuple[int, int]] = []
        for step in range(steps):
            keys = [key_of(names[index], crop, (size, size)) for _, index, crop in loader.planned(step)]
            if all(self._complete(key) for key in keys):
                continue
            if ranges and ranges[-1][1] == step:
                ranges[-1] = (ranges[-1][0], step + 1)
            else:
                ranges.append((step, step + 1))
        return ranges

    def _complete(self, key: int) -> bool:
        return all(key in each for each in self._written())

    def _written(self) -> list[Container[int]]:
        """The keys written, for each teacher."""
        if self.writers:
            return [writer.shards for writer in self.writers.values()]
        return [ShardReader(self.folder / name) for name in self.teachers]

    def _count(self) -> int:
        """The number of the recipe's crops that are complete."""
        crops, written = range(self.views.crops), self._written()
        keys = (key_of(n, c, (s, s)) for s in self.sizes for c in crops for names in self.names for n in names)
        return sum(all(key in each for each in written) for key in keys)

    def _remaining(self) -> int:
        """Bytes still to be written."""
        return round((self.summary.total - self.summary.done) * self.summary.crop_bytes)

    def disk(self) -> contextlib.AbstractContextManager[None]:
        """Context of everything that writes: reports a full disk with the state of the cache."""
        return writing_to(self.folder, self._state)

    def _state(self) -> str:
        """Numbers of written and missing crops."""
        if not self.writers:  # nothing has been counted yet
            with contextlib.suppress(OSError):
                self.summary.done = self._count()
        done = f"{self.summary.done} of {self.summary.total} crops are complete"
        return f"{done}; about {size_text(self._remaining())} more are needed"

    # --- computing ----------------------------------------------------------------------------------------------------

    def _features(self, name: str, teacher: Teacher, images: torch.Tensor, size: int) -> Features:
        outer = outer_size((size, size), self.views, self.stride)
        features = whole_crop_features(teacher, images, outer, self.stride, name)[name]
        for part, tensor in (("summary", features.summary), ("map", features.spatial)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"teachers.{name}: its {part} is not finite: check its weights and its dtype")
        return features

    def _write(self, loader: CropLoader, batch: Batch) -> None:
        """Compute and write the missing records of a batch."""
        crops = [crop for _, _, crop in loader.planned(batch.step)]
        keys = [key_of(name, crop, batch.size) for name, crop in zip(batch.names, crops, strict=True)]
        # An image may occur twice: as the replacement of an unreadable one, or at the end of the last epoch.
        fresh = [i for i, key in enumerate(keys) if not self._complete(key) and keys.index(key) == i]
        if not fresh:
            return
        checksums = [identity.pixels_crc(batch.images[i]) for i in fresh]
        images = batch.images.to(self.device)
        for name, writer in self.writers.items():
            wanted = [(i, crc) for i, crc in zip(fresh, checksums, strict=True) if keys[i] not in writer.shards]
            if not wanted:
                continue
            writer.teacher.begin_step(0, batch.step)
            features = self._features(name, writer.teacher, images[[i for i, _ in wanted]], batch.size[0])
            grid = (0, 0) if features.spatial is None else (features.spatial.shape[-2], features.spatial.shape[-1])
            rows = writer.coding.encode(features)
            for (i, crc), row in zip(wanted, rows, strict=True):
                with self.disk():
                    writer.shards.append(Record(keys[i], crc, grid), [row])
                self.summary.records += 1
                self.summary.bytes += row.nbytes
        self.summary.done += len(fresh)
