"""Partition, size, images and crops of every step, as pure functions of (seed, step, sample).

Nothing here has state, so a run is the same with any number of threads, in any order, and after it is resumed.

Two techniques make that cheap. Random numbers come from Philox, a counter-based generator keyed by the seed and
addressed by (stream, step, sample). Shares (of sources among samples, of partitions among steps) are *quotas*: of the
first ``n`` draws between two choices, ``round(n w_1 / (w_1 + w_2))`` go to the first; more choices form a binary tree.
Every share is exact to half a draw per level at any point, and the number of earlier draws of a choice, hence the
position of each source in its shuffled epochs, is computed in O(log choices).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo import dist
from agglo.recipe import Views
from agglo.types import ConfigError, View

_VIEWS, _ORDER, _SIZES, _MIX = range(4)
"""Independent random streams."""
_WORD = (1 << 64) - 1
_RESOLUTION_OF_WEIGHTS = 1 << 32
_LONG = 1 << 20
"""Longer sources are shuffled without storing a permutation."""
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Partition:
    """Resolutions that share a batch size; see :class:`PartitionLike`."""

    sizes: Sequence[int | tuple[int, int]]
    batch: int
    weight: float = 1.0


class PartitionLike(Protocol):
    """Sides of squares or ``(H, W)`` in pixels, images per step, and the share of steps."""

    @property
    def sizes(self) -> Sequence[int | tuple[int, int]]: ...

    @property
    def batch(self) -> int: ...

    @property
    def weight(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """Size and samples of one step.

    Args:
        partition: index of the partition.
        size: ``(H, W)`` of every view in the step.
        batch: number of images.
        start: number of samples in all earlier steps.
    """

    partition: int
    size: tuple[int, int]
    batch: int
    start: int


# ---------------------------------------------------------------------------------------------------- randomness


def generator(seed: int, step: int, sample: int, stream: int = _VIEWS) -> np.random.Generator:
    """Independent generator for one sample of one step (Philox, Salmon et al. 2011).

    Args:
        seed: seed of the run, modulo 2**64.
        step, sample: non-negative.
        stream: separates independent uses.
    """
    bits = np.random.Philox(
        key=np.array([seed & _WORD, stream], dtype=np.uint64),
        counter=np.array([0, 0, sample, step], dtype=np.uint64),  # the low 128 bits count: streams cannot overlap
    )
    return np.random.Generator(bits)


# ---------------------------------------------------------------------------------------------------- quotas


class Quota:
    """Deterministic draws among weighted choices, countable at any point.

    Args:
        weights: non-negative and finite, at least one positive; resolved to one part in 2**32.

    Raises:
        ConfigError: invalid weights.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = math.fsum(weights)
        if not weights or not all(w >= 0 for w in weights) or not 0 < total < math.inf:
            raise ConfigError(f"weights must be finite, non-negative and not all 0; got {list(weights)}")
        # Integers, because float rounding would miscount after many draws.
        whole = [max(1, round(w / total * _RESOLUTION_OF_WEIGHTS)) if w > 0 else 0 for w in weights]
        self._sums = [0, *itertools.accumulate(whole)]

    def _left(self, first: int, middle: int, last: int, draws: int) -> int:
        """Number of ``draws`` among the choices ``first .. last`` that fall before ``middle``."""
        total = self._sums[last] - self._sums[first]
        return (2 * (self._sums[middle] - self._sums[first]) * draws + total) // (2 * total) if total else 0

    def before(self, draw: int) -> list[int]:
        """Count of each choice in the first ``draw`` draws."""

        def count(first: int, last: int, draws: int) -> list[int]:
            if last - first == 1:
                return [draws]
            middle = (first + last) // 2
            left = self._left(first, middle, last, draws)
            return count(first, middle, left) + count(middle, last, draws - left)

        return count(0, len(self._sums) - 1, draw)

    def choice(self, draw: int) -> tuple[int, int]:
        """``(choice, number of earlier draws of it)`` of draw number ``draw`` (from 0)."""
        first, last = 0, len(self._sums) - 1
        while last - first > 1:
            middle = (first + last) // 2
            left = self._left(first, middle, last, draw)
            if self._left(first, middle, last, draw + 1) > left:
                last, draw = middle, left
            else:
                first, draw = middle, draw - left
        return first, draw


def draw_resolution(seed: int, step: int, partitions: Sequence[PartitionLike]) -> Draw:
    """The partition, size and samples of a step; equal on every rank (docs/method.md, 3.1).

    Partitions follow their weights by quota; the size is uniform in the partition.

    Raises:
        ConfigError: no partitions, or one without sizes or with batch below 1.
    """
    if not partitions:
        raise ConfigError("partitions: at least one is needed")
    for number, partition in enumerate(partitions):
        if not partition.sizes or partition.batch < 1:
            raise ConfigError(f"partitions.{number}: needs sizes and a batch of at least 1")
    quota = Quota([p.weight for p in partitions])
    start = sum(n * p.batch for n, p in zip(quota.before(step), partitions, strict=True))
    index, _ = quota.choice(step)
    sizes = partitions[index].sizes
    size = sizes[int(generator(seed, step, 0, _SIZES).integers(len(sizes)))]
    height, width = (size, size) if isinstance(size, int) else size
    return Draw(partition=index, size=(height, width), batch=partitions[index].batch, start=start)


def draw_positions(start: int, count: int, weights: Sequence[float]) -> list[tuple[int, int]]:
    """Samples ``start .. start + count`` as ``(source, position in the endless sequence of that source)``."""
    quota = Quota(weights)
    return [quota.choice(sample) for sample in range(start, start + count)]


def image_at(seed: int, source: int, position: int, length: int) -> int:
    """The image at a position of a source's endless sequence of independently shuffled epochs.

    Args:
        source: index of the source; sources of equal length are shuffled differently.
        position: from 0; the epoch is ``position // length``.
        length: number of images in the source.
    """
    epoch, place = divmod(position, length)
    if length > _LONG:
        return _shuffled(place, length, _round_keys(seed, source, epoch))
    return int(_order(seed, source, epoch, length)[place])


@lru_cache(maxsize=32)
def _order(seed: int, source: int, epoch: int, length: int) -> np.ndarray:
    return generator(seed, epoch, source, _ORDER).permutation(length)


@lru_cache(maxsize=32)
def _round_keys(seed: int, source: int, epoch: int) -> tuple[int, ...]:
    return tuple(generator(seed, epoch, source, _ORDER).integers(1 << 63, size=_ROUNDS).tolist())


def _shuffled(place: int, length: int, keys: Sequence[int]) -> int:
    """One element of a keyed permutation of ``0 .. length - 1``, in constant memory.

    A Feistel network (Luby and Rackoff 1988) permutes the next power of 4; results out of range pass through it again,
    fewer than four times on average (Black and Rogaway 2002).
    """
    half = ((length - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            word = (right ^ key) * 0xBF58476D1CE4E5B9 & _WORD  # one round of splitmix64
            word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
            left, right = right, left ^ (word >> 33) & mask
        place = left << half | right
        if place < length:
            return place


# ---------------------------------------------------------------------------------------------------- geometry


def draw_view(source_size: tuple[int, int], size: tuple[int, int], policy: Views, rng: np.random.Generator) -> View:
    """Geometry of a random crop inside an image.

    The area is drawn first, then the aspect ratio from the part of its range that fits the image at that area, then the
    position. Exactly five numbers are drawn and none is rejected.

    Args:
        source_size: ``(H, W)`` of the image.
        size: ``(H, W)`` of the view.
    """
    (height, width), (rows, columns) = source_size, size
    u_area, u_aspect, u_x, u_y, u_flip = rng.random(5).tolist()
    area = policy.scale[0] + (policy.scale[1] - policy.scale[0]) * u_area
    low, high = (a * columns / rows for a in policy.aspect)
    fit_low, fit_high = area * width / height, width / (area * height)  # limits from the image's height and width
    if max(low, fit_low) <= min(high, fit_high):
        low, high = max(low, fit_low), min(high, fit_high)
        aspect = low * (high / low) ** u_aspect
        box_w, box_h = math.sqrt(area * width * height * aspect), math.sqrt(area * width * height / aspect)
    else:
        aspect = high if fit_low > high else low
        box_w, box_h = min(width, height * aspect), min(height, width / aspect)
    box_w, box_h = min(box_w, width), min(box_h, height)
    return _window((width - box_w) * u_x, (height - box_h) * u_y, box_w, box_h, size, bool(u_flip < policy.flip))


def _window(x: float, y: float, width: float, height: float, size: tuple[int, int], flip: bool = False) -> View:
    """The view of a window of the source, given by corner and extent in source pixels."""
    scale = size[1] / width, size[0] / height
    return View(size=size, scale=scale, offset=(-x * scale[0], -y * scale[1]), flip=flip)


def render(image: Image.Image, view: View) -> Tensor:
    """Pixels of a view of an RGB image, uint8 ``(3, H, W)``; black outside the image.

    One bicubic, antialiased resampling, then the flip.
    """
    x0, y0, x1, y1 = view.box
    left, top = min(0, math.floor(x0 + 1e-6)), min(0, math.floor(y0 + 1e-6))
    right, bottom = max(image.width, math.ceil(x1 - 1e-6)), max(image.height, math.ceil(y1 - 1e-6))
    if (left, top, right, bottom) != (0, 0, image.width, image.height):
        image = image.crop((left, top, right, bottom))  # whole pixels: pads without resampling
    # Clamp rounding errors, which PIL refuses.
    box = (
        max(x0 - left, 0.0),
        max(y0 - top, 0.0),
        min(x1 - left, float(image.width)),
        min(y1 - top, float(image.height)),
    )
    height, width = view.size
    pixels = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if view.flip:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(np.asarray(pixels).transpose(2, 0, 1), order="C"))


def mixup(images: Tensor, seed: int, step: int, probability: float) -> Tensor:
    """Mixup for distillation: ``lambda x + (1 - lambda) x[order]`` ("function matching", Beyer et al. 2022).

    Runs before student and teachers, which need the same blend. Each image has its own lambda: ``max(u, 1 - u)`` of a
    uniform u, that is Beta(1, 1) with the image itself as the larger part. Images are blended across all processes.

    Args:
        images: float ``(B, 3, H, W)``, on any device: this process's part of the batch.
        seed: seed of the run.
        step: the step; determines the blend together with the seed.
        probability: probability of blending a step, :attr:`Views.mixup`.

    Returns:
        The blend, or ``images`` itself if the step is not blended.
    """
    rng = generator(seed, step, 0, _MIX)
    if rng.random() >= probability:
        return images
    count, mine = len(images) * dist.world_size(), dist.local_slice(len(images))
    order = torch.from_numpy(rng.permutation(count)[mine]).to(images.device, non_blocking=True)
    u = rng.random(count)[mine]
    weight = torch.from_numpy(np.maximum(u, 1 - u)).to(images.dtype).to(images.device, non_blocking=True)
    weight = weight.view(-1, 1, 1, 1)
    return torch.lerp(dist.gather_rows(images)[order], images, weight)
