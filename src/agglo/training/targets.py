"""Targets of a batch, computed or read from a feature cache, and the loader of the images that they belong to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agglo import dist
from agglo.cache.reading import FeatureCache
from agglo.config import build
from agglo.data.crops import CropBatch, CropLoader, margin, outer_size
from agglo.data.loader import Batch, Loader
from agglo.data.shifts import RenderedBatch
from agglo.nn.folding import fold_batch_norms
from agglo.nn.placement import Placement, resample_to
from agglo.objectives.base import Target, build_teachers, partition_teachers
from agglo.preprocess import resize
from agglo.recipe import Recipe
from agglo.teachers.base import Teacher
from agglo.types import AggloError, Features

_TOLERANCE = 1e-6
"""Distance of a view's border from a cell's, in cells, that counts as rounding."""

_PARTS = ("summary", "spatial")

Compute = Callable[[str, Teacher, Tensor], Mapping[str, Features]]
"""Target features of one teacher for its view, by target name (:meth:`agglo.objectives.base.Objective.compute`)."""


def teacher_output(name: str, teacher: Teacher, images: Tensor) -> dict[str, Features]:
    """The teacher's output as its only target: :data:`Compute` by default."""
    return {name: teacher(images)}


def load_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The recipe's teachers; with a cache, placeholders for those that cannot be loaded, with a warning."""
    if recipe.data.feature_cache is None:
        return build_teachers(recipe)
    cache, found = FeatureCache(recipe.data.feature_cache), {}
    for name, entry in recipe.teachers.items():
        placeholder = cache.placeholder(name)
        try:
            found |= build_teachers(recipe.model_copy(update={"teachers": {name: entry}}))
        except (AggloError, OSError) as error:
            warnings.warn(
                f"teachers.{name} cannot be loaded ({str(error).splitlines()[0]}): its weights are not compared with "
                f"those that {cache.folder} was written with",
                stacklevel=2,
            )
            found[name] = placeholder
    return found


class TargetSource:
    """Gives the targets of a batch.

    Without fixed crops each teacher sees a crop of its own. With fixed crops (``data.views.crops``) it sees the whole
    crop, and the target is the part of its map under the student's view: a slice wherever their cells coincide. The
    view may then move without another forward pass, and the features may come from a cache.

    Args:
        recipe: the run.
        teachers: by name, on ``device``.
        stride: of the student.
        device: of the batches.
        compute: target features of a teacher; its output by default.

    Attributes:
        teachers: live teachers, or placeholders when targets are cached (their weights can then be freed).

    Raises:
        ConfigError: the cache has other teachers or other crops.
    """

    def __init__(
        self, recipe: Recipe, teachers: Mapping[str, Teacher], stride: int, device: torch.device,
        compute: Compute | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.stride, self.device = recipe, stride, device
        self.teachers: dict[str, Teacher] = dict(teachers)
        self.compute: Compute = compute or teacher_output
        self.cache: FeatureCache | None = None
        if recipe.data.feature_cache is not None:
            self.cache = FeatureCache(recipe.data.feature_cache)
            self.cache.check_geometry(recipe, stride)
            for name, teacher in teachers.items():
                self.cache.check_teacher(recipe, name, teacher, stride, device)
                self.cache.coding(name).to(device)
            self.teachers = {name: self.cache.placeholder(name) for name in teachers}
        else:
            for name in teachers:
                self._fold(name)

    def __call__(
        self,
        batch: Batch,
        rendered: RenderedBatch,
        view: Placement | None = None,
        shifts: Sequence[Tensor] | None = None,
    ) -> dict[str, Target]:
        """The targets of a batch, by name, for the teachers of its partition.

        Args:
            batch: from :func:`build_loader`.
            rendered: its images on the device.
            view: of the student, with fixed crops; None for the whole crop.
            shifts: ``(B, 2)`` per teacher of the run, in its own patches, without fixed crops; None for no shift.
        """
        if self.cache is not None:
            return {name: slice_view(features, view) for name, features in self._read(self.cache, batch).items()}
        chosen, targets = partition_teachers(self.recipe, self.teachers, batch.partition), {}
        for number, (name, teacher) in enumerate(self.teachers.items()):
            if name not in chosen:
                continue
            teacher.begin_step(self.recipe.train.seed, batch.step)
            if self.recipe.data.views.crops:
                outer = outer_size(batch.size, self.recipe.data.views, self.stride)
                found = whole_crop_features(teacher, rendered.images, outer, self.stride, name, self.compute)
                targets |= {key: slice_view(features, view) for key, features in found.items()}
                continue
            shift = torch.zeros(len(rendered.images), 2, dtype=torch.long) if shifts is None else shifts[number]
            size = teacher.input_size(batch.size, self.stride)
            images, placement = rendered.crop(size, teacher.spec.stride, shift)
            found = _computed(self.compute, name, teacher, images)
            targets |= {key: Target(features, placement) for key, features in found.items()}
        return targets

    def _fold(self, name: str) -> None:
        """Fold a float32 teacher's BatchNorm layers; in half precision the folded weights would be rounded."""
        teacher = self.teachers[name]
        if getattr(teacher, "dtype", "float32") != "float32":
            return
        side = min(self.recipe.sizes)
        size = teacher.input_size((side, side), self.stride)
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(self.device)

        def run() -> dict[str, Tensor]:
            found = _computed(self.compute, name, teacher, images)
            parts = [(f"{key}.{part}", getattr(value, part)) for key, value in found.items() for part in _PARTS]
            return {key: value for key, value in parts if value is not None}

        fold_batch_norms(teacher, run)

    def _read(self, cache: FeatureCache, batch: Batch) -> dict[str, Features]:
        if not isinstance(batch, CropBatch):
            raise TypeError("a feature cache needs the batches of a CropLoader that fetches features")
        found = {}
        for name, rows in batch.fetched.items():
            data = torch.from_numpy(rows.data).to(self.device, non_blocking=True)
            found[name] = cache.coding(name).decode(data, rows.grid)
        return found


def _computed(compute: Compute, name: str, teacher: Teacher, images: Tensor) -> dict[str, Features]:
    with torch.inference_mode():
        found = compute(name, teacher, images)
    # Inference tensors cannot be saved for backward: return ordinary copies.
    return {key: features.map(lambda x: x.float().clone()) for key, features in found.items()}


def whole_crop_features(
    teacher: Teacher,
    images: Tensor,
    outer: tuple[int, int],
    stride: int,
    name: str = "",
    compute: Compute | None = None,
) -> dict[str, Features]:
    """A teacher's features of whole fixed crops, float32, by target name.

    Args:
        teacher: on the images' device.
        images: ``(B, 3, H, W)`` in [0, 1].
        outer: size of the crop on the student's scale, from which the teacher chooses its own, as from a view's size.
        stride: of the student.
        name: of the teacher.
        compute: as in :class:`TargetSource`.
    """
    return _computed(compute or teacher_output, name, teacher, resize(images, teacher.input_size(outer, stride)))


def slice_view(features: Features, view: Placement | None) -> Target:
    """The cells of whole-crop maps that each sample's view touches.

    Where they coincide with cells of the view this is indexing, bit for bit.

    Args:
        features: of whole crops.
        view: None for the whole crop.
    """
    spatial = features.spatial
    if spatial is None:
        batch = 1 if features.summary is None else len(features.summary)
        return Target(features, Placement.full(batch, (1, 1), (1, 1)))
    grid = spatial.shape[-2], spatial.shape[-1]
    whole = Placement.full(len(spatial), (1, 1), grid)
    if view is None:
        return Target(features, whole)
    starts, counts = [], []
    for axis in (0, 1):
        first = view.start[:, axis] / whole.cell[axis]
        last = first + view.grid[axis] * view.cell[axis] / whole.cell[axis]
        first, last = (first + _TOLERANCE).floor(), (last - _TOLERANCE).ceil()
        count = min(grid[axis], int((last - first).max()))
        starts.append(first.clamp(0, grid[axis] - count) * whole.cell[axis])
        counts.append(count)
    placement = Placement(torch.stack(starts, 1), whole.cell, (counts[0], counts[1]))
    cells, _ = resample_to(spatial, whole, placement)
    return Target(Features(features.summary, cells), placement)


# --- images -----------------------------------------------------------------------------------------------------------


def build_loader(recipe: Recipe, targets: TargetSource) -> Loader:
    """The training loader of a recipe: of fixed crops with ``data.views.crops``, otherwise of new ones.

    Args:
        recipe: the run.
        targets: of the run; with a cache its features are loaded with the images.

    Raises:
        ConfigError: the cache lacks features of the recipe's images.
    """
    views, stride = recipe.data.views, targets.stride
    sources = [build("sources", entry.source) for entry in recipe.data.sources]
    weights = [entry.weight for entry in recipe.data.sources]
    cells: list[float] = []
    if views.shift and not views.crops:
        for size in recipe.sizes:
            cells += [t.spec.stride * size / min(t.input_size((size, size), stride)) for t in targets.teachers.values()]
    options: dict[str, Any] = {
        "canvas": render_sizes(recipe, stride, targets.teachers) if views.canvas == "auto" else views.canvas,
        "margin": margin(views, stride, cells),
        "cache_mb": recipe.data.cache_mb,
        "part": (dist.rank(), dist.world_size()),
    }
    positional = sources, weights, recipe.partitions, views, recipe.train.seed, recipe.data.workers
    if not views.crops:
        return Loader(*positional, **options)
    cache, names = targets.cache, list(targets.teachers)
    if cache is None:
        return CropLoader(*positional, crops=views.crops, **options)
    cache.check_images(recipe, sources)
    return CropLoader(
        *positional, crops=views.crops, fetch=lambda batch, crops: cache.fetch(names, batch, crops), **options
    )


def render_sizes(recipe: Recipe, stride: int, teachers: Mapping[str, Teacher]) -> list[dict[int, int]]:
    """``data.views.canvas: auto``: the largest input of any teacher or of the student, per partition and size.

    Returns:
        For each partition, the shorter side in pixels by student size.
    """
    found = []
    for index, partition in enumerate(recipe.partitions):
        chosen = partition_teachers(recipe, teachers, index).values()
        found.append({
            size: max([size, *(min(teacher.input_size((size, size), stride)) for teacher in chosen)])
            for size in partition.sizes
        })  # fmt: skip
    return found
