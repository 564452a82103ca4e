"""What a run folder holds, read with patience: whatever is missing or damaged becomes a note, never an error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agglo.recipe import Recipe
from agglo.recipe import load as load_recipe
from agglo.types import AggloError, ConfigError

Numbers = dict[str, dict[str, float]]
"""Eval → metric → value."""


@dataclass(slots=True)
class Records:
    """The files of a run, parsed.

    Args:
        folder: the run folder.
        recipe: the resolved recipe, or None where it is missing or does not fit this version.
        recipe_text: the file as it lies there.
        versions: of the packages and of the machine.
        metrics: one mapping a logged step, by step; of steps that were repeated after a resume the later one.
        evals: model → eval → metric → value.
        lower_is_better: names of metrics (``"rmse"`` or ``"depth/rmse"``) that are better when lower.
        notes: what could not be read, for the reader.
    """

    folder: Path
    recipe: Recipe | None = None
    recipe_text: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evals: dict[str, Numbers] = field(default_factory=dict)
    lower_is_better: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return self.recipe.name if self.recipe else self.folder.resolve().name

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers in the recipe's order; from the logs where there is no recipe."""
        if self.recipe:
            return list(self.recipe.teachers)
        return list(dict.fromkeys(name.rpartition("/")[0] for name in self.series()))

    @property
    def steps(self) -> int:
        """Steps done, as far as the log knows."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training, over all resumed parts; 0 where it was not logged."""
        return sum(self._intervals())

    @property
    def images(self) -> tuple[int, bool]:
        """Images seen, and whether that is exact (one batch size) or integrated from the logged speed."""
        partitions = self.recipe.partitions if self.recipe else []
        if len({partition.batch for partition in partitions}) == 1:
            return self.steps * partitions[0].batch, True
        spans = zip(self._intervals(), self.metrics, strict=True)
        return round(sum(span * float(entry.get("images_per_second", 0)) for span, entry in spans)), False

    def _intervals(self) -> list[float]:
        """Seconds of each logged interval; the clock starts again at 0 after a resume."""
        spans, before = [], 0.0
        for entry in self.metrics:
            now = float(entry.get("elapsed", 0.0))
            spans.append(now - before if now >= before else now)
            before = now
        return spans

    def series(self) -> dict[str, list[tuple[float, float]]]:
        """``<teacher>/summary|spatial`` → ``(step, loss)`` points; values that are no numbers are left out."""
        found: dict[str, list[tuple[float, float]]] = {}
        for entry in self.metrics:
            terms = entry.get("terms")
            for name, value in (terms if isinstance(terms, dict) else {}).items():
                points = found.setdefault(str(name), [])
                if _is_number(value) and math.isfinite(value):
                    points.append((float(entry["step"]), float(value)))
        return found

    def phases(self) -> dict[str, float]:
        """Seconds in each phase of the loop, in the order of their first appearance."""
        total: dict[str, float] = {}
        for entry in self.metrics:
            seconds = entry.get("seconds")
            for phase, value in (seconds if isinstance(seconds, dict) else {}).items():
                if _is_number(value) and value >= 0:
                    total[str(phase)] = total.get(str(phase), 0.0) + float(value)
        return total

    def lower(self, eval_name: str, metric: str) -> bool:
        """Whether a metric is better when lower."""
        return not {metric, f"{eval_name}/{metric}", f"{eval_name}.{metric}"}.isdisjoint(self.lower_is_better)


def read(folder: Path) -> Records:
    """Everything readable in a run folder.

    Raises:
        ConfigError: there is no such folder, or it holds neither a recipe nor metrics nor a model.
    """
    if not folder.is_dir():
        raise ConfigError(f"no run folder {folder}: make one with `agglo train quickstart`")
    if not any((folder / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "model", "evals.json")):
        raise ConfigError(f"{folder} is no run folder: it holds no recipe.yaml, metrics.jsonl, model/ or evals.json")
    records = Records(folder)
    _read_recipe(records)
    _read_metrics(records)
    versions = _json(records, "versions.json")
    records.versions = versions if isinstance(versions, dict) else {}
    _read_evals(records)
    return records


def _read_recipe(records: Records) -> None:
    path = records.folder / "recipe.yaml"
    if not path.is_file():
        records.notes.append("recipe.yaml is missing: teachers and their pictures are left out")
        return
    try:
        records.recipe_text = path.read_text(encoding="utf-8", errors="replace")
        records.recipe = load_recipe(str(path))
    except (AggloError, OSError) as error:
        records.notes.append(f"recipe.yaml does not fit this version of agglo ({error})")


def _read_metrics(records: Records) -> None:
    path = records.folder / "metrics.jsonl"
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
        if by_step and step <= next(reversed(by_step)):  # resumed from an earlier checkpoint: what followed it is void
            by_step = {done: kept for done, kept in by_step.items() if done < step}
        by_step[step] = entry
    records.metrics = list(by_step.values())
    if damaged:
        records.notes.append(f"metrics.jsonl: {damaged} damaged line{'s' if damaged > 1 else ''} left out")


def _read_evals(records: Records) -> None:
    data = _json(records, "evals.json")
    models = data.get("models") if isinstance(data, dict) else None
    if data is not None and not isinstance(models, dict):
        records.notes.append('evals.json holds no "models": run the evals again')
    for model, evals in (models if isinstance(models, dict) else {}).items():
        for eval_name, metrics in (evals if isinstance(evals, dict) else {}).items():
            numbers = (
                {str(m): float(v) for m, v in metrics.items() if _is_number(v)} if isinstance(metrics, dict) else {}
            )
            if numbers:
                records.evals.setdefault(str(model), {})[str(eval_name)] = numbers
    lower = data.get("lower_is_better") if isinstance(data, dict) else None
    records.lower_is_better = frozenset(str(name) for name in lower) if isinstance(lower, list) else frozenset()


def _json(records: Records, name: str) -> Any:
    path = records.folder / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        records.notes.append(f"{name} cannot be read ({error})")
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
