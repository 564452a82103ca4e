"""How the loop trains an upsampler: who takes the student's part, and what a step looks at."""

from __future__ import annotations

from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, optim

from agglo.cache.lessons import loader_for
from agglo.data.loader import Batch
from agglo.data.views import mixup
from agglo.objectives.distill import Result, build_teachers
from agglo.objectives.upsample import Upsample, take_apart
from agglo.preprocess import resize
from agglo.recipe import Recipe, decode
from agglo.training.ema import Ema
from agglo.types import ConfigError
from agglo.upsamplers.featsharp import FeatSharp

if TYPE_CHECKING:
    from agglo.training.loop import Run
    from agglo.training.step import Stopwatch

_STUDENTS = (
    "heads", "targets.normalizer", "losses", "balancer", "auxiliary", "evals",
    "data.views.shift", "data.views.crops", "data.views.roam", "data.feature_cache",
    "train.backbone_lr", "train.head_steps", "train.freeze_norm_statistics", "train.damp", "train.spectral",
    "train.windows", "train.window_share", "train.start_from",
)  # fmt: skip
"""Keys of a recipe that are about a student, or about what it is taught: nothing here reads them."""


def assemble(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What a run holds, by the names of its fields: the upsampler stands where the student does.

    Raises:
        ConfigError: the recipe's teacher has no upsampler that learns, a size is not the one it looks at, or a key is
            for students.
    """
    refuse_keys_of_students(recipe)
    teachers, upsampler = take_apart(build_teachers(recipe))
    wanted = upsampler.larger[0]
    for index, partition in enumerate(recipe.partitions):
        if partition.sizes != [wanted]:
            raise ConfigError(
                f"partitions.{index}.sizes: the upsampler looks at {wanted} px, {upsampler.factor} times its teacher's "
                f"{upsampler.size[0]}; set them to [{wanted}]"
            )
    objective = Upsample(upsampler, recipe.objective, recipe.train.seed).to(device)
    upsampler.to(device)
    groups: dict[float, list[Tensor]] = {}
    for parameter in (*upsampler.parameters(), *objective.parameters()):
        decay = recipe.train.weight_decay if parameter.ndim in (2, 4) else 0.0  # matrices and kernels
        groups.setdefault(decay, []).append(parameter)
    return {
        "teachers": {name: teacher.to(device) for name, teacher in teachers.items()},
        "model": upsampler,
        "ema": Ema(upsampler, recipe.train.ema),
        "objective": objective,
        "optimizer": optim.AdamW(
            [{"params": group, "student": False, "weight_decay": decay} for decay, group in groups.items()],
            lr=recipe.train.lr,
            betas=recipe.train.betas,
            **{"fused" if device.type == "cuda" else "foreach": True},
        ),
        "loader": loader_for(recipe, 0),
    }


def refuse_keys_of_students(recipe: Recipe) -> None:
    """Refuse what would otherwise be passed over in silence: a student's key that is not as a recipe without it has it.

    Values are compared, and not who wrote them: the recipe of a run that is taken up again states every key.

    Raises:
        ConfigError: names the keys.
    """
    tree = recipe.flat()
    for path in _STUDENTS:
        *above, key = path.split(".")
        reduce(getitem, above, tree).pop(key)
    without, given = decode(tree).flat(), recipe.flat()
    odd = [path for path in _STUDENTS if _at(given, path) != _at(without, path)]
    if odd:
        raise ConfigError(f"{', '.join(odd)}: for students; objective: upsample has none: leave it out")


def _at(tree: dict[str, Any], path: str) -> Any:
    return reduce(getitem, path.split("."), tree)


def sharpen(run: Run, batch: Batch, watch: Stopwatch) -> tuple[Result, dict[str, Tensor]]:
    """The objective on one batch; nothing is told of what the teacher says, which the loss itself shows."""
    config, step = run.recipe.train, batch.step
    objective: Any = run.objective
    upsampler: FeatSharp = run.model  # type: ignore[assignment]
    (teacher,) = run.teachers.values()
    images = mixup(batch.images.to(run.device), config.seed, step, run.recipe.data.views.mixup)
    images = resize(images, upsampler.larger)
    watch.lap("mix")
    upsampler.train()
    objective.train()
    with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        result = objective(upsampler, teacher, images, step=step)
    watch.lap("forward")
    return result, {}
