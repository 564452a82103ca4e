"""Writing a cache: every teacher looks at every fixed crop of every image once, however often that is interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import agglo
from agglo.cache import identity
from agglo.cache.coding import DTYPES, Coding
from agglo.cache.crops import CropLoader
from agglo.cache.folder import alone, size_text
from agglo.cache.lessons import ask, fitted
from agglo.cache.reading import check_geometry, check_names, read_coding
from agglo.cache.records import SHARD_BYTES, Pen, Record, Shelf, key_of, shard_numbers
from agglo.cache.room import outlook, record_bytes, writing_to
from agglo.config import build
from agglo.data.loader import Batch
from agglo.data.views import Partition, ViewPolicy
from agglo.objectives.distill import build_teachers
from agglo.objectives.inspection import named
from agglo.objectives.wrapping import begin_step
from agglo.recipe import Recipe, Views
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features

STATISTICS = 256
"""Images from which the PHI-S map of the coding is estimated, and on some of which its error is measured."""


@dataclass
class Speaker:
    """One teacher at work.

    Args:
        teacher: on its device.
        coding: fitted.
        pen: what it says goes there.
    """

    teacher: Teacher
    coding: Coding
    pen: Pen


@dataclass(slots=True)
class Written:
    """What a run of :func:`write` did.

    Args:
        total: canvases that the cache is to hold: images x crops x sizes.
        done: canvases that it holds now, in full.
        records, bytes, seconds: written by this run.
        bytes_an_image: of all teachers, of one canvas, as a mean over the sizes.
        errors: of the coding by teacher (:class:`agglo.cache.coding.Error` as a dictionary).
        unreadable: names of the images that could not be read.
        left_out: images that a filter of their source left out.
        recovered: bytes of half-written records of an earlier run that were cut off.
    """

    total: int
    done: int = 0
    records: int = 0
    bytes: int = 0
    seconds: float = 0.0
    bytes_an_image: float = 0.0
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    left_out: int = 0
    recovered: int = 0


def write(
    recipe: Recipe,
    folder: str | Path,
    *,
    dtype: str = "fp16",
    batch: int = 32,
    device: str | torch.device = "cpu",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Written:
    """Write what a recipe's teachers say of its images, or go on with it.

    What is there is kept, what is missing is computed. Images, crops, sizes and teachers may be added later.

    Args:
        recipe: with ``data.views.crops``.
        folder: of the cache.
        dtype: one of :data:`agglo.cache.coding.DTYPES`.
        batch: canvases a teacher sees at a time.
        device: where the teachers run.
        shard_bytes: size at which a file is closed.
        progress: told ``(done, total)`` canvases.
        say: told what a person may want to know.

    Raises:
        ConfigError: the recipe has no fixed crops, or the folder holds something else.
        StorageError: the disk is full; what was written is whole, and running it again goes on.
    """
    if recipe.objective.kind != "distill":
        raise ConfigError(
            f"a cache holds targets of students, and objective: {recipe.objective.kind} has none: train the upsampler "
            "first, then cache the recipe that names its run in `weights:`"
        )
    if not recipe.data.views.crops:
        raise ConfigError(
            "only what teachers say of fixed crops can be kept: set how many each image has, e.g. data.views.crops=2"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    place, tell = Path(folder).expanduser(), say or (lambda _: None)
    job = _Job(recipe, place, dtype, batch, torch.device(device), shard_bytes, tell)
    with contextlib.ExitStack() as stack:
        with job.disk():
            stack.enter_context(alone(job.folder))
        return job.run(progress or (lambda done, total: None))


class _Job:
    """One run of :func:`write`."""

    def __init__(
        self, recipe: Recipe, folder: Path, dtype: str, batch: int, device: torch.device, shard_bytes: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folder, self.dtype, self.device, self.say = folder, dtype, device, say
        self.shard_bytes = shard_bytes
        self.views: Views = recipe.data.views
        self.sources = [build("sources", entry.source) for entry in recipe.data.sources]
        names = [[source.name(index) for index in range(len(source))] for source in self.sources]
        check_names([name for each in names for name in each])
        self.names = names
        self.teachers = {name: teacher.to(device) for name, teacher in build_teachers(recipe).items()}
        self.recipe, self.stride, changed = fitted(recipe, self.teachers)
        for line in changed:
            say(line)
        self.sizes = sorted({size for partition in self.recipe.partitions for size in partition.sizes})
        self.batch = max(1, min(batch, sum(map(len, names)) * self.views.crops))
        self.written = Written(sum(map(len, names)) * self.views.crops * len(self.sizes))
        self.inputs = {
            name: identity.inputs_of(teacher, self.sizes, self.views, self.stride)
            for name, teacher in self.teachers.items()
        }
        self.speakers: dict[str, Speaker] = {}
        self.written.bytes_an_image = sum(
            record_bytes(teacher, dtype, [tuple(each["grid"]) for each in self.inputs[name].values()])
            for name, teacher in self.teachers.items()
        )

    def run(self, progress: Callable[[int, int], None]) -> Written:
        written = self.written
        manifest = self._manifest()
        began = time.perf_counter()
        self.speakers = self._speakers()
        written.done = self._count()
        for line in outlook(self.folder, written.total, written.bytes_an_image, self._left(), self.dtype):
            self.say(line)
        self._keep(manifest, finished=False)
        progress(written.done, written.total)
        try:
            for loader, size in self._loaders():
                for first, stop in self._missing(loader, size):
                    for batch in loader.iterate(first, stop):
                        self._write(loader, batch)
                        progress(written.done, written.total)
                written.unreadable += [name for name in loader.skipped if name not in written.unreadable]
            with self.disk():
                for speaker in self.speakers.values():
                    speaker.pen.finish()
        finally:
            for speaker in self.speakers.values():
                with contextlib.suppress(OSError):
                    speaker.pen.close()
        written.seconds = time.perf_counter() - began
        self._note_absent(manifest)
        manifest["records"] |= {name: len(speaker.pen.keys) for name, speaker in self.speakers.items()}
        self._keep(manifest, finished=True)
        return written

    def _note_absent(self, manifest: dict[str, Any]) -> None:
        """After all was gone through: keep which images are not there because they cannot be read or are not wanted."""
        names = [name for each in self.names for name in each]
        keys = [(crop, (size, size)) for crop in range(self.views.crops) for size in self.sizes]
        absent = {name for name in names if not all(self._whole(key_of(name, *key)) for key in keys)}
        self.written.left_out = len(absent - set(self.written.unreadable))
        manifest["absent"] = sorted(absent | set(manifest["absent"]) - set(names))

    def _keep(self, manifest: dict[str, Any], *, finished: bool) -> None:
        """Write the manifest; while records are added it says that the cache is not finished."""
        manifest["finished"] = finished
        with self.disk():
            identity.write_json(self.folder / identity.MANIFEST, manifest)

    # ------------------------------------------------------------------------------------------------ beginning

    def _manifest(self) -> dict[str, Any]:
        """The cache's manifest; written where the folder is new."""
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
        self._keep(manifest, finished=False)
        return manifest

    def _speakers(self) -> dict[str, Speaker]:
        """The teachers with their codings and pens; codings of new ones are fitted first."""
        known = {name: identity.read_teacher(self.folder, name) for name in self.teachers}
        for name, each in known.items():
            if each:
                self._check(name, each)
            elif shard_numbers(self.folder / name):
                raise ConfigError(f"{self.folder / name} holds records but no {identity.TEACHER}: delete that folder")
        new = {name: self.teachers[name] for name, each in known.items() if not each}
        if new:
            known |= self._begin(new)
        made = {}
        for name, teacher in self.teachers.items():
            coding = read_coding(self.folder / name, known[name]).to(self.device)
            with self.disk():
                made[name] = Speaker(teacher, coding, Pen(self.folder / name, self.shard_bytes))
            self.written.recovered += made[name].pen.lost
            self.written.errors[name] = known[name]["error"]
        return made

    def _check(self, name: str, known: dict[str, Any]) -> None:
        """Refuse to add to the words of another teacher; note the sizes that are new."""
        entry, teacher, inputs = self.recipe.teachers[name], self.teachers[name], known["fingerprint"]["inputs"]
        told = identity.changes(known["fingerprint"], entry, teacher, self.views, self.stride, self.device)
        if known["dtype"] != self.dtype:
            told.append(f"written as {known['dtype']}, {self.dtype} is asked for")
        if told:
            raise ConfigError(
                f"{self.folder / name} was begun with another teachers.{name} ({'; '.join(told)}): name another folder "
                "with --out, or delete that one"
            )
        if any(size not in inputs for size in self.inputs[name]):
            inputs |= self.inputs[name]
            with self.disk():
                identity.write_json(self.folder / name / identity.TEACHER, known)

    def _begin(self, new: dict[str, Teacher]) -> dict[str, dict[str, Any]]:
        """Fit the codings of new teachers, and write who they are: from then on their records mean something."""
        codings = {name: Coding(teacher.spec, self.dtype).to(self.device) for name, teacher in new.items()}
        last: dict[str, Features] = {}
        for size, images in self._samples():
            for name, teacher in new.items():
                last[name] = self._ask(name, teacher, images, size)
                named(name, partial(codings[name].update, last[name]))
        known = {}
        for name, teacher in new.items():
            named(name, codings[name].freeze)
            place, statistics = self.folder / name, None
            if codings[name].needs_statistics:
                statistics = save({k: v.cpu().contiguous() for k, v in codings[name].state_dict().items()})
            entry, inputs = self.recipe.teachers[name], self.inputs[name]
            known[name] = {
                "fingerprint": identity.fingerprint(entry, teacher, inputs, self.device),
                "licence": teacher.licence,
                "dtype": self.dtype,
                "statistics": None if statistics is None else hashlib.sha256(statistics).hexdigest(),
                "error": asdict(codings[name].measure(last[name])),
            }
            with self.disk():
                place.mkdir(exist_ok=True)
                if statistics is not None:
                    identity.write_bytes(place / identity.STATISTICS, statistics)
                identity.write_json(place / identity.TEACHER, known[name])
        return known

    def _samples(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Canvases for statistics: some of every source, at the smallest and the largest size."""
        for size in sorted({min(self.sizes), max(self.sizes)}):
            loaders = [loader for loader, at in self._loaders() if at == size]
            for loader in loaders:
                share = math.ceil(STATISTICS / len(loaders) / self.batch)
                steps = math.ceil(len(loader.sources[0]) / self.batch)
                for batch in loader.iterate(0, min(share, steps)):
                    yield size, batch.images.to(self.device)

    # ------------------------------------------------------------------------------------------------ what to do

    def _loaders(self) -> Iterator[tuple[CropLoader, int]]:
        """For each size and source a loader whose first steps hold every image in every crop once.

        They are the training loader's own, so that the canvases are to the last bit those of training.
        """
        policy = ViewPolicy(**self.views.model_dump(include={"scale", "aspect", "flip"}))
        for size in self.sizes:
            for source in self.sources:
                batch = min(self.batch, len(source) * self.views.crops)
                yield CropLoader(
                    [source], None, [Partition([size], batch)], policy, 0, self.recipe.data.workers,
                    crops=self.views.crops, cache_mb=0, canvas=self.views.canvas,
                    margin=identity.margin(self.views, self.stride),
                ), size  # fmt: skip

    def _missing(self, loader: CropLoader, size: int) -> list[tuple[int, int]]:
        """Runs ``[first, stop)`` of the loader's steps in which something is missing."""
        names = self.names[next(i for i, source in enumerate(self.sources) if source is loader.sources[0])]
        steps = math.ceil(len(names) * self.views.crops / loader.partitions[0].batch)
        runs: list[tuple[int, int]] = []
        for step in range(steps):
            keys = [key_of(names[index], crop, (size, size)) for _, index, crop in loader.planned(step)]
            if all(self._whole(key) for key in keys):
                continue
            if runs and runs[-1][1] == step:
                runs[-1] = (runs[-1][0], step + 1)
            else:
                runs.append((step, step + 1))
        return runs

    def _whole(self, key: int) -> bool:
        return all(key in each for each in self._held())

    def _held(self) -> list[Container[int]]:
        """What is there of each teacher; before the pens are taken up, as a reader would find it."""
        if self.speakers:
            return [speaker.pen for speaker in self.speakers.values()]
        return [Shelf(self.folder / name) for name in self.teachers]

    def _count(self) -> int:
        """Canvases of this recipe that are there already."""
        crops, held = range(self.views.crops), self._held()
        keys = (key_of(n, c, (s, s)) for s in self.sizes for c in crops for names in self.names for n in names)
        return sum(all(key in each for each in held) for key in keys)

    def _left(self) -> int:
        """Bytes that are still to be written."""
        return round((self.written.total - self.written.done) * self.written.bytes_an_image)

    def disk(self) -> contextlib.AbstractContextManager[None]:
        """Around whatever writes: a disk that takes no more is told of in full."""
        return writing_to(self.folder, self._state)

    def _state(self) -> str:
        """What is there and what is missing, for a run that has to stop."""
        if not self.speakers:  # it stops before it has begun
            with contextlib.suppress(OSError):
                self.written.done = self._count()
        done = f"{self.written.done} of {self.written.total} canvases are written and whole"
        return f"{done}; about {size_text(self._left())} more are needed"

    # ------------------------------------------------------------------------------------------------ doing it

    def _outer(self, size: int) -> tuple[int, int]:
        return identity.outer_size((size, size), self.views, self.stride)

    def _ask(self, name: str, teacher: Teacher, images: torch.Tensor, size: int) -> Features:
        features = ask(teacher, images, self._outer(size), self.stride)
        for what, part in (("summary", features.summary), ("map", features.spatial)):
            if part is not None and not bool(torch.isfinite(part).all()):
                raise ConfigError(f"teachers.{name}: its {what} is not finite: check its weights and its dtype")
        return features

    def _write(self, loader: CropLoader, batch: Batch) -> None:
        """Everything that is missing of a batch."""
        crops = [crop for _, _, crop in loader.planned(batch.step)]
        keys = [key_of(name, crop, batch.size) for name, crop in zip(batch.names, crops, strict=True)]
        # An image in place of an unreadable one, or at the end of the last pass, may be there twice.
        fresh = [i for i, key in enumerate(keys) if not self._whole(key) and keys.index(key) == i]
        if not fresh:
            return
        canvases = [identity.pixels_crc(batch.images[i]) for i in fresh]
        images = batch.images.to(self.device)
        begin_step(self.teachers.values(), 0, batch.step)
        for name, speaker in self.speakers.items():
            wanted = [(i, crc) for i, crc in zip(fresh, canvases, strict=True) if keys[i] not in speaker.pen]
            if not wanted:
                continue
            features = self._ask(name, speaker.teacher, images[[i for i, _ in wanted]], batch.size[0])
            grid = (0, 0) if features.spatial is None else (features.spatial.shape[-2], features.spatial.shape[-1])
            rows = speaker.coding.encode(features)
            for (i, crc), row in zip(wanted, rows, strict=True):
                self._append(speaker.pen, Record(keys[i], crc, grid), row)
        self.written.done += len(fresh)

    def _append(self, pen: Pen, record: Record, row: Any) -> None:
        with self.disk():
            pen.append(record, [row])
        self.written.records += 1
        self.written.bytes += row.nbytes
