"""Check the recipe's sizes and windows against student and teachers before creating the run folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from agglo.model.model import Model
from agglo.nn.windows import SUGGESTED, check_window_value
from agglo.objectives.base import partition_teachers
from agglo.recipe import Recipe
from agglo.teachers.base import Teacher
from agglo.types import ConfigError


def check_sizes(recipe: Recipe, stride: int, teachers: Mapping[str, Teacher]) -> None:
    """Check every size of the recipe against the teachers of its partition.

    Raises:
        ConfigError: names the teacher and its legal sizes.
    """
    for index, partition in enumerate(recipe.partitions):
        for size in partition.sizes:
            where = f"partitions.{index}.sizes"
            for name, teacher in partition_teachers(recipe, teachers, index).items():
                try:
                    wanted = teacher.input_size((size, size), stride)
                except ValueError as error:
                    raise ConfigError(f"{where}: teacher {name!r} has no size for {size} px: {error}") from None
                if any(side < 1 or side % teacher.spec.step for side in wanted):
                    raise ConfigError(
                        f"{where}: at {size} px teacher {name!r} would get {wanted[0]}x{wanted[1]} px, but it takes "
                        f"multiples of {teacher.spec.step}"
                    )


def check_windows(recipe: Recipe, model: Model) -> list[str]:
    """Check that at least one of the recipe's windows fits one of its sizes.

    Warns if the student does not support windows; it is then trained without, so that a recipe suits any student.

    Returns:
        A note on windows that fit no size, if any.

    Raises:
        ConfigError: none fits; lists those that would.
    """
    windows = recipe.train.windows
    if not windows:
        return []
    if not model.student.windows:
        warnings.warn(
            f"train.windows: a {recipe.student['kind']} student does not support windows: training without; set "
            "train.windows=[] to silence this",
            stacklevel=2,
        )
        return []
    for window in windows:
        check_window_value(window)
    sizes = recipe.sizes
    grids = [size // model.spec.stride for size in sizes]
    unused = [window for window in windows if not any(fits(window, (grid, grid)) for grid in grids)]
    if not unused:
        return []
    legal = {size: [w for w in SUGGESTED if fits(w, (grid, grid))] for size, grid in zip(sizes, grids, strict=True)}
    lines = [f"{size} px: {', '.join(map(str, found)) or 'none'}" for size, found in legal.items()]
    rule = f"a window must divide the patch grid and be smaller. Legal windows: {'; '.join(lines)}"
    if len(unused) == len(windows):
        raise ConfigError(f"train.windows: {windows} fit no size of the recipe: {rule}")
    verb = "fits" if len(unused) == 1 else "fit"
    return [f"train.windows: {', '.join(map(str, unused))} {verb} no size of the recipe and will not be used: {rule}"]


def can_be_spectral(student: nn.Module) -> bool:
    """Whether the student has linear layers to reparametrise; warns if not."""
    if any(isinstance(layer, nn.Linear) for layer in student.modules()):
        return True
    warnings.warn(
        "train.spectral: the student has no linear layers: training without; set train.spectral=false to silence this",
        stacklevel=2,
    )
    return False


def fits(window: int, grid: tuple[int, int]) -> bool:
    """Whether a window divides both sides of a grid and is smaller than it."""
    return window < max(grid) and all(side % window == 0 for side in grid)
