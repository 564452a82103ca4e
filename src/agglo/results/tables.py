"""Tables of results. Two numbers stand in one column only when their settings and their data are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agglo.results.records import Result

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
"""The metrics of each kind that a paper's table shows; the first one of a kind that is not here."""


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of one eval, under one protocol on one data set.

    Args:
        name: of the result.
        metric: which of its numbers.
        protocol, data: hashes of the settings and of the data.
        settings: what was chosen.
        lower: better when lower.
        values: row (:func:`labels`) → number.
        mark: ``""``, or a letter where other columns have the same name and metric and another protocol or data.
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
        """For people: ``knn top1 ↓ (a)``."""
        arrow = " ↓" if self.lower else ""
        return f"{self.name} {self.metric}{arrow}" + (f" ({self.mark})" if self.mark else "")

    def best(self, shown: Mapping[str, str]) -> frozenset[str]:
        """The models with the best number as it is printed; none where there is nothing to compare."""
        if len(self.values) < 2:
            return frozenset()
        value = (min if self.lower else max)(self.values.values())
        first = next(model for model, each in self.values.items() if each == value)
        return frozenset(model for model in self.values if shown[model] == shown[first])


def model_names(results: Sequence[Result]) -> dict[str, str]:
    """Model hash → what people call it: its name, with the beginning of its hash where two share the name."""
    names: dict[str, str] = {str(r.model["hash"]): str(r.model["name"]) for r in results}
    counts: dict[str, int] = {}
    for name in names.values():
        counts[name] = counts.get(name, 0) + 1
    return {key: name if counts[name] == 1 else f"{name} ({key[:6]})" for key, name in names.items()}


def labels(results: Sequence[Result]) -> dict[str, str]:
    """Id of a result → the row of a table that it stands in: its model's name.

    Where several files of answers were measured under one model in one column, each has a row of its own, named by the
    beginning of the files' hashes: ``mine (answers 3f2a1c)``.
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
        words = ", ".join(f"{key} {result.inputs[key][:6]}" for key in apart if key in result.inputs)
        found[result.id] = f"{name} ({words})" if words else name
    return found


def _cell(result: Result) -> tuple[str, ...]:
    """What results share that may differ in their files of answers alone."""
    return str(result.model["hash"]), *result.column


def columns(results: Sequence[Result], *, headlines: bool = False) -> list[Column]:
    """Every column, by eval in the order of the results; of one row, eval and protocol the newest number.

    Args:
        results: of any number of models.
        headlines: only the metrics that a paper's table shows.
    """
    called = labels(results)
    found: dict[tuple[str, str, str, str], Column] = {}
    for result in results:
        wanted = _headlines(result) if headlines else tuple(result.metrics)
        for metric in wanted:
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
    letters = (chr(97 + i) if i < 26 else str(i) for i in range(len(group)))
    return [
        Column(c.name, c.metric, c.protocol, c.data, c.settings, c.lower, c.values, mark)
        for c, mark in zip(group, letters, strict=True)
    ]


def notes(found: Sequence[Column]) -> list[str]:
    """What parts the columns that share a name: the settings that differ, or the data."""
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


def markdown(results: Sequence[Result], *, digits: int = 3) -> str:
    """A table for a paper: models down, headlines across, the best of a column in bold, and its footnotes."""
    found = columns(results, headlines=True)
    if not found:
        return "No results.\n"
    models = list(dict.fromkeys(labels(results).values()))
    shown = {(column.title, model): f"{value:.{digits}f}" for column in found for model, value in column.values.items()}
    best = {c.title: c.best({model: shown[c.title, model] for model in c.values}) for c in found}
    lines = [
        "| model | " + " | ".join(column.title for column in found) + " |",
        "| --- |" + " ---: |" * len(found),
    ]
    for model in models:
        cells = []
        for column in found:
            text = shown.get((column.title, model), "–")
            cells.append(f"**{text}**" if model in best[column.title] else text)
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
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

    A curve's points differ in ``size`` alone; a model with one size has none. The value of whole images, which have
    several sizes, stands at the ``size`` that they cover. Two curves of a name whose other settings or data differ have
    different marks (the beginning of their hash).
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
    """Longer side of what the model saw, or of the size that whole images cover; None where neither is one number."""
    size = result.settings.get("size") if result.view is None else result.view
    if isinstance(size, list | tuple):
        return int(max(size))
    return size if isinstance(size, int) else None
