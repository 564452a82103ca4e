"""Batches for training and evaluation: read, crop and stack images, prefetched and in deterministic order."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.data.pixels import BatchRenderer, align_view
from agglo.data.views import Draw, PartitionLike, Quota, draw_positions, draw_resolution, draw_view, generator, image_at
from agglo.preprocess import fit
from agglo.recipe import Views
from agglo.sources.base import FilteredImageError, PartialImage, ReadRequest, Source
from agglo.types import ConfigError, ImageError, View

_log = logging.getLogger(__name__)
_WHITE = np.float32(255)


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of one step.

    Args:
        images: RGB float32 ``(B, 3, H, W)`` in [0, 1], before :func:`agglo.data.views.mixup`, which runs on the device.
        views: geometry of each crop, in pixels of its source image (after ``max_side``).
        names: name of each image.
        step: the step.
        partition: index of the partition of this step.
        skipped: names of unreadable images that were replaced.
        size: ``(H, W)`` of the student's input; the images are larger with ``canvas`` or ``margin``.
        field: central share ``(h, w)`` of the images' sides that a view covers; (1, 1) without a margin.
    """

    images: Tensor
    views: list[View]
    names: list[str]
    step: int
    partition: int
    skipped: list[str]
    size: tuple[int, int]
    field: tuple[float, float] = (1.0, 1.0)


class _StoppedError(Exception):
    """Raised in loader threads after the consumer stopped."""


class Loader:
    """Training batches as a pure function of the step, independent of threads, cache and history.

    Decoded images stay in memory until ``cache_mb`` is used up and are never evicted, which maximises hits over
    shuffled epochs. An unreadable image is replaced by the next readable one of its source's epoch, and named once in
    the log and in :attr:`skipped`. An image excluded by a filter is replaced likewise and only counted.

    Sources with partial reading (:meth:`agglo.sources.base.Source.read_part`) decode only what a view needs.

    Args:
        sources: sources of images.
        weights: share of samples from each source; None uses their lengths.
        partitions: sizes, batch sizes and shares of steps.
        policy: distribution of crops.
        seed: seed of all randomness here.
        workers: prefetching threads; 0 prepares each batch on request.
        cache_mb: memory for decoded images, in MiB.
        canvas: minimum shorter side, in pixels, at which views are rendered, for teachers with larger inputs than the
            student's. One number, or one per size of each partition.
        margin: pixels rendered beyond each side of the student's view, for shifted views.
        max_side: images with a longer side (pixels) are read whole and shrunk to it, whether cached or not.
        part: ``(k, n)``: prepare only the k-th of n equal parts of every batch.

    Attributes:
        skipped: reason for each unreadable image so far, by name.
        filtered: number of images excluded so far, by filter.

    Raises:
        ConfigError: no sources, an empty source, or invalid weights or partitions.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        partitions: Sequence[PartitionLike],
        policy: Views,
        seed: int = 0,
        workers: int = 1,
        *,
        cache_mb: int = 1024,
        canvas: int | Sequence[Mapping[int, int]] | None = None,
        margin: int = 0,
        max_side: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if not sources:
            raise ConfigError("data.sources: at least one is needed")
        self._lengths = [len(source) for source in sources]
        for number, length in enumerate(self._lengths):
            if length == 0:
                raise ConfigError(f"data.sources.{number}: the source is empty")
        if weights is not None and len(weights) != len(sources):
            raise ConfigError(f"data.sources: {len(weights)} weights for {len(sources)} sources; give one per source")
        self.sources = tuple(sources)
        self.weights = tuple(self._lengths if weights is None else weights)
        self.partitions = tuple(partitions)
        self.policy = policy
        self.seed = seed
        self.workers = workers
        self.canvas = canvas
        self.margin = margin
        self.max_side = max_side
        self.part = part
        self.skipped: dict[str, str] = {}
        self.filtered: Counter[str] = Counter()
        Quota(self.weights)
        draw_resolution(seed, 0, self.partitions)
        self._lock = Lock()
        self._cache: dict[tuple[int, int], Image.Image] = {}
        self._room = cache_mb * 2**20
        self._parts = [
            max_side is None and getattr(type(source), "read_part", Source.read_part) is not Source.read_part
            for source in sources
        ]
        self._kept: dict[tuple[int, int], dict[int, PartialImage]] = {}
        self._bad: dict[tuple[int, int], tuple[str, str]] = {}
        self._excluded: dict[int, np.ndarray] = {}  # one flag per image, for sources with filters

    def batch(self, step: int) -> Batch:
        """The batch of a step; raises ConfigError if no image of a required source can be read."""
        return self._prepare(step, Event())

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps ``start .. stop``, in order, prefetched by ``workers`` threads.

        At most ``workers + 1`` batches are buffered. Errors are raised in order of the batches. Closing the generator,
        or an exception in it such as Ctrl-C, discards unfinished batches.
        """
        if self.workers < 1:
            for step in range(start, stop):
                yield self.batch(step)
            return
        stopped = Event()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="agglo-loader")
        steps = iter(range(start, stop))
        pending: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                pending.append(pool.submit(self._prepare, step, stopped))
                if len(pending) > self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int, stopped: Event) -> Batch:
        """Runs in threads, so it avoids torch kernels, which start threads themselves."""
        draw = draw_resolution(self.seed, step, self.partitions)
        size = self._rendered(draw.size, draw.partition)
        first, count = self._share(draw)
        renderer = BatchRenderer(count, size)
        views: list[View] = []
        names: list[str] = []
        skipped: list[str] = []
        for sample, (source, position) in enumerate(draw_positions(draw.start + first, count, self.weights), first):
            if stopped.is_set():
                raise _StoppedError
            index, (part, view), bad = self._readable(size, step, sample, source, position)
            renderer.add(part, view)
            views.append(view)
            names.append(self.sources[source].name(index))
            skipped.extend(bad)
        field = draw.size[0] / (draw.size[0] + 2 * self.margin), draw.size[1] / (draw.size[1] + 2 * self.margin)
        return Batch(renderer.finish(), views, names, step, draw.partition, skipped, draw.size, field)

    def _share(self, draw: Draw) -> tuple[int, int]:
        """First sample and number of samples of a step that this loader prepares."""
        count = draw.batch // self.part[1]
        return self.part[0] * count, count

    def _chance(self, step: int, sample: int, source: int, index: int, position: int) -> np.random.Generator:
        """Generator of a sample's crop, here by position in the run; subclasses may use the image instead."""
        del source, index, position
        return generator(self.seed, step, sample)

    def _rendered(self, size: tuple[int, int], partition: int) -> tuple[int, int]:
        canvas = self.canvas if isinstance(self.canvas, int | None) else self.canvas[partition][min(size)]
        scale = max(1.0, (canvas or 0) / min(size))
        return round((size[0] + 2 * self.margin) * scale), round((size[1] + 2 * self.margin) * scale)

    def _readable(
        self, size: tuple[int, int], step: int, sample: int, source: int, position: int
    ) -> tuple[int, tuple[PartialImage | Image.Image, View], list[str]]:
        """The image at a position and its view, or the next readable one of the same epoch.

        The search wraps around within the epoch, so that it depends on the position alone.

        Returns:
            ``(index, (image, view), names of unreadable images skipped)``.
        """
        length = self._lengths[source]
        first = position - position % length
        bad: list[str] = []
        for offset in range(length):
            index = image_at(self.seed, source, first + (position + offset) % length, length)

            def view_of(full: tuple[int, int], index: int = index) -> View:
                return draw_view(full, size, self.policy, self._chance(step, sample, source, index, position))

            try:
                with self._recording(source, index):
                    return index, self._open(source, index, view_of), bad
            except FilteredImageError:
                continue
            except ImageError as error:
                bad.append(error.name)
        why = [f"{bad[0]}: {self.skipped[bad[0]]}"] if bad else []
        why += [f"{count} excluded by {rule}" for rule, count in self.filtered.items()]
        raise ConfigError(f"data.sources.{source}: none of its {length} images can be read; {'; '.join(why)}")

    def _open(
        self, source: int, index: int, view_of: Callable[[tuple[int, int]], View]
    ) -> tuple[PartialImage | Image.Image, View]:
        if self._parts[source]:
            return self._read_part(source, index, view_of)
        image = self._read(source, index)
        return image, view_of((image.height, image.width))

    @contextmanager
    def _recording(self, source: int, index: int) -> Iterator[None]:
        """Record unreadable and excluded images, log them once, and raise at once for those recorded."""
        key = source, index
        if key in self._bad:
            # A new error each time: the traceback of a stored one would keep batches alive.
            raise ImageError(*self._bad[key])
        if source in self._excluded and self._excluded[source][index]:
            raise FilteredImageError("", "", "")
        try:
            yield
        except FilteredImageError as error:
            with self._lock:
                flags = self._excluded.setdefault(source, np.zeros(self._lengths[source], bool))
                new, flags[index] = not flags[index], True  # another thread may have recorded it meanwhile
                self.filtered[error.rule] += int(new)
                count = self.filtered[error.rule]
            if new and str(count).strip("0") == "1":  # the first, the tenth, the hundredth, ...
                _log.warning("excluded %d so far by %s, e.g. %s: %s", count, error.rule, error.name, error.why)
            raise
        except ImageError as error:
            with self._lock:
                self._bad[key] = error.name, error.why
                new = error.name not in self.skipped
                self.skipped[error.name] = error.why
            if new:
                _log.warning("skipped %s: %s", error.name, error.why)
            raise

    def _read_part(
        self, source: int, index: int, view_of: Callable[[tuple[int, int]], View]
    ) -> tuple[PartialImage | Image.Image, View]:
        """The part of an image that a view needs, and the view. Caches whole images at each requested resolution."""
        key = source, index
        if (cached := self._cache.get(key)) is not None:
            return cached, view_of((cached.height, cached.width))
        kept = self._kept.get(key, {})
        for known in kept.values():
            view, wanted = align_view(view_of(known.size), known.size)
            if (part := kept.get(wanted.shrink)) is not None:
                return part, view
            break
        requests: list[tuple[View, ReadRequest]] = []

        def need(full: tuple[int, int]) -> ReadRequest:
            view, wanted = align_view(view_of(full), full)
            requests.append((view, wanted))
            fits = 3 * full[0] * full[1] <= self._room * wanted.shrink**2
            return wanted._replace(rows=full[0]) if fits else wanted

        part = self.sources[source].read_part(index, need)
        if isinstance(part, Image.Image):
            self._keep(key, part)
            return part, view_of((part.height, part.width))
        view, wanted = requests[-1]
        cost = part.array.nbytes
        if len(part.array) == -(-part.size[0] // part.shrink) and cost <= self._room:
            with self._lock:
                kept = dict(self._kept.get(key, {}))
                if part.shrink not in kept and cost <= self._room:
                    kept[part.shrink] = part
                    self._room -= cost
                if part.shrink in kept:
                    kept[wanted.shrink] = kept[part.shrink]  # the source cannot shrink it further
                    self._kept[key] = kept
        return part, view

    def _read(self, source: int, index: int) -> Image.Image:
        key = source, index
        if (cached := self._cache.get(key)) is not None:
            return cached
        image = self.sources[source].read(index)
        if self.max_side is not None and max(image.size) > self.max_side:
            ratio = self.max_side / max(image.size)
            width, height = (max(1, round(side * ratio)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        self._keep(key, image)
        return image

    def _keep(self, key: tuple[int, int], image: Image.Image) -> None:
        cost = image.width * image.height * 4  # PIL keeps RGB in 32 bits
        with self._lock:
            if key not in self._cache and cost <= self._room:
                self._cache[key] = image
                self._room -= cost


class EvaluationBatch(NamedTuple):
    """Images for an eval.

    Args:
        indices: index in the source of each image.
        images: RGB float32 ``(B, 3, H, W)`` in [0, 1].
        skipped: reason for each unreadable image since the previous batch, by name.
    """

    indices: list[int]
    images: Tensor
    skipped: dict[str, str]


def evaluation_batches(
    source: Source,
    size: int | tuple[int, int],
    batch_size: int,
    resize: Literal["cover", "stretch"] = "cover",
    *,
    workers: int = 0,
) -> Iterator[EvaluationBatch]:
    """Every readable image of a source once, in order.

    Args:
        size: side of a square, or ``(H, W)``, in pixels.
        batch_size: images per batch; fewer if some are unreadable, and at the end.
        resize: ``cover`` keeps the aspect ratio and crops the centre; ``stretch`` ignores the aspect ratio.
        workers: threads that read and resize the images of the next two batches; 0 reads on request. The tensors are
            the same.

    Raises:
        ConfigError: the source is empty or none of its images can be read.
        ValueError: an unknown ``resize``, or ``batch_size`` below 1.
    """
    if resize not in ("cover", "stretch"):
        raise ValueError(f"resize must be cover or stretch, got {resize!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    shape = (size, size) if isinstance(size, int) else size
    ready: EvaluationBatch | None = None  # delayed by one batch, to report skips after the last readable image
    skipped: dict[str, str] = {}

    def read(index: int) -> Tensor | ImageError:
        try:
            return fit(source.read(index), shape, "stretch" if resize == "stretch" else "crop")
        except ImageError as error:
            return error.with_traceback(None)  # frames would keep the file's bytes alive

    with contextlib.closing(_ahead(read, len(source), workers, 2 * batch_size)) as results:
        for start in range(0, len(source), batch_size):
            indices: list[int] = []
            pixels: list[Tensor] = []
            for index, result in enumerate(itertools.islice(results, batch_size), start):
                if isinstance(result, ImageError):
                    skipped[result.name] = result.why
                    _log.warning("skipped %s: %s", result.name, result.why)
                    continue
                indices.append(index)
                pixels.append(result)
            if indices:
                if ready is not None:
                    yield ready
                ready = EvaluationBatch(indices, torch.stack(pixels), skipped)
                skipped = {}
    if ready is None:
        example = "".join(f"; {name}: {why}" for name, why in list(skipped.items())[:1])
        raise ConfigError(f"none of the source's {len(source)} images can be read{example}")
    ready.skipped.update(skipped)
    yield ready


def _ahead(
    work: Callable[[int], Tensor | ImageError], count: int, workers: int, ahead: int
) -> Generator[Tensor | ImageError, None, None]:
    """Results of ``work(0 .. count)`` in order, at most ``ahead`` of them computed before they are needed."""
    if workers < 1:
        yield from map(work, range(count))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="agglo-reader")
    pending: deque[Future[Tensor | ImageError]] = deque()
    try:
        for index in range(count):
            pending.append(pool.submit(work, index))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
