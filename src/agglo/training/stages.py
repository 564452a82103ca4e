"""Starting from the weights of an earlier run, and runs of several stages (docs/method.md, 5.1).

The student and the heads of teachers with the same name keep their weights; other heads, statistics, optimiser and
schedule start anew. A saved head predicts in its teacher's own space; once the new statistics are known it is converted
to the normalised space.
"""

from __future__ import annotations

from pathlib import Path

from agglo.model.model import Model
from agglo.students.base import copy_state
from agglo.types import ConfigError
from agglo.zoo.loading import load


def adopt(model: Model, start_from: str) -> tuple[str, ...]:
    """Copy the student of an earlier model, and the heads of the teachers that both have.

    Args:
        model: newly created.
        start_from: a run folder, a saved model, or a released one's name.

    Returns:
        Names of the teachers whose heads were copied.

    Raises:
        ConfigError: no such model, or another architecture.
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
            continue  # another size: starts anew
        taken.append(name)
    return tuple(taken)


def stage_folder(folder: Path, index: int, name: str) -> Path:
    """The folder of a stage, numbered from 1."""
    return folder / "stages" / f"{index + 1}_{name}"
