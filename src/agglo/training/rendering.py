"""How large a step's images are rendered: a margin for views that are shifted, pixels for whoever wants most."""

from __future__ import annotations

import math
from collections.abc import Mapping

from agglo.data.shifts import max_shift
from agglo.model.model import Model
from agglo.recipe import Recipe
from agglo.teachers.base import Teacher


def margin(recipe: Recipe, model: Model, teachers: Mapping[str, Teacher]) -> int:
    """Pixels around the student's view that shifted views may reach: so many of the largest patch, on its scale."""
    if recipe.data.views.shift == 0:
        return 0
    stride = model.spec.stride
    cells = [float(stride)]
    for size in {size for partition in recipe.partitions for size in partition.sizes}:
        cells += [t.spec.stride * size / min(t.input_size((size, size), stride)) for t in teachers.values()]
    return math.ceil(max_shift(recipe.data.views.shift) * max(cells) / stride) * stride


def canvases(recipe: Recipe, stride: int, teachers: Mapping[str, Teacher]) -> list[dict[int, int]]:
    """What ``data.views.canvas: auto`` stands for: by partition and size, the shorter side in pixels of a view.

    It is that of the teacher of the partition who looks at most pixels, or the student's.
    """
    found = []
    for partition in recipe.partitions:
        names = partition.teachers or teachers
        found.append({
            size: max([size, *(min(teachers[name].input_size((size, size), stride)) for name in names)])
            for size in partition.sizes
        })  # fmt: skip
    return found
