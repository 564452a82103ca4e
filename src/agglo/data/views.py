"""What every step sees, as pure functions of (seed, step, sample).

Nothing here has state. Which partition, which size, which images, which crop: each is computed from the seed and the
step alone, so a run is the same on any number of threads, in any order, and after it is resumed.

Two devices make that cheap. Randomness comes from Philox, a counter-based generator, keyed by the seed and addressed
by (stream, step, sample). Shares (of sources in the samples, of partitions in the steps) are *quotas*: of the first
``n`` draws between two choices, ``round(n w_1 / (w_1 + w_2))`` go to the first; more choices are halves of halves.
Every share holds to within half a draw a level, at any point, and how often a choice was drawn before is computed in
O(log choices), hence where each source stands in its own shuffled passes.
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
from agglo.types import ConfigError, View

_VIEWS, _ORDER, _SIZES, _MIX = range(4)
"""Streams of random numbers that never meet."""
_WORD = (1 << 64) - 1
_RESOLUTION_OF_WEIGHTS = 1 << 32
_LONG = 1 << 20
"""Sources of more images are shuffled without a table of their order."""
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class ViewPolicy:
    """The distribution of crops.

    Args:
        scale: share of the image's area in a crop, uniform in this range, within (0, 1].
        aspect: horizontal over vertical extent of a crop, relative to the canvas; log-uniform in this range. Where an
            image is too narrow for both at once the aspect range is kept and the area gives way.
        flip: probability of a mirror image.
        mixup: probability that a batch is blended with itself in another order (:func:`mixup`).

    Raises:
        ConfigError: a value outside its range.
    """

    scale: tuple[float, float] = (0.35, 1.0)
    aspect: tuple[float, float] = (0.75, 1.333)
    flip: float = 0.5
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"views.scale: needs 0 < low <= high <= 1 (shares of the area), got {self.scale}")
        if not (0 < self.aspect[0] <= self.aspect[1] and math.isfinite(self.aspect[1])):
            raise ConfigError(f"views.aspect: needs 0 < low <= high, got {self.aspect}")
        for key in ("flip", "mixup"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"views.{key}: is a probability in [0, 1], got {getattr(self, key)}")


@dataclass(frozen=True, slots=True)
class Partition:
    """Resolutions that share a batch size; see :class:`PartitionLike`."""

    sizes: Sequence[int | tuple[int, int]]
    batch: int
    weight: float = 1.0


class PartitionLike(Protocol):
    """Sides of squares or ``(H, W)`` in pixels, images a step, and the share of steps (the recipe's partitions fit)."""

    @property
    def sizes(self) -> Sequence[int | tuple[int, int]]: ...

    @property
    def batch(self) -> int: ...

    @property
    def weight(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step is made of.

    Args:
        partition: index of the partition.
        size: ``(H, W)`` of every view in the step.
        batch: images in the step.
        start: samples drawn by all steps before it.
    """

    partition: int
    size: tuple[int, int]
    batch: int
    start: int


# ---------------------------------------------------------------------------------------------------- randomness


def generator(seed: int, step: int, sample: int, stream: int = _VIEWS) -> np.random.Generator:
    """Random numbers that belong to one sample of one step, independent of all others (Philox, Salmon et al. 2011).

    Args:
        seed: of the run; reduced modulo 2**64.
        step, sample: non-negative.
        stream: separates uses that must not share numbers.
    """
    bits = np.random.Philox(
        key=np.array([seed & _WORD, stream], dtype=np.uint64),
        counter=np.array([0, 0, sample, step], dtype=np.uint64),  # the low 128 bits count: streams cannot overlap
    )
    return np.random.Generator(bits)


# ---------------------------------------------------------------------------------------------------- quotas


class Quota:
    """Draws among weighted choices in fixed shares, countable at any point.

    Args:
        weights: non-negative and finite, at least one positive; resolved to one part in 2**32.

    Raises:
        ConfigError: no such weights.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = math.fsum(weights)
        if not weights or not all(w >= 0 for w in weights) or not 0 < total < math.inf:
            raise ConfigError(f"weights must be finite, at least 0, and not all 0; got {list(weights)}")
        # Integers, because rounded floats would miscount after many draws.
        whole = [max(1, round(w / total * _RESOLUTION_OF_WEIGHTS)) if w > 0 else 0 for w in weights]
        self._sums = [0, *itertools.accumulate(whole)]

    def _left(self, first: int, middle: int, last: int, draws: int) -> int:
        """How many of ``draws`` among the choices ``first .. last`` fall before ``middle``."""
        total = self._sums[last] - self._sums[first]
        return (2 * (self._sums[middle] - self._sums[first]) * draws + total) // (2 * total) if total else 0

    def before(self, draw: int) -> list[int]:
        """How often each choice occurs in the first ``draw`` draws."""

        def count(first: int, last: int, draws: int) -> list[int]:
            if last - first == 1:
                return [draws]
            middle = (first + last) // 2
            left = self._left(first, middle, last, draws)
            return count(first, middle, left) + count(middle, last, draws - left)

        return count(0, len(self._sums) - 1, draw)

    def choice(self, draw: int) -> tuple[int, int]:
        """``(choice, how often it was drawn before)`` of draw number ``draw`` (from 0)."""
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
    """The partition, size and samples of a step; the same on every rank (METHOD 3.1).

    Partitions follow their weights by quota; the size is uniform in the partition.

    Raises:
        ConfigError: no partitions, or one without sizes or images.
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
    """Samples ``start .. start + count`` as ``(source, position in that source's endless sequence)``."""
    quota = Quota(weights)
    return [quota.choice(sample) for sample in range(start, start + count)]


def image_at(seed: int, source: int, position: int, length: int) -> int:
    """The image at a position of a source's endless sequence: pass after pass, each in an order of its own.

    Args:
        source: the source's number; sources of equal length are shuffled differently.
        position: from 0; the pass is ``position // length``.
        length: images in the source.
    """
    epoch, place = divmod(position, length)
    if length > _LONG:
        return _shuffled(place, length, _round_keys(seed, source, epoch))
    return int(_order(seed, source, epoch, length)[place])


def draw_indices(
    seed: int, start: int, count: int, lengths: Sequence[int], weights: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """Which images make up a batch: ``(source, index)`` of samples ``start .. start + count``.

    Sources are mixed by quota; within a source every image comes once before any comes twice.

    Args:
        start: samples drawn before, :attr:`Draw.start` of the step.
        lengths: images in each source.
        weights: share of samples from each source; default: by length.
    """
    drawn = draw_positions(start, count, lengths if weights is None else weights)
    return [(source, image_at(seed, source, position, lengths[source])) for source, position in drawn]


@lru_cache(maxsize=32)
def _order(seed: int, source: int, epoch: int, length: int) -> np.ndarray:
    return generator(seed, epoch, source, _ORDER).permutation(length)


@lru_cache(maxsize=32)
def _round_keys(seed: int, source: int, epoch: int) -> tuple[int, ...]:
    return tuple(generator(seed, epoch, source, _ORDER).integers(1 << 63, size=_ROUNDS).tolist())


def _shuffled(place: int, length: int, keys: Sequence[int]) -> int:
    """A keyed permutation of ``0 .. length - 1``, one place at a time and without memory.

    A Feistel network (Luby and Rackoff 1988) permutes the next power of 4; results beyond the end are sent through it
    again until they are inside, which takes fewer than four rounds on average (Black and Rogaway 2002).
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


def draw_view(
    source_size: tuple[int, int], size: tuple[int, int], policy: ViewPolicy, rng: np.random.Generator
) -> View:
    """A random crop of an image, as geometry.

    The area is drawn first; then the aspect from that part of its range which fits the image at that area; then the
    place. Always five numbers are drawn and none is rejected. The crop lies inside the image.

    Args:
        source_size: ``(H, W)`` of the image.
        size: ``(H, W)`` of the canvas.
    """
    (height, width), (rows, columns) = source_size, size
    u_area, u_aspect, u_x, u_y, u_flip = rng.random(5).tolist()
    area = policy.scale[0] + (policy.scale[1] - policy.scale[0]) * u_area
    low, high = (a * columns / rows for a in policy.aspect)
    fit_low, fit_high = area * width / height, width / (area * height)  # where the crop's height, width still fit
    if max(low, fit_low) <= min(high, fit_high):
        low, high = max(low, fit_low), min(high, fit_high)
        aspect = low * (high / low) ** u_aspect
        box_w, box_h = math.sqrt(area * width * height * aspect), math.sqrt(area * width * height / aspect)
    else:
        aspect = high if fit_low > high else low
        box_w, box_h = min(width, height * aspect), min(height, width / aspect)
    box_w, box_h = min(box_w, width), min(box_h, height)
    return _window((width - box_w) * u_x, (height - box_h) * u_y, box_w, box_h, size, bool(u_flip < policy.flip))


def centre_view(source_size: tuple[int, int], size: tuple[int, int], *, stretch: bool = False) -> View:
    """The view evals use: the largest central crop of the canvas's shape, or the whole image stretched onto it."""
    (height, width), (rows, columns) = source_size, size
    if stretch:
        return _window(0, 0, width, height, size)
    zoom = max(rows / height, columns / width)
    box_w, box_h = min(columns / zoom, width), min(rows / zoom, height)
    return _window((width - box_w) / 2, (height - box_h) / 2, box_w, box_h, size)


def _window(x: float, y: float, width: float, height: float, size: tuple[int, int], flip: bool = False) -> View:
    """The view that shows a window of the source, given by its corner and extent in source pixels."""
    scale = size[1] / width, size[0] / height
    return View(size=size, scale=scale, offset=(-x * scale[0], -y * scale[1]), flip=flip)


def render(image: Image.Image, view: View) -> Tensor:
    """The pixels of a view: one bicubic, antialiased resampling, then the flip. Outside the image it is black.

    Args:
        image: RGB.

    Returns:
        uint8 ``(3, H, W)``.
    """
    x0, y0, x1, y1 = view.box
    left, top = min(0, math.floor(x0 + 1e-6)), min(0, math.floor(y0 + 1e-6))
    right, bottom = max(image.width, math.ceil(x1 - 1e-6)), max(image.height, math.ceil(y1 - 1e-6))
    if (left, top, right, bottom) != (0, 0, image.width, image.height):
        image = image.crop((left, top, right, bottom))  # whole pixels: pads, does not resample
    # The clamps undo rounding errors only, which PIL would refuse.
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

    Student and teachers must see the very same blend, so this comes before all of them. Each image has a lambda of its
    own: ``max(u, 1 - u)`` of a uniform u, i.e. Beta(1, 1) with the image itself as the stronger part.

    Where several processes train, images are blended across all of them.

    Args:
        images: float ``(B, 3, H, W)``, on any device: this process's part of the batch.
        seed: of the run.
        step: with the seed it decides everything here.
        probability: that the step is mixed, :attr:`ViewPolicy.mixup`.

    Returns:
        The blend, or ``images`` itself where the step is not mixed.
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
