"""Tables of results: rows are models, a column is one metric under one protocol on one data set.

Every table (terminal, HTML, Markdown) is made of :func:`columns` and :func:`rows`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agglo.results.records import STUDENT, TEACHER, UNTRAINED, Result

HEADLINES: dict[str, tuple[str, ...]] = {
    "knn": ("top1",),
    "zero_shot": ("top1",),
    "linear": ("top1",),
    "segmentation": ("miou",),
    "depth": ("delta1", "rmse"),
    "normals": ("recall", "mean_angle"),
    "correspondence": ("3d", "2d", "pck@0.10"),
    "retrieval": ("mrr",),
    "robustness": ("top1_corrupted", "kept"),
    "rank": ("rank_me", "lidar"),
}
"""Kind → the metrics that a paper's table shows; of other kinds the first one."""

MINUS = "\N{MINUS SIGN}"


def number(value: float, digits: int = 3) -> str:
    """Format a measured number: ``digits`` decimals below 10, fewer above, a true minus sign."""
    if value != value:
        return "n/a"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    fewer = 2 if size >= 100 else 1 if size >= 10 else 0
    shown = f"{size:,.0f}" if size >= 1000 else f"{size:.{max(0, digits - fewer)}f}"
    return shown if value >= 0 or _is_zero(shown) else MINUS + shown


def signed(value: float, digits: int = 3) -> str:
    """:func:`number` with a plus sign before positive numbers."""
    shown = number(value, digits)
    return shown if shown.startswith(MINUS) or _is_zero(shown) else f"+{shown}"


def _is_zero(shown: str) -> bool:
    return not any(char in "123456789" for char in shown)


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of one eval, under one protocol on one data set.

    Args:
        name, metric: of the results.
        protocol, data: hashes of the settings and of the data.
        settings: the options of the eval.
        lower: whether lower is better.
        values: row (:func:`labels`) → number.
        mark: a letter if other columns have the same name and metric but another protocol or data, else ``""``.
    """

    name: str
    metric: str
    protocol: str
    data: str
    settings: Mapping[str, Any]
    lower: bool
    values: dict[str, float] = field(default_factory=dict)
    mark: str = ""

    @property
    def title(self) -> str:
        """Title of the column, e.g. ``knn top1 ↓ (a)``."""
        arrow = " ↓" if self.lower else ""
        return f"{self.name} {self.metric}{arrow}" + (f" ({self.mark})" if self.mark else "")

    def best(self) -> frozenset[str]:
        """The rows whose number is best as :func:`number` prints it; none if there is only one row."""
        if len(self.values) < 2:
            return frozenset()
        best = number((min if self.lower else max)(self.values.values()))
        return frozenset(row for row, value in self.values.items() if number(value) == best)


def model_names(results: Sequence[Result]) -> dict[str, str]:
    """Model hash → its name; equal names get the run's folder or the beginning of the hash."""
    models: dict[str, Mapping[str, Any]] = {str(r.model["hash"]): r.model for r in results}
    found = {key: str(model["name"]) for key, model in models.items()}
    for suffix in (lambda key: str(models[key].get("run") or key[:6]), lambda key: key[:6]):
        count = Counter(found.values())
        found = {k: name if count[name] == 1 else f"{models[k]['name']} ({suffix(k)})" for k, name in found.items()}
    return found


def rows(results: Sequence[Result]) -> list[str]:
    """The rows (:func:`labels`) in the order of a table: untrained student, student, other models, teachers."""
    order = {UNTRAINED: 0, STUDENT: 1, TEACHER: 3}
    called = labels(results)
    ranked = sorted(results, key=lambda result: order.get(str(result.model.get("role")), 2))
    return list(dict.fromkeys(called[result.id] for result in ranked))


def before_and_after(results: Sequence[Result]) -> tuple[str, str] | None:
    """The rows of the untrained student and the student, if the results have exactly one of each."""
    called = labels(results)
    found = [{called[r.id] for r in results if r.model.get("role") == role} for role in (UNTRAINED, STUDENT)]
    return (found[0].pop(), found[1].pop()) if [len(each) for each in found] == [1, 1] else None


def labels(results: Sequence[Result]) -> dict[str, str]:
    """Id of a result → its row of a table: its model's name.

    If several files of answers were measured for one model in one column, each file has a row, named by the beginning
    of its hash: ``mine (answers 3f2a1c)``.
    """
    called = model_names(results)
    several: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for result in results:
        given = several.setdefault(_cell(result), [])
        if result.inputs not in given:
            given.append(result.inputs)
    found = {}
    for result in results:
        name, given = called[str(result.model["hash"])], several[_cell(result)]
        keys = dict.fromkeys(key for each in given for key in each)
        apart = [key for key in keys if len({each.get(key) for each in given}) > 1]
        suffix = ", ".join(f"{key} {result.inputs[key][:6]}" for key in apart if key in result.inputs)
        found[result.id] = f"{name} ({suffix})" if suffix else name
    return found


def _cell(result: Result) -> tuple[str, ...]:
    """Equal for results that differ in their files of answers only."""
    return str(result.model["hash"]), *result.column


def columns(results: Sequence[Result], *, headlines: bool = False) -> list[Column]:
    """Every column, by eval in the order of the results, those of a run's student first.

    Of one row, eval and protocol the newest number counts.

    Args:
        results: of any number of models.
        headlines: only the metrics that a paper's table shows.
    """
    called = labels(results)
    found: dict[tuple[str, str, str, str], Column] = {}
    for result in sorted(results, key=lambda result: result.model.get("role") != STUDENT):
        for metric in _headlines(result) if headlines else result.metrics:
            key = (result.name, metric, *result.column)
            lower = metric in result.lower_is_better
            column = found.setdefault(key, Column(result.name, metric, *result.column, result.settings, lower))
            column.values[called[result.id]] = result.metrics[metric]
    groups: dict[tuple[str, str], list[Column]] = {}
    for column in found.values():
        groups.setdefault((column.name, column.metric), []).append(column)
    return [each for group in groups.values() for each in _marked(group)]


def _headlines(result: Result) -> tuple[str, ...]:
    wanted = tuple(metric for metric in HEADLINES.get(result.kind, ()) if metric in result.metrics)
    return wanted or tuple(result.metrics)[:1]


def _marked(group: list[Column]) -> list[Column]:
    if len(group) == 1:
        return group
    return [replace(column, mark=chr(97 + i) if i < 26 else str(i)) for i, column in enumerate(group)]


def notes(found: Sequence[Column]) -> list[str]:
    """Why columns of one name do not compare: the settings that differ, or the data."""
    groups: dict[str, dict[str, Column]] = {}
    for column in found:
        if column.mark:
            groups.setdefault(column.name, {}).setdefault(column.mark, column)
    lines = []
    for name, marked in groups.items():
        first = next(iter(marked.values()))
        for mark, column in list(marked.items())[1:]:
            chosen = differences(first.settings, column.settings)
            why = "; ".join(chosen) or "the same settings"
            data = "" if first.data == column.data else f", other data ({first.data[:8]}, {column.data[:8]})"
            lines.append(f"{name}: ({first.mark}) and ({mark}) do not compare: {why}{data}")
    return lines


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """``key: a, b`` of each setting in which two protocols differ."""

    def flat(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {k: v for key, each in value.items() for k, v in flat(each, f"{path}.{key}").items()}
        return {path.removeprefix("."): value}

    a, b = flat(one, ""), flat(other, "")
    return [f"{key}: {_word(a.get(key))}, {_word(b.get(key))}" for key in {**a, **b} if a.get(key) != b.get(key)]


def _word(value: Any) -> str:
    return json.dumps(value, default=str) if value is not None else "none"


def markdown(results: Sequence[Result]) -> str:
    """A Markdown table: models down, headline metrics across, the best of a column in bold, and footnotes."""
    found = columns(results, headlines=True)
    if not found:
        return "No results.\n"
    lines = ["| model | " + " | ".join(column.title for column in found) + " |", "| --- |" + " ---: |" * len(found)]
    for row in rows(results):
        cells = []
        for column in found:
            text = number(column.values[row]) if row in column.values else "–"
            cells.append(f"**{text}**" if row in column.best() else text)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"- {note}" for note in notes(found)]
    hashes = dict.fromkeys(
        f"{column.name}{f' ({column.mark})' if column.mark else ''} {column.protocol}/{column.data[:8]}"
        for column in found
    )
    lines.append(f"- protocol/data: {', '.join(hashes)}")
    return "\n".join(lines) + "\n"


def curves(results: Sequence[Result]) -> dict[tuple[str, str, str], dict[str, list[tuple[int, float]]]]:
    """Metrics against the size of the images: ``(name, metric, mark) → model → (longer side, value), rising``.

    The points of a curve differ in ``size`` only; a model measured at one size has no curve. Whole images have several
    sizes; their value stands at the ``size`` that they cover. Curves of one name with other settings or data have
    different marks.
    """
    called = labels(results)
    found: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for result in results:
        side = _side(result)
        if "size" not in result.settings or side is None:
            continue
        rest = {key: value for key, value in result.settings.items() if key != "size"}
        mark = json.dumps([rest, result.data_hash], sort_keys=True)
        name = result.name.partition("@")[0]
        for metric in _headlines(result):
            points = found.setdefault((name, metric, mark), {}).setdefault(called[result.id], {})
            points[side] = result.metrics[metric]
    kept: dict[tuple[str, str, str], dict[str, list[tuple[int, float]]]] = {}
    for (name, metric, mark), models in found.items():
        long = {model: sorted(points.items()) for model, points in models.items() if len(points) > 1}
        if long:
            kept[name, metric, mark] = long
    return kept


def _side(result: Result) -> int | None:
    """Longer side of the view, or of the size that whole images cover; None if neither is one number."""
    size = result.settings.get("size") if result.view is None else result.view
    if isinstance(size, list | tuple):
        return int(max(size))
    return size if isinstance(size, int) else None
