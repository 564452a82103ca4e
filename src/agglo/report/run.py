"""Read a run folder for its report: a missing or damaged file becomes a note, not an error."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agglo.files import read_json
from agglo.recipe import Recipe
from agglo.recipe import load as load_recipe
from agglo.results.records import FILE, MEASURED, Result, current, read, results_file
from agglo.types import AggloError, ConfigError


@dataclass(slots=True)
class TrainingRun:
    """The files of a run, parsed.

    Args:
        folder: the run folder.
        recipe: the resolved recipe; None if it is missing or does not fit this version.
        recipe_text: the recipe's file, unparsed.
        versions: of the packages and of the machine.
        metrics: one mapping per logged step, in order; of a step repeated after a resume the later one.
        found: results of the run's current models, each with the folder that holds it.
        notes: what could not be read.
    """

    folder: Path
    recipe: Recipe | None = None
    recipe_text: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    found: list[tuple[Path, Result]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return self.recipe.name if self.recipe else self.folder.resolve().name

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers in the recipe's order; without a recipe, as logged."""
        if self.recipe:
            return list(self.recipe.teachers)
        return list(dict.fromkeys(name.rpartition("/")[0] for name in self.series()))

    @property
    def steps(self) -> int:
        """The last logged step."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training over all resumed parts; 0 if not logged."""
        return sum(self._intervals())

    @property
    def images(self) -> tuple[int, bool]:
        """Images seen, and whether the number is exact (one batch size) or integrated from the logged speed."""
        partitions = self.recipe.partitions if self.recipe else []
        if len({partition.batch for partition in partitions}) == 1:
            return self.steps * partitions[0].batch, True
        spans = zip(self._intervals(), self.metrics, strict=True)
        return round(sum(span * float(entry.get("images_per_second", 0)) for span, entry in spans)), False

    def _intervals(self) -> list[float]:
        """Seconds of each logged interval; ``elapsed`` restarts at 0 after a resume."""
        spans, before = [], 0.0
        for entry in self.metrics:
            now = float(entry.get("elapsed", 0.0))
            spans.append(now - before if now >= before else now)
            before = now
        return spans

    def series(self) -> dict[str, list[tuple[float, float]]]:
        """``<teacher>/summary|spatial`` → ``(step, loss)`` points; values that are not finite are left out."""
        found: dict[str, list[tuple[float, float]]] = {}
        for entry in self.metrics:
            terms = entry.get("terms")
            for name, value in (terms if isinstance(terms, dict) else {}).items():
                points = found.setdefault(str(name), [])
                if _is_number(value) and math.isfinite(value):
                    points.append((float(entry["step"]), float(value)))
        return found

    def phases(self) -> dict[str, float]:
        """Seconds in each phase of the training loop, in the order of first appearance."""
        total: dict[str, float] = {}
        for entry in self.metrics:
            seconds = entry.get("seconds")
            for phase, value in (seconds if isinstance(seconds, dict) else {}).items():
                if _is_number(value) and value >= 0:
                    total[str(phase)] = total.get(str(phase), 0.0) + float(value)
        return total


def read_run(folder: Path) -> TrainingRun:
    """Read a run folder.

    Raises:
        ConfigError: the folder does not exist, or holds neither a recipe nor metrics nor a model nor results.
    """
    if not folder.is_dir():
        raise ConfigError(f"no run folder {folder}: make one with `agglo train quickstart`")
    if not any((folder / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "model", "evals")):
        raise ConfigError(f"{folder} is not a run folder: it has no recipe.yaml, metrics.jsonl, model/ or evals/")
    run = TrainingRun(folder)
    _read_recipe(run)
    _read_metrics(run)
    try:
        run.versions = read_json(folder / "versions.json")
    except AggloError as error:
        run.notes.append(f"versions.json cannot be read ({error})")
    _read_results(run)
    return run


def _read_recipe(run: TrainingRun) -> None:
    path = run.folder / "recipe.yaml"
    if not path.is_file():
        run.notes.append("recipe.yaml is missing: teachers and their pictures are left out")
        return
    try:
        run.recipe_text = path.read_text(encoding="utf-8", errors="replace")
        run.recipe = load_recipe(str(path))
    except (AggloError, OSError) as error:
        run.notes.append(f"recipe.yaml does not fit this version of agglo ({error})")


def _read_metrics(run: TrainingRun) -> None:
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        return
    by_step: dict[int, dict[str, Any]] = {}
    damaged = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            damaged += bool(line.strip())
            continue
        if by_step and step <= next(reversed(by_step)):  # resumed from an earlier checkpoint
            by_step = {done: kept for done, kept in by_step.items() if done < step}
        by_step[step] = entry
    run.metrics = list(by_step.values())
    if damaged:
        run.notes.append(f"metrics.jsonl: {damaged} damaged line{'s' if damaged > 1 else ''} left out")


def _read_results(run: TrainingRun) -> None:
    folder = run.folder / "evals"
    try:
        failed = read_json(folder / MEASURED).get("failed", {})
        run.notes += [
            f"eval {name} failed on {model}: {why}" for model in failed for name, why in failed[model].items()
        ]
    except AggloError as error:
        run.notes.append(str(error))
    if not (folder / FILE).is_file() and not (run.folder / "evals.json").is_file():
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            place = results_file(run.folder)
            run.found = [(place.parent, result) for result in current(read(place))]
        except AggloError as error:
            run.notes.append(str(error))
    run.notes += [str(warning.message) for warning in caught]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
