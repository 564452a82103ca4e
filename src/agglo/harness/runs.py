"""Measure a finished training run: its student, the untrained student and its teachers, with the recipe's evals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agglo.evals.base import Progress
from agglo.files import read_json, write_json
from agglo.harness.measuring import Measured, measure
from agglo.harness.running import Outcome, prefixed, unique_names
from agglo.objectives.base import build_teachers
from agglo.recipe import Recipe
from agglo.recipe import load as load_recipe
from agglo.results.identity import model_hash, takes_teachers
from agglo.results.records import FILE, MEASURED, STUDENT, TEACHER, UNTRAINED, read
from agglo.types import ConfigError
from agglo.zoo.loading import load as load_model

RESULTS = "evals"
"""The folder of a run's results."""


def measure_run(
    folder: str | Path,
    *,
    device: str | None = None,
    again: bool = False,
    keep_features: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
    done: Callable[[str, Outcome], None] | None = None,
) -> dict[str, Measured]:
    """Run a recipe's evals on the models of its finished run; results go to ``folder/evals/results.jsonl``.

    The student (``model/``) and the untrained student (``initial/``, if it exists) are compared with the teachers
    (``agreement``); a teacher is not compared with itself. Results that exist are not measured again.
    ``folder/evals/measured.json`` then lists the results and the evals that failed.

    Args:
        folder: the run folder.
        device: where to run; CUDA if available when None.
        again: measure existing results too.
        keep_features: keep encoded images in ``folder/evals/features``.
        workers: threads that read images ahead.
        progress: called with short phrases.
        done: called with the model's name and the outcome after each eval that ran.

    Returns:
        Name of the model → what was measured, in the order student, untrained student, teachers.

    Raises:
        ConfigError: the folder holds no recipe or no model, or a teacher has the name of a student.
    """
    folder = Path(folder)
    recipe = _recipe(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    teachers = {name: teacher.to(device) for name, teacher in build_teachers(recipe).items()}
    entries = _entries(recipe)
    hashes: dict[str, dict[str, Any]] = {}
    found: dict[str, Measured] = {}
    saved = {UNTRAINED: folder / "initial", STUDENT: folder / "model"}
    for name in (*teachers, *(name for name, path in saved.items() if name == STUDENT or path.is_dir())):
        own = saved.get(name)
        model: Any = teachers[name] if own is None else load_model(own).to(device)
        found[name] = measure(
            model,
            name,
            entries if own is not None else [each for each in entries if not takes_teachers(str(each["kind"]))],
            folder / RESULTS,
            built_from=recipe.teachers[name].teacher if own is None else None,
            facts={"role": TEACHER} if own is None else facts_of(folder, name),
            teachers=None if own is None else teachers,
            again=again,
            keep_features=keep_features,
            workers=workers,
            hashes=hashes,
            progress=prefixed(progress, name),
            done=None if done is None else (lambda outcome, name=name: done(name, outcome)),
        )
    found = {name: found[name] for name in (STUDENT, UNTRAINED, *teachers) if name in found}
    write_json(folder / RESULTS / MEASURED, {
        "student": found[STUDENT].model["hash"],
        "evals": _digest(entries),
        "results": [result.id for each in found.values() for result in each.results.values()],
        "failed": failures(found),
    })  # fmt: skip
    return found


def failures(measured: Mapping[str, Measured]) -> dict[str, dict[str, str]]:
    """Model → eval → error, of the evals that failed."""
    return {name: dict(each.failed) for name, each in measured.items() if each.failed}


def has_evals(folder: Path) -> bool:
    """Whether :func:`measure_run` has something to do: a finished run whose recipe has evals."""
    if not (folder / "recipe.yaml").is_file() or not (folder / "model").is_dir():
        return False
    return bool(load_recipe(str(folder / "recipe.yaml")).evals)


def facts_of(folder: Path, role: str) -> dict[str, str]:
    """The facts on a run's student or untrained student that its results carry."""
    return {"role": role, "run": folder.resolve().name}


def is_measured(folder: Path) -> bool:
    """Whether the recipe's evals ran on the model that the run folder holds now, and none failed.

    Compares what :func:`measure_run` recorded with the recipe, the student and the results. Builds no teacher.
    """
    entries, place = _entries(_recipe(folder)), folder / RESULTS
    if not entries:
        return True
    recorded = read_json(place / MEASURED)
    if recorded.get("evals") != _digest(entries) or recorded.get("failed"):
        return False
    kept = {result.id for result in read(place)} if (place / FILE).is_file() else set()
    if not kept.issuperset(recorded.get("results", [])):
        return False
    return recorded.get("student") == model_hash(load_model(folder / "model"))


def _digest(entries: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _recipe(folder: Path) -> Recipe:
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no recipe.yaml")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    taken = {STUDENT, UNTRAINED} & set(recipe.teachers)
    if taken:
        raise ConfigError(f"teachers.{taken.pop()}: the name is reserved for the student in evals; choose another")
    return recipe


def _entries(recipe: Recipe) -> list[dict[str, Any]]:
    names = unique_names([str(entry["kind"]) for entry in recipe.evals], [each.get("name") for each in recipe.evals])
    return [{**entry, "name": name} for name, entry in zip(names, recipe.evals, strict=True)]
