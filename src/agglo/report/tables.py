"""Results in HTML: key numbers, the table of metrics and the table of agreement with each teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from agglo.report.charts import dumbbell
from agglo.report.markup import Child, Markup, tag
from agglo.results.tables import MINUS, Column, number, signed

AGREEMENT = "agreement"
TITLES = {
    "knn": "Nearest neighbours",
    "zero_shot": "Zero-shot by text",
    "segmentation": "Segmentation, linear probe",
    "depth": "Depth, linear probe",
    "normals": "Normals, linear probe",
    "retrieval": "Text search",
    "correspondence": "Correspondence",
    AGREEMENT: "Agreement",
}
METRICS = {
    "summary_cosine": "summary cosine",
    "spatial_r2": "spatial R²",
    "spatial_cosine": "spatial cosine",
    "miou": "mIoU",
    "delta1": "δ < 1.25",
    "abs_rel": "relative error",
    "rmse": "RMSE",
    "mrr": "MRR",
    "top1": "top-1",
    "top5": "top-5",
}
HEADLINES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("segmentation", "Segmentation {}", ("miou",)),
    ("depth", "Depth {}", ("delta1", "abs_rel", "rmse")),
    (AGREEMENT, "Agreement, {}", ("summary_cosine",)),
    (AGREEMENT, "Agreement, {}", ("spatial_r2",)),
    ("zero_shot", "Zero-shot {}", ("top1",)),
    ("knn", "Nearest neighbours {}", ("top1",)),
)
"""Eval, title of its tile, and the metric to show: the first of these that was measured, else the eval's first."""


def delta(before: float, after: float, *, lower: bool = False) -> Markup:
    """A change as an arrow and a number, green for an improvement and red for a regression."""
    change = after - before
    shown = signed(change)
    if not any(char in "123456789" for char in shown):
        return tag("span", "unchanged", class_="delta")
    verdict = "good" if (change < 0) == lower else "bad"
    return tag(
        "span", f"{'▼' if change < 0 else '▲'} {shown.lstrip('+' + MINUS)}", class_=f"delta {verdict}", title=shown
    )


def is_agreement(column: Column) -> bool:
    """Whether a column compares a student with teachers."""
    return column.settings.get("kind") == AGREEMENT


def metric_tiles(found: Sequence[Column], pair: tuple[str, str]) -> list[Markup]:
    """One tile per headline metric: the student's value and the change from the untrained student."""
    untrained, student = pair
    shown = []
    for name, title, wanted in HEADLINES:
        own = [column for column in found if column.name == name and student in column.values]
        if name == AGREEMENT:
            own = [column for column in own if column.metric.rpartition("/")[2] == wanted[0] and "/" in column.metric]
        else:
            own = [c for metric in wanted for c in own if c.metric.lower() == metric][:1] or own[:1]
        if not own:
            continue
        was = [column.values[untrained] for column in own if untrained in column.values]
        now = fmean(column.values[student] for column in own)
        metric = wanted[0] if name == AGREEMENT else own[0].metric
        change: Child = [f"from {number(fmean(was))}", delta(fmean(was), now, lower=own[0].lower)] if was else ""
        shown.append(tile(title.format(metric_name(metric)), number(now), change))
    return shown


def tile(title: str, big: Child, under: Child = "") -> Markup:
    """A key number with its title and a note under it."""
    note = tag("div", under, class_="was") if under else None
    return tag("div", tag("h3", title), tag("div", big, class_="big"), note, class_="tile")


def metric_table(found: Sequence[Column], rows: Sequence[str], pair: tuple[str, str] | None = None) -> Markup | None:
    """Metrics down, grouped by eval, and models across; with ``pair``, the change stands after the student.

    Returns None without columns. Rows without a value are left out.
    """
    shown = [row for row in rows if any(row in column.values for column in found)]
    if not shown:
        return None
    student = pair[1] if pair and set(pair) <= set(shown) else None
    heads = [tag("th", "")]
    for row in shown:
        heads.append(tag("th", row, class_="own" if row == student else None))
        heads += [tag("th", "change")] if row == student else []
    bodies = []
    for name, group in _groups((column.name, column) for column in found).items():
        title = tag("th", TITLES.get(name, name), class_="head", scope="rowgroup")
        lines = [tag("tr", title, tag("td", "", colspan=len(heads) - 1))]
        lines += [_line(column, shown, pair if student else None) for column in group]
        bodies.append(tag("tbody", lines, class_="group"))
    return _table(heads, bodies)


def _line(column: Column, rows: Sequence[str], pair: tuple[str, str] | None) -> Markup:
    best = column.best()
    cells = [_label(column, metric_name(column.metric))]
    for row in rows:
        cells.append(_cell(column.values.get(row), "best" if row in best else None))
        if pair and row == pair[1]:
            cells.append(_change(column, pair))
    return tag("tr", cells)


def agreement_table(found: Sequence[Column], pair: tuple[str, str], teachers: Sequence[str]) -> Markup:
    """One line per teacher and metric: before, after, change, and both as dots between 0 and 1."""
    bodies = []
    for teacher, group in _groups((c.metric.rpartition("/")[0] or "all teachers", c) for c in found).items():
        colour = teachers.index(teacher) if teacher in teachers else 7
        lines = [tag("tr", tag("th", teacher, class_="head", scope="rowgroup"), tag("td", "", colspan=4))]
        for column in group:
            before, after = (column.values.get(row) for row in pair)
            label = _label(column, metric_name(column.metric.rpartition("/")[2]))
            dots = tag("td", dumbbell(before, after, colour=colour))
            lines.append(tag("tr", label, _cell(before), _cell(after), _change(column, pair), dots))
        bodies.append(tag("tbody", lines, class_="group"))
    heads = [tag("th", "teacher"), tag("th", "before"), tag("th", "after", class_="own"), tag("th", "change"),
             tag("th", "0 — 1")]  # fmt: skip
    return _table(heads, bodies)


def metric_name(metric: str) -> str:
    """A metric's name in a table."""
    teacher, slash, name = metric.rpartition("/")
    return f"{teacher}{slash}{METRICS.get(name, name.replace('_', ' '))}"


def _groups(pairs: Iterable[tuple[str, Column]]) -> Mapping[str, list[Column]]:
    found: dict[str, list[Column]] = {}
    for name, column in pairs:
        found.setdefault(name, []).append(column)
    return found


def _table(heads: list[Markup], bodies: list[Markup]) -> Markup:
    return tag("div", tag("table", tag("thead", tag("tr", heads)), bodies), class_="scroll")


def _label(column: Column, name: str) -> Markup:
    mark = f" ({column.mark})" if column.mark else ""
    hashes = f"{'lower is better; ' if column.lower else ''}protocol {column.protocol}, data {column.data}"
    return tag("th", name, " ↓" if column.lower else None, mark, scope="row", title=hashes)


def _change(column: Column, pair: tuple[str, str]) -> Markup:
    before, after = (column.values.get(row) for row in pair)
    if before is None or after is None:
        return _cell(None)
    return tag("td", delta(before, after, lower=column.lower))


def _cell(value: float | None, class_: str | None = None) -> Markup:
    return tag("td", "–", class_="none") if value is None else tag("td", number(value), class_=class_)
