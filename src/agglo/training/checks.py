"""Sizes and windows that a recipe asks for and nobody can have, found out before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from agglo.model.model import Model
from agglo.nn.windows import SUGGESTED, check_window_value
from agglo.recipe import Recipe
from agglo.teachers.base import Teacher
from agglo.types import ConfigError


def check_sizes(recipe: Recipe, model: Model, teachers: Mapping[str, Teacher]) -> None:
    """Every resolution of the recipe must be one that every teacher finds a size for.

    Raises:
        ConfigError: names the teacher and what it takes.
    """
    for index, partition in enumerate(recipe.partitions):
        for size in partition.sizes:
            where = f"partitions.{index}.sizes"
            for name, teacher in teachers.items():
                if name not in (partition.teachers or teachers):
                    continue
                try:
                    seen = teacher.input_size((size, size), model.spec.stride)
                except ValueError as error:
                    raise ConfigError(f"{where}: teacher {name!r} has no size for {size} px: {error}") from None
                if any(side < 1 or side % teacher.spec.step for side in seen):
                    raise ConfigError(
                        f"{where}: at {size} px teacher {name!r} would see {seen[0]}x{seen[1]} px, but it takes "
                        f"multiples of {teacher.spec.step}"
                    )


def check_windows(recipe: Recipe, model: Model) -> list[str]:
    """At least one of the recipe's windows must fit one of its sizes, or none would ever be drawn.

    Warns where the student cannot look through windows: it trains without them, so that a recipe serves any student.

    Returns:
        A line on those that fit no size and are never drawn, if any.

    Raises:
        ConfigError: none fits; lists those that do.
    """
    windows = recipe.train.windows
    if not windows:
        return []
    if not model.student.windows:
        warnings.warn(
            f"train.windows: a {recipe.student['kind']} student cannot look through windows, and is trained without; "
            "train.windows=[] says so in the recipe",
            stacklevel=2,
        )
        return []
    for window in windows:
        check_window_value(window)
    sizes = sorted({size for partition in recipe.partitions for size in partition.sizes})
    grids = [size // model.spec.stride for size in sizes]
    idle = [window for window in windows if not any(fits(window, (grid, grid)) for grid in grids)]
    if not idle:
        return []
    legal = {size: [w for w in SUGGESTED if fits(w, (grid, grid))] for size, grid in zip(sizes, grids, strict=True)}
    lines = [f"{size} px: {', '.join(map(str, found)) or 'none'}" for size, found in legal.items()]
    rule = f"a window divides the grid of patches and is smaller. Those that do: {'; '.join(lines)}"
    if len(idle) == len(windows):
        raise ConfigError(f"train.windows: {windows} fit no size of the recipe: {rule}")
    none = f"{', '.join(map(str, idle))} {'fits' if len(idle) == 1 else 'fit'} no size of the recipe"
    return [f"train.windows: {none} and will never be drawn: {rule}"]


def can_be_spectral(student: nn.Module) -> bool:
    """Whether there are linear layers to reparametrise; warns where there are none."""
    if any(isinstance(layer, nn.Linear) for layer in student.modules()):
        return True
    warnings.warn(
        "train.spectral: the student has no linear layers, and is trained without; train.spectral=false says so in the "
        "recipe",
        stacklevel=2,
    )
    return False


def fits(window: int, grid: tuple[int, int]) -> bool:
    """Whether a window divides both sides of a grid and is smaller than it."""
    return window < max(grid) and all(side % window == 0 for side in grid)
