"""Batches for training and for evals: read, crop, stack; ahead of time, in order, and without surprises."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from agglo.data.views import (
    Draw,
    PartitionLike,
    Quota,
    ViewPolicy,
    draw_positions,
    draw_resolution,
    draw_view,
    generator,
    image_at,
)
from agglo.preprocess import fit
from agglo.sources.base import FilteredImageError, PartialImage, ReadRequest, Source
from agglo.types import ConfigError, ImageError, View

_log = logging.getLogger(__name__)
_WHITE = np.float32(255)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's images.

    Args:
        images: RGB float32 ``(B, 3, H, W)`` in [0, 1]; not mixed yet (:func:`agglo.data.views.mixup`), so that
            the blend can be made on the device.
        views: where each lies in its source image, in pixels of the image as the loader keeps it (``max_side``).
        names: each image's name.
        step: the step.
        partition: index of the partition the size came from.
        skipped: names of bad images whose place another took.
        size: ``(H, W)`` that the student is to see this step; the images are larger where ``canvas`` or ``margin`` ask
            for it.
        field: share of the images' sides ``(h, w)`` that a view shows, in the middle; (1, 1) without a margin.
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
    """The consumer has gone; unfinished batches need not be finished."""


class Loader:
    """Training batches as a pure function of the step, whatever the threads, the cache and the history.

    Decoded images stay in memory until ``cache_mb`` is used up, and are never evicted: over shuffled passes that keeps
    the largest share of hits. A bad image is replaced by the next readable one of its source's pass, named once in the
    log and in :attr:`skipped`. One that a filter of its source leaves out is replaced the same way and only counted.

    Sources that can read a part (:meth:`agglo.sources.base.Source.read_part`) are asked for no more than a view needs.

    Args:
        sources: where images come from.
        weights: share of samples from each source, or None for shares by length.
        partitions: sizes, batches and shares of steps.
        policy: distribution of crops.
        seed: of everything random here.
        workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
        cache_mb: budget of decoded images, in MiB.
        canvas: views are rendered with at least this shorter side, in pixels, for teachers that want more pixels than
            the student; whoever wants fewer shrinks them. One number, or one for each size of each partition.
        margin: pixels of the student's view that are rendered beyond each of its sides, for views that are shifted.
        max_side: images with a longer side in pixels are read whole and shrunk to it, always, cached or not.
        part: ``(k, n)``: of every batch only the k-th of n equal parts, in the order of its samples.

    Attributes:
        skipped: name to reason of every bad image met so far.
        filtered: how many images each filter has left out so far.

    Raises:
        ConfigError: no sources, an empty one, or weights or partitions that cannot be drawn from.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        partitions: Sequence[PartitionLike],
        policy: ViewPolicy,
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
            raise ConfigError(f"data.sources: {len(weights)} weights for {len(sources)} sources")
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
        self._left_out: dict[int, np.ndarray] = {}  # for each source that has filters, a flag an image

    def batch(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            ConfigError: no image of a source it needs can be read.
        """
        return self._prepare(step, Event())

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps ``start .. stop``, in order, prepared ahead by ``workers`` threads.

        At most ``workers + 1`` batches wait. An error is raised where its batch is due. Closing the generator, or an
        exception in it such as Ctrl-C, drops what is unfinished.
        """
        if self.workers < 1:
            for step in range(start, stop):
                yield self.batch(step)
            return
        gone = Event()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="agglo-loader")
        steps = iter(range(start, stop))
        waiting: deque[Future[Batch]] = deque()
        try:
            for step in steps:
                waiting.append(pool.submit(self._prepare, step, gone))
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            gone.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int, gone: Event) -> Batch:
        """Runs in threads, so without torch kernels that would start threads of their own."""
        draw = draw_resolution(self.seed, step, self.partitions)
        size = self._rendered(draw.size, draw.partition)
        first, count = self._share(draw)
        shown = BatchRenderer(count, size)
        views: list[View] = []
        names: list[str] = []
        skipped: list[str] = []
        for sample, (source, position) in enumerate(draw_positions(draw.start + first, count, self.weights), first):
            if gone.is_set():
                raise _StoppedError
            index, (part, view), bad = self._readable(size, step, sample, source, position)
            shown.add(part, view)
            views.append(view)
            names.append(self.sources[source].name(index))
            skipped.extend(bad)
        field = draw.size[0] / (draw.size[0] + 2 * self.margin), draw.size[1] / (draw.size[1] + 2 * self.margin)
        return Batch(shown.finish(), views, names, step, draw.partition, skipped, draw.size, field)

    def _share(self, draw: Draw) -> tuple[int, int]:
        """The first of a step's samples that this loader prepares, and how many."""
        count = draw.batch // self.part[1]
        return self.part[0] * count, count

    def _chance(self, step: int, sample: int, source: int, index: int, position: int) -> np.random.Generator:
        """What decides a sample's crop: here where in the run it comes, elsewhere which image it is."""
        del source, index, position
        return generator(self.seed, step, sample)

    def _rendered(self, size: tuple[int, int], partition: int) -> tuple[int, int]:
        canvas = self.canvas if isinstance(self.canvas, int | None) else self.canvas[partition][min(size)]
        scale = max(1.0, (canvas or 0) / min(size))
        return round((size[0] + 2 * self.margin) * scale), round((size[1] + 2 * self.margin) * scale)

    def _readable(
        self, size: tuple[int, int], step: int, sample: int, source: int, position: int
    ) -> tuple[int, tuple[PartialImage | Image.Image, View], list[str]]:
        """The image at a position and its view, or the next readable one of the same pass.

        The search goes round within the pass, so that it depends on nothing but the position.

        Returns:
            ``(index, (image, view), names of bad images passed over)``.
        """
        length = self._lengths[source]
        first = position - position % length
        bad: list[str] = []
        for offset in range(length):
            index = image_at(self.seed, source, first + (position + offset) % length, length)

            def look(full: tuple[int, int], index: int = index) -> View:
                return draw_view(full, size, self.policy, self._chance(step, sample, source, index, position))

            try:
                with self._noting(source, index):
                    return index, self._open(source, index, look), bad
            except FilteredImageError:
                continue
            except ImageError as error:
                bad.append(error.name)
        why = [f"{bad[0]}: {self.skipped[bad[0]]}"] if bad else []
        why += [f"{count} left out by {rule}" for rule, count in self.filtered.items()]
        raise ConfigError(f"data.sources.{source}: none of its {length} images can be read; {'; '.join(why)}")

    def _open(
        self, source: int, index: int, look: Callable[[tuple[int, int]], View]
    ) -> tuple[PartialImage | Image.Image, View]:
        if self._parts[source]:
            return self._read_part(source, index, look)
        image = self._read(source, index)
        return image, look((image.height, image.width))

    @contextmanager
    def _noting(self, source: int, index: int) -> Iterator[None]:
        """Remembers which images are bad or unwanted, and tells of them once; reads none of them twice."""
        key = source, index
        if key in self._bad:
            # A fresh error each time: one that is kept would keep, through its traceback, every batch it passed.
            raise ImageError(*self._bad[key])
        if source in self._left_out and self._left_out[source][index]:
            raise FilteredImageError("", "", "")
        try:
            yield
        except FilteredImageError as error:
            with self._lock:
                flags = self._left_out.setdefault(source, np.zeros(self._lengths[source], bool))
                new, flags[index] = not flags[index], True  # another thread may have read the same image meanwhile
                self.filtered[error.rule] += int(new)
                count = self.filtered[error.rule]
            if new and str(count).strip("0") == "1":  # the first, the tenth, the hundredth, ...
                _log.warning("left out %d so far by %s, such as %s: %s", count, error.rule, error.name, error.why)
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
        self, source: int, index: int, look: Callable[[tuple[int, int]], View]
    ) -> tuple[PartialImage | Image.Image, View]:
        """What a view needs of an image, and the view. Images are kept whole, at each resolution that was needed."""
        key = source, index
        if (cached := self._cache.get(key)) is not None:
            return cached, look((cached.height, cached.width))
        kept = self._kept.get(key, {})
        for known in kept.values():
            view, wanted = align_view(look(known.size), known.size)
            if (part := kept.get(wanted.shrink)) is not None:
                return part, view
            break
        asked: list[tuple[View, ReadRequest]] = []

        def need(full: tuple[int, int]) -> ReadRequest:
            view, wanted = align_view(look(full), full)
            asked.append((view, wanted))
            fits = 3 * full[0] * full[1] <= self._room * wanted.shrink**2
            return wanted._replace(rows=full[0]) if fits else wanted

        part = self.sources[source].read_part(index, need)
        if isinstance(part, Image.Image):
            self._keep(key, part)
            return part, look((part.height, part.width))
        view, wanted = asked[-1]
        cost = part.array.nbytes
        if len(part.array) == -(-part.size[0] // part.shrink) and cost <= self._room:
            with self._lock:
                kept = dict(self._kept.get(key, {}))
                if part.shrink not in kept and cost <= self._room:
                    kept[part.shrink] = part
                    self._room -= cost
                if part.shrink in kept:
                    kept[wanted.shrink] = kept[part.shrink]  # it cannot be shrunk any further while it is read
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
        indices: in the source, of the images that are here.
        images: RGB float32 ``(B, 3, H, W)`` in [0, 1].
        skipped: name to reason of the bad images passed over since the batch before.
    """

    indices: list[int]
    images: Tensor
    skipped: dict[str, str]


def evaluation_batches(
    source: Source, size: int | tuple[int, int], batch_size: int, resize: Literal["cover", "stretch"] = "cover"
) -> Iterator[EvaluationBatch]:
    """Every readable image of a source once, in order.

    Args:
        size: side of the square, or ``(H, W)``, in pixels.
        batch_size: images at a time; fewer where some are bad, and at the end.
        resize: ``cover`` scales the image until it covers the canvas and keeps the centre; ``stretch`` bends it.

    Raises:
        ConfigError: the source is empty or none of its images can be read.
        ValueError: no such resize, or a batch of no images.
    """
    if resize not in ("cover", "stretch"):
        raise ValueError(f"resize is cover or stretch, got {resize!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    canvas = (size, size) if isinstance(size, int) else size
    ready: EvaluationBatch | None = None  # held back by one, so that skips after the last good image are reported
    skipped: dict[str, str] = {}
    for start in range(0, len(source), batch_size):
        indices: list[int] = []
        pixels: list[Tensor] = []
        for index in range(start, min(start + batch_size, len(source))):
            try:
                image = source.read(index)
            except ImageError as error:
                skipped[error.name] = error.why
                _log.warning("skipped %s: %s", error.name, error.why)
                continue
            indices.append(index)
            pixels.append(fit(image, canvas, "stretch" if resize == "stretch" else "crop"))
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
