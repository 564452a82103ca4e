"""Teaching by whole canvases: the teachers look at all of a fixed crop's canvas, views are slices of what they say.

A teacher's map covers the whole canvas, the student's view lies somewhere in it. What the student is asked for is the
part of the map under its view: a slice by whole cells wherever teacher and student cells are equal on the canvas, which
they are for every teacher that is shown the student's scale in tokens. So a view may be shifted and moved about without
asking the teacher again, and what it said can as well be read from a cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from agglo import dist
from agglo.cache import identity
from agglo.cache.crops import CropLoader, TaughtBatch
from agglo.cache.reading import FeatureCache
from agglo.config import build
from agglo.data.loader import Batch, Loader
from agglo.data.views import ViewPolicy
from agglo.model.creation import create, snap_sizes
from agglo.nn.placement import Placement, resample_to
from agglo.objectives.distill import Seen, build_teachers
from agglo.objectives.wrapping import begin_step
from agglo.preprocess import resize
from agglo.recipe import Recipe
from agglo.sources.base import Source
from agglo.teachers.base import Teacher
from agglo.types import AggloError, Features

_WHOLE = 1e-6
"""Share of a cell by which a view's border may miss that of a cell and still lie on it: the rounding of a division."""


def find_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The recipe's teachers; with a cache, a stand-in for one that cannot be built here, which is then said."""
    if recipe.data.feature_cache is None:
        return build_teachers(recipe)
    cache, found = FeatureCache(recipe.data.feature_cache), {}
    for name, entry in recipe.teachers.items():
        stand_in = cache.absent(name)
        try:
            found |= build_teachers(recipe.model_copy(update={"teachers": {name: entry}}))
        except (AggloError, OSError) as error:
            why = str(error).splitlines()[0]
            warnings.warn(
                f"teachers.{name} is not here ({why}): its weights cannot be compared with those that {cache.folder} "
                "was written with",
                stacklevel=2,
            )
            found[name] = stand_in
    return found


def loader_for(
    recipe: Recipe, margin: int, lessons: Lessons | None = None, canvases: Sequence[Mapping[int, int]] | None = None
) -> Loader:
    """The training loader of a recipe: of fixed crops where there are lessons, else of new ones.

    Args:
        recipe: the run.
        margin: pixels rendered beyond each side of the student's view; with lessons, theirs counts.
        lessons: those of a recipe with ``data.views.crops``.
        canvases: what ``data.views.canvas: auto`` stands for; without them, the student's sizes.

    Raises:
        ConfigError: the cache lacks what the recipe's images need.
    """
    sources = [build("sources", entry.source) for entry in recipe.data.sources]
    weights = [entry.weight for entry in recipe.data.sources]
    policy = ViewPolicy(**recipe.data.views.model_dump(include={each.name for each in fields(ViewPolicy)}))
    given: dict[str, Any] = {
        "canvas": canvases if recipe.data.views.canvas == "auto" else recipe.data.views.canvas,
        "workers": recipe.data.workers,
        "cache_mb": recipe.data.cache_mb,
        "part": (dist.rank(), dist.world_size()),
    }
    if lessons is None:
        return Loader(sources, weights, recipe.partitions, policy, recipe.train.seed, margin=margin, **given)
    lessons.check_images(sources)
    crops, fetch = recipe.data.views.crops, lessons.fetch if lessons.cache is not None else None
    return CropLoader(
        sources, weights, recipe.partitions, policy, recipe.train.seed, margin=lessons.margin, crops=crops, fetch=fetch,
        **given,
    )  # fmt: skip


class Lessons:
    """What the teachers say of a batch of fixed crops, read where there is a cache, else asked for.

    Args:
        recipe: with ``data.views.crops``.
        teachers: by name, on the device.
        stride: the student's.
        device: of the batches.

    Attributes:
        teachers: whom the run may let go of or not: with a cache these are stand-ins.

    Raises:
        ConfigError: the cache is of other teachers or other canvases.
    """

    def __init__(self, recipe: Recipe, teachers: Mapping[str, Teacher], stride: int, device: torch.device) -> None:
        self.recipe, self.teachers, self.stride, self.device = recipe, dict(teachers), stride, device
        self.cache: FeatureCache | None = None
        if recipe.data.feature_cache is not None:
            self.cache = FeatureCache(recipe.data.feature_cache)
            self.cache.check_geometry(recipe, stride)
            for name, teacher in teachers.items():
                self.cache.check_teacher(recipe, name, teacher, stride, device)
                self.cache.coding(name).to(device)
            self.teachers = {name: self.cache.absent(name) for name in teachers}

    @property
    def margin(self) -> int:
        """Pixels to be rendered beyond each side of the middle view."""
        return identity.margin(self.recipe.data.views, self.stride)

    def check_images(self, sources: Sequence[Source]) -> None:
        """Refuse a cache that lacks what these sources need; nothing to do without a cache.

        Raises:
            ConfigError: says how much is missing.
        """
        if self.cache is not None:
            self.cache.check_images(self.recipe, sources)

    def fetch(self, batch: Batch, crops: list[int]) -> Mapping:
        """What :class:`agglo.cache.crops.CropLoader` brings along with a batch."""
        return {} if self.cache is None else self.cache.fetch(list(self.teachers), batch, crops)

    def teach(self, batch: Batch, canvas: Tensor, view: Placement | None = None) -> dict[str, Seen]:
        """What the teachers say of what the student sees.

        Args:
            batch: from a :class:`agglo.cache.crops.CropLoader`.
            canvas: its images on the device.
            view: where the student's view lies on the canvas, whose sides count as 1; None for all of the canvas.

        Returns:
            By teacher: the summary of the canvas, and the map's cells that the view touches.
        """
        said = self._read(batch) if self.cache is not None else self._ask(batch, canvas)
        return {name: under(view, features) for name, features in said.items()}

    def _read(self, batch: Batch) -> dict[str, Features]:
        if self.cache is None or not isinstance(batch, TaughtBatch):
            raise TypeError("a feature cache needs batches of a CropLoader that fetches them")
        found = {}
        for name, rows in batch.taught.items():
            data = torch.from_numpy(rows.data).to(self.device, non_blocking=True)
            found[name] = self.cache.coding(name).decode(data, rows.grid)
        return found

    def _ask(self, batch: Batch, canvas: Tensor) -> dict[str, Features]:
        names = self.recipe.partitions[batch.partition].teachers or self.teachers
        chosen = {name: teacher for name, teacher in self.teachers.items() if name in names}
        begin_step(chosen.values(), self.recipe.train.seed, batch.step)
        outer = identity.outer_size(batch.size, self.recipe.data.views, self.stride)
        return {name: ask(teacher, canvas, outer, self.stride) for name, teacher in chosen.items()}


def fitted(recipe: Recipe, teachers: Mapping[str, Teacher]) -> tuple[Recipe, int, list[str]]:
    """The recipe at sizes that its student takes, the student's stride, and what was changed.

    The student itself is not made.
    """
    with torch.device("meta"):
        model = create(recipe, teachers, initialize=False)
    recipe, said = snap_sizes(recipe, model.step())
    return recipe, model.spec.stride, said


def ask(teacher: Teacher, canvas: Tensor, outer: tuple[int, int], stride: int) -> Features:
    """One teacher's features of whole canvases, float32.

    Args:
        canvas: ``(B, 3, H, W)`` in [0, 1].
        outer: the canvas's size on the student's scale: the teacher chooses its own from it, as for a student's view.
        stride: the student's.
    """
    with torch.inference_mode():
        features = teacher(resize(canvas, teacher.input_size(outer, stride)))
    # Inference tensors may not be saved for backward, so what leaves the teacher is an ordinary copy.
    return features.map(lambda x: x.float().clone())


def under(view: Placement | None, features: Features) -> Seen:
    """The cells of maps of whole canvases that lie under each sample's view, at least in part.

    Where cells fall on those of the view this is indexing, bit for bit.
    """
    spatial = features.spatial
    if spatial is None:
        batch = 1 if features.summary is None else len(features.summary)
        return Seen(features, Placement.full(batch, (1, 1), (1, 1)))
    grid = spatial.shape[-2], spatial.shape[-1]
    whole = Placement.full(len(spatial), (1, 1), grid)
    if view is None:
        return Seen(features, whole)
    starts, counts = [], []
    for axis in (0, 1):
        first = view.start[:, axis] / whole.cell[axis]
        last = first + view.grid[axis] * view.cell[axis] / whole.cell[axis]
        first, last = (first + _WHOLE).floor(), (last - _WHOLE).ceil()
        count = min(grid[axis], int((last - first).max()))
        starts.append(first.clamp(0, grid[axis] - count) * whole.cell[axis])
        counts.append(count)
    place = Placement(torch.stack(starts, 1), whole.cell, (counts[0], counts[1]))
    cells, _ = resample_to(spatial, whole, place)
    return Seen(Features(features.summary, cells), place)
