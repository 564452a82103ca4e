"""Create an untrained model from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from agglo.config import build
from agglo.model.heads import HeadConfig
from agglo.model.model import Model
from agglo.preprocess import legal_sizes_near
from agglo.recipe import Recipe, TeacherEntry
from agglo.recipe import load as load_recipe
from agglo.teachers.base import spec_of
from agglo.types import ConfigError, FeatureSpec

if TYPE_CHECKING:
    from agglo.teachers.base import Teacher


def weights_of(name: str, entry: TeacherEntry, spec: FeatureSpec) -> tuple[float, float]:
    """The loss weights of a teacher's summary and spatial features; 1 by default, 0 for features it does not have.

    Raises:
        ConfigError: the recipe sets a weight for features that the teacher does not have.
    """
    found = []
    for key, part, width in (("summary_weight", "summary", spec.summary), ("spatial_weight", "map", spec.spatial)):
        weight = getattr(entry, key)
        if weight and width is None:
            raise ConfigError(
                f"teachers.{name}.{key}: {weight:g}, but this teacher has no {part}; set `{key}: 0` or omit the key"
            )
        found.append(float(width is not None) if weight is None else weight)
    return found[0], found[1]


def head_configs(recipe: Recipe, specs: Mapping[str, FeatureSpec]) -> dict[str, HeadConfig]:
    """The heads of a recipe by teacher; a loss weight of 0 means no head.

    Raises:
        ConfigError: a weight is set for features a teacher does not have, or a teacher is left without any.
    """
    configs = {}
    for slot, (name, entry) in enumerate(recipe.teachers.items()):
        spec = specs[name]
        summary, spatial = (weight > 0 for weight in weights_of(name, entry, spec))
        if not summary and not spatial:
            raise ConfigError(
                f"teachers.{name}: all its weights are 0; it has "
                f"{'no' if spec.summary is None else 'a'} summary and {'no' if spec.spatial is None else 'a'} map"
            )
        configs[name] = HeadConfig(
            summary=(entry.summary_head or recipe.heads.summary) if summary else None,
            spatial=(entry.spatial_head or recipe.heads.spatial) if spatial else None,
            summary_width=spec.summary,
            spatial_width=spec.spatial,
            slot=slot,
            text=entry.teacher.get("text") if summary else None,
        )
    return configs


def snap_sizes(recipe: Recipe, step: int) -> tuple[Recipe, list[str]]:
    """Round the recipe's sizes to the nearest legal ones (ties down), so that a recipe fits students of any stride.

    Sizes of a partition that become equal count once.

    Args:
        recipe: the run.
        step: legal sizes are its multiples, in pixels (:meth:`agglo.Model.step`).

    Returns:
        The recipe, and one message per partition that changed.

    Raises:
        ConfigError: a size is less than half of ``step``.
    """
    partitions, messages = [], []
    for index, partition in enumerate(recipe.partitions):
        where, near = f"partitions.{index}.sizes", [(size, _nearest(size, step)) for size in partition.sizes]
        if lost := [size for size, legal in near if abs(size - legal) > step / 2]:
            raise ConfigError(
                f"{where}: {lost[0]} is not a multiple of {step} px, the student's step; the nearest is {step}"
            )
        if moved := [f"{size} -> {legal}" for size, legal in near if size != legal]:
            messages.append(f"{where}: the student takes multiples of {step} px: {', '.join(moved)}")
        sizes = list(dict.fromkeys(legal for _, legal in near))
        partitions.append(partition.model_copy(update={"sizes": sizes}))
    return (recipe.model_copy(update={"partitions": partitions}), messages) if messages else (recipe, messages)


def _nearest(side: int, step: int) -> int:
    return min(legal_sizes_near(side, step), key=lambda legal: abs(side - legal))


def preferred_size(recipe: Recipe, step: int) -> int:
    """The multiple of ``step`` that is nearest to the recipe's largest size."""
    return _nearest(max(recipe.sizes), step)


def create(recipe: Recipe | str, teachers: Mapping[str, Teacher] | None = None, *, initialize: bool = True) -> Model:
    """Create an untrained model from a recipe.

    Args:
        recipe: a recipe, its name or its path.
        teachers: the recipe's teachers by name; built here when None and needed for initialisation.
        initialize: start from the weights that the recipe names and from the teachers' vocabularies. False where other
            weights will be loaded: no weights are read then.

    Raises:
        ConfigError: the recipe does not fit the student or a teacher.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if teachers is None and initialize:
        teachers = {name: build("teachers", entry.teacher) for name, entry in recipe.teachers.items()}
    specs = {
        name: spec_of(entry.teacher, f"teachers.{name}") if teachers is None else teachers[name].spec
        for name, entry in recipe.teachers.items()
    }
    model = Model(recipe.student, head_configs(recipe, specs))
    model.preferred_size = preferred_size(recipe, model.step())
    if initialize and teachers is not None:
        model.student.initialize()
        for name, heads in model.heads.items():
            for head in (heads.summary, heads.spatial):
                if head is not None:
                    head.initialize(model.student, teachers[name])
    return model
