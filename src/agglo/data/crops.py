"""Batches of fixed crops: every image has the same few crops in every run, so that teacher features can be cached."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agglo.data.loader import Batch, Loader
from agglo.data.shifts import max_shift
from agglo.data.views import PartitionLike, draw_positions, draw_resolution, generator, image_at
from agglo.recipe import Views
from agglo.sources.base import Source

_CROPS, _ROAM = 7, 8
"""Streams of random numbers (:func:`agglo.data.views.generator`): fixed crops, and views within them."""


@dataclass(frozen=True, slots=True)
class CropBatch(Batch):
    """A batch of fixed crops, with what the loader's ``fetch`` returned for it."""

    fetched: Mapping[str, Any] = field(default_factory=dict)


def margin(views: Views, stride: int, cells: Iterable[float] = ()) -> int:
    """Pixels rendered beyond each side of the model's view, so that no shifted or roaming view leaves the image.

    Args:
        views: their ``shift`` and ``roam``.
        stride: side of the model's patch in pixels.
        cells: sides of the teachers' patches in pixels of the model's view, where teachers are shifted too.
    """
    largest = max([float(stride), *cells])
    return (math.ceil(max_shift(views.shift) * largest / stride) + views.roam) * stride


def outer_size(size: tuple[int, int], views: Views, stride: int) -> tuple[int, int]:
    """``(H, W)`` of a fixed crop on the model's scale: a view of ``size`` and its margin."""
    extra = 2 * margin(views, stride)
    return size[0] + extra, size[1] + extra


def crop_generator(name: str, crop: int) -> np.random.Generator:
    """Random numbers of a fixed crop; they depend on the image's name and the crop's number only."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return generator(key, crop, 0, _CROPS)


def draw_roam(seed: int, step: int, batch: int, roam: int) -> Tensor:
    """Offsets of views from the middle of their crops: integers ``(B, 2)``, ``(y, x)``, in [-roam, roam] patches.

    A pure function of its arguments.
    """
    return torch.from_numpy(generator(seed, step, 0, _ROAM).integers(-roam, roam + 1, (batch, 2)))


class CropLoader(Loader):
    """A loader of fixed crops: epoch ``e`` over a source shows crop ``e % crops`` of each image.

    Args:
        crops: number of fixed crops per image, at least 1.
        fetch: called with a batch and the crop numbers of its samples, in the loader's threads, ahead of time; its
            result is the batch's ``fetched``.
        options: of :class:`Loader`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        partitions: Sequence[PartitionLike],
        views: Views,
        seed: int = 0,
        workers: int = 1,
        *,
        crops: int,
        fetch: Callable[[Batch, list[int]], Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(sources, weights, partitions, views, seed, workers, **options)
        self.crops, self.fetch = crops, fetch

    def planned(self, step: int) -> list[tuple[int, int, int]]:
        """``(source, index, crop)`` of each sample of a step; an unreadable image will be replaced by another."""
        draw = draw_resolution(self.seed, step, self.partitions)
        first, count = self._share(draw)
        return [
            (source, image_at(self.seed, source, position, self._lengths[source]), self._crop(source, position))
            for source, position in draw_positions(draw.start + first, count, self.weights)
        ]

    def _crop(self, source: int, position: int) -> int:
        return position // self._lengths[source] % self.crops

    def _chance(self, step: int, sample: int, source: int, index: int, position: int) -> np.random.Generator:
        del step, sample
        return crop_generator(self.sources[source].name(index), self._crop(source, position))

    def _prepare(self, step: int, stopped: Event) -> Batch:
        batch = super()._prepare(step, stopped)
        if self.fetch is None:
            return batch
        fetched = self.fetch(batch, [crop for _, _, crop in self.planned(step)])
        return CropBatch(**{each.name: getattr(batch, each.name) for each in fields(batch)}, fetched=fetched)
