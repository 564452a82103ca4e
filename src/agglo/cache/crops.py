"""Batches of fixed crops: each image has a few, whatever the run, so that what teachers say of them can be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agglo.data.loader import Batch, Loader
from agglo.data.views import PartitionLike, ViewPolicy, draw_positions, draw_resolution, generator, image_at
from agglo.sources.base import Source

_CROPS, _ROAM = 7, 8
"""The streams of random numbers (:func:`agglo.data.views.generator`) that draw fixed crops, and places in them."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One teacher's records for a batch, as they lie on the disk.

    Args:
        data: uint8 ``(B, bytes)``.
        grid: ``(h, w)`` of the maps.
    """

    data: np.ndarray
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TaughtBatch(Batch):
    """A batch that brings along what the teachers said of its canvases, by name."""

    taught: Mapping[str, Rows] = field(default_factory=dict)


def crop_chance(name: str, crop: int) -> np.random.Generator:
    """What decides a fixed crop: the image's name and the crop's number, neither the run's seed nor the step."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return generator(key, crop, 0, _CROPS)


def draw_roam(seed: int, step: int, batch: int, roam: int) -> Tensor:
    """Where in its canvas a step's view lies: ``(B, 2)`` whole numbers ``(y, x)`` from -roam to roam, in patches.

    A pure function of its arguments.

    Args:
        seed: of the run.
        step: the step.
        batch: samples.
        roam: most.
    """
    return torch.from_numpy(generator(seed, step, 0, _ROAM).integers(-roam, roam + 1, (batch, 2)))


class CropLoader(Loader):
    """A loader whose images come in ``crops`` fixed crops: in pass ``p`` over a source, each in its crop ``p % crops``.

    Args:
        crops: of each image, at least 1.
        fetch: given a batch and the number of each of its crops, finds what the teachers said of them; runs in the
            loader's threads, ahead of time.
        options: of :class:`Loader`.
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
        crops: int,
        fetch: Callable[[Batch, list[int]], Mapping[str, Rows]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(sources, weights, partitions, policy, seed, workers, **options)
        self.crops, self.fetch = crops, fetch

    def planned(self, step: int) -> list[tuple[int, int, int]]:
        """``(source, index, crop)`` of its samples of a step; another image replaces one that cannot be read."""
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
        return crop_chance(self.sources[source].name(index), self._crop(source, position))

    def _prepare(self, step: int, gone: Event) -> Batch:
        batch = super()._prepare(step, gone)
        if self.fetch is None:
            return batch
        taught = self.fetch(batch, [crop for _, _, crop in self.planned(step)])
        return TaughtBatch(**{each.name: getattr(batch, each.name) for each in fields(batch)}, taught=taught)
