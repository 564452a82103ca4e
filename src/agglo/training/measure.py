"""After training: the recipe's evals on the student, on what it was before, and on its teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from agglo.config import find
from agglo.files import write_json
from agglo.harness.running import evaluate
from agglo.objectives.distill import build_teachers
from agglo.recipe import load as load_recipe
from agglo.types import ConfigError
from agglo.zoo.loading import load as load_model

STUDENT, UNTRAINED = "student", "untrained"


def measure(
    folder: str | Path, *, device: str | None = None, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run a finished run's evals and write ``evals.json`` into its folder.

    The student and its untrained self are compared with the teachers (``agreement``); a teacher is not asked how well
    it agrees with itself. Without ``initial/`` the untrained student is left out.

    Args:
        folder: the run folder.
        device: where to run; the best there is when None.
        progress: told what is going on, in short phrases.

    Returns:
        What was written: ``{"models": {name: {eval: {metric: value}}}, "lower_is_better": [metric, ...]}``.

    Raises:
        ConfigError: the folder holds no recipe or no model, or a teacher has one of the student's names.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(f"{folder} is no run folder: it holds no recipe.yaml")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    taken = {STUDENT, UNTRAINED} & set(recipe.teachers)
    if taken:
        raise ConfigError(f"teachers.{taken.pop()}: the name stands for the student in evals; choose another")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models: dict[str, Any] = {STUDENT: load_model(folder / "model").to(device)}
    if (folder / "initial").is_dir():
        models[UNTRAINED] = load_model(folder / "initial").to(device)
    teachers = {name: teacher.to(device) for name, teacher in build_teachers(recipe).items()}
    results: dict[str, Any] = {}
    for name, model in {**models, **teachers}.items():
        tell = None if progress is None else (lambda phrase, name=name: progress(f"{name}: {phrase}"))
        results[name] = evaluate(model, recipe.evals, teachers if name in models else None, tell)
    record = {"models": results, "lower_is_better": sorted(lower_is_better(recipe.evals))}
    write_json(folder / "evals.json", record)
    return record


def lower_is_better(evals: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """The metrics of these evals that are better when lower."""
    return frozenset[str]().union(*(find("evals", str(entry["kind"])).lower_is_better for entry in evals))
