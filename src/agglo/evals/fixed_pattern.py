"""Position-locked energy of spatial features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.evals._features import check, need_spatial, read_batches, required
from agglo.evals.base import SCENES_TEST, Backbone, Eval, EvalContext, ProbeError, device_of, frozen, input_size
from agglo.preprocess import fit
from agglo.types import ConfigError


class FixedPattern(Eval):
    """Position-locked energy: the share of a map's variance that depends on the cell's position, not on its content.

    Border artefacts, window seams and grids that a student copies from its teachers are such patterns; training on
    shifted views is meant to remove them (C-RADIOv4, arXiv:2601.17237, eq. 1). Photographs are position-locked too: the
    sky is at the top. Each image is therefore encoded ``rolls`` times, rolled by a random number of pixels on both
    axes: all content is then equally likely at every position, and what remains is due to the model.

    With ``G_i(x)`` the features of input i at cell x minus their mean over the cells, ``m`` the mean of ``G`` over the
    n inputs and ``W`` its unbiased variance over them (lower is better):

    - ``locked = E / (E + mean_x W)``, ``E = mean_x (||m(x)||^2 - W(x) / n)``: the expectation does not depend on n and
      is 0 where position does not matter; with few images noise can make it negative;
    - ``locked_inner``: the same over the cells not at the border, if there are any.

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        rolls: number of times each image is encoded.
        seed: of the rolls.
        source: of the images.
    """

    lower_is_better = frozenset({"locked", "locked_inner"})

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 128,
        rolls: int = 4,
        seed: int = 0,
        source: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if rolls < 1:
            raise ConfigError(f"evals.fixed_pattern: rolls must be at least 1, got {rolls}")
        self.size = size
        self.rolls = rolls
        self.seed = seed
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        need_spatial(model, "fixed_pattern")
        view = input_size(model, self.size)
        energy: Locked | None = None
        with frozen(model):
            for index, names, images in read_batches(context.sources.open(self.source), [], context):
                for roll in range(self.rolls):
                    batch = torch.stack(
                        [self._rolled(image, view, i, roll) for image, i in zip(images, index, strict=True)]
                    )
                    spatial = model(batch.to(device_of(model))).spatial
                    found = required(check(spatial, "spatial", names, 4), model)
                    energy = Locked(found.shape[1:]) if energy is None else energy
                    energy.add(found)
        if energy is None:
            raise ProbeError("no image to measure a fixed pattern on")
        found = {"locked": energy.share()}
        if min(energy.mean.shape[1:]) > 2:
            found["locked_inner"] = energy.share(border=1)
        return found

    def _rolled(self, image: Image.Image, view: tuple[int, int], index: int, roll: int) -> Tensor:
        draw = np.random.default_rng([self.seed, index, roll])
        return fit(image, view).roll((int(draw.integers(view[0])), int(draw.integers(view[1]))), (1, 2))


class Locked:
    """Streaming mean and variance of image-centred maps at each cell, in float64.

    Args:
        shape: ``(D, h, w)``.
    """

    def __init__(self, shape: torch.Size | tuple[int, ...]) -> None:
        self.count = 0
        self.mean = torch.zeros(*shape, dtype=torch.float64)
        self.squares = torch.zeros(*shape[1:], dtype=torch.float64)

    def add(self, maps: Tensor) -> None:
        """Add ``(B, D, h, w)``."""
        for one in maps.double():
            centred = one - one.mean((1, 2), keepdim=True)
            self.count += 1
            delta = centred - self.mean
            self.mean = self.mean + delta / self.count
            self.squares = self.squares + (delta * (centred - self.mean)).sum(0)

    def share(self, border: int = 0) -> float:
        """Share of the variance locked to positions; cells within ``border`` of the edge are ignored.

        Raises:
            ProbeError: fewer than two maps, or no variance.
        """
        if self.count < 2:
            raise ProbeError("a fixed pattern needs at least two images: add images, or raise `rolls`")
        within = self.squares / (self.count - 1)
        locked = self.mean.square().sum(0) - within / self.count
        if border:
            inner = slice(border, -border), slice(border, -border)
            within, locked = within[inner], locked[inner]
        total = float(locked.mean() + within.mean())
        if not total > 0:
            raise ProbeError("every cell of every map is the same: no variance")
        return float(locked.mean()) / total
