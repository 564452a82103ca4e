"""Runs of several stages, and starting from what an earlier run has learned (METHOD 5.1).

The student and the heads of teachers that stay go on; heads of new teachers, statistics, optimiser and schedule begin
anew. A head that goes on spoke its teacher's own language at the end of the stage before; it is translated into the new
normalised space once that is known, so that nothing of it is lost.
"""

from __future__ import annotations

from pathlib import Path

import torch

from agglo.model.model import Model
from agglo.objectives.distill import Distill
from agglo.students.base import copy_state
from agglo.types import ConfigError
from agglo.zoo.loading import load


def adopt(model: Model, start_from: str) -> tuple[str, ...]:
    """Give a new model the student of an earlier one, and the heads of the teachers that both have.

    Args:
        model: as its recipe creates it.
        start_from: a run folder, a saved model, or a released one's name.

    Returns:
        The teachers whose heads were taken over.

    Raises:
        ConfigError: no such model, or one of another architecture.
    """
    earlier = load(start_from)
    if earlier.student_config["kind"] != model.student_config["kind"]:
        raise ConfigError(
            f"train.start_from: {start_from} is a {earlier.student_config['kind']} student, "
            f"the recipe's is a {model.student_config['kind']}"
        )
    try:
        model.student.copy_from(earlier.student, model.tokens, earlier.tokens)
    except ValueError as error:
        raise ConfigError(f"train.start_from: {start_from}: {error}") from None
    taken = []
    for name, heads in model.heads.items():
        if name not in earlier.heads:
            continue
        try:
            copy_state(heads, earlier.heads[name].state_dict())
        except ValueError:
            continue  # a head of another size starts anew, like that of a new teacher
        taken.append(name)
    return tuple(taken)


@torch.no_grad()
def translate(model: Model, objective: Distill, taken: tuple[str, ...]) -> None:
    """Let heads that answer in their teachers' own spaces answer in the normalised ones, in place.

    With ``y_hat = W (y - m)`` that is ``fold(W, -W m)``.
    """
    for name in taken:
        head = model.heads[name].spatial
        if head is not None and name in objective.normalizers:
            normalizer = objective.normalizers[name]
            head.fold(normalizer.whiten, -(normalizer.whiten @ normalizer.mean))


def stage_folder(folder: Path, index: int, name: str) -> Path:
    """Where a stage lies below its run's folder; the order can be read off it."""
    return folder / "stages" / f"{index + 1}_{name}"
