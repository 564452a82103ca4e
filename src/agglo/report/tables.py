"""Key numbers, the table of evals and the table of agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from agglo.report.charts import dumbbell
from agglo.report.markup import MINUS, Child, Markup, number, signed, tag
from agglo.report.records import Records
from agglo.report.visuals import Search

STUDENT, UNTRAINED, AGREEMENT = "student", "untrained", "agreement"

TITLES = {
    "knn": "Nearest neighbours",
    "zero_shot": "Zero-shot by text",
    "segmentation": "Segmentation, linear probe",
    "depth": "Depth, linear probe",
    "normals": "Normals, linear probe",
    "retrieval": "Text search",
    "correspondence": "Correspondence",
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
"""Eval, title of its tile, and the metric to show: the first of these that it has, else its first."""


def delta(before: float, after: float, *, lower: bool = False) -> Markup:
    """The change as an arrow and a number, green where it is an improvement and red where it is not."""
    change = after - before
    shown = signed(change)
    if not any(char in "123456789" for char in shown):
        return tag("span", "unchanged", class_="delta")
    verdict = "good" if (change < 0) == lower else "bad"
    return tag(
        "span", f"{'▼' if change < 0 else '▲'} {shown.lstrip('+' + MINUS)}", class_=f"delta {verdict}", title=shown
    )


# --- tiles ------------------------------------------------------------------------------------------------------------


def tiles(records: Records, search: Search | None, limit: int = 6) -> Markup | None:
    """The key numbers: what changed, and what it cost."""
    student, untrained = records.evals.get(STUDENT, {}), records.evals.get(UNTRAINED, {})
    shown: list[Markup] = []
    for eval_name, title, wanted in HEADLINES:
        if eval_name == AGREEMENT:
            metric, lower = wanted[0], False
            now, was = _average(student.get(AGREEMENT, {}), metric), _average(untrained.get(AGREEMENT, {}), metric)
        else:
            metric = _pick(student.get(eval_name, {}), wanted) or ""
            lower = records.lower(eval_name, metric)
            now, was = student.get(eval_name, {}).get(metric), untrained.get(eval_name, {}).get(metric)
        if now is not None:
            shown.append(_tile(title.format(_metric(metric)), now, was, lower=lower))
    if search is not None and search.queries:
        total = len(search.queries)
        before = "" if search.found_before is None else f"from {search.found_before} before training"
        shown.insert(0, _plain("Right photo first, by text", [str(search.found), tag("small", f" / {total}")], before))
    if len(shown) < 3 and records.metrics:
        shown += _cost(records)
    return tag("div", shown[:limit], class_="tiles") if shown else None


def _cost(records: Records) -> list[Markup]:
    images, exact = records.images
    out = [_plain("Steps", f"{records.steps:,}", ""), _plain("Views seen", f"{'' if exact else '≈ '}{images:,}", "")]
    if records.seconds:
        out.append(_plain("Views per second", number(images / records.seconds, 2), "over the whole run"))
    return out


def _tile(title: str, now: float, was: float | None, *, lower: bool = False) -> Markup:
    under: Child = "" if was is None else [f"from {number(was)}", delta(was, now, lower=lower)]
    return _plain(title, number(now), under)


def _plain(title: str, big: Child, under: Child) -> Markup:
    note = tag("div", under, class_="was") if under else None
    return tag("div", tag("h3", title), tag("div", big, class_="big"), note, class_="tile")


def _pick(metrics: Mapping[str, float], wanted: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in metrics}
    return next((lowered[name] for name in wanted if name in lowered), next(iter(metrics), None))


def _average(metrics: Mapping[str, float], ending: str) -> float | None:
    values = [value for name, value in metrics.items() if name.rpartition("/")[2] == ending and "/" in name]
    return fmean(values) if values else None


# --- evals ------------------------------------------------------------------------------------------------------------


def columns(records: Records) -> list[str]:
    """The models of the table: untrained and trained student, the teachers, then whatever else was measured."""
    known = [UNTRAINED, STUDENT, *records.teachers]
    return [name for name in dict.fromkeys([*known, *records.evals]) if name in records.evals]


def eval_table(records: Records) -> Markup | None:
    """Rows are metrics grouped by eval, columns are models; None where nothing but agreement was measured."""
    names = columns(records)
    evals = dict.fromkeys(e for name in names for e in records.evals[name] if e != AGREEMENT)
    names = [name for name in names if any(e in records.evals[name] for e in evals)]
    if not evals:
        return None
    compared = {STUDENT, UNTRAINED} <= set(names)
    heads = [tag("th", "")]
    for name in names:
        heads.append(tag("th", name, class_="own" if name == STUDENT else None))
        if name == STUDENT and compared:
            heads.append(tag("th", "change"))
    groups = []
    for eval_name in evals:
        metrics = dict.fromkeys(m for name in names for m in records.evals[name].get(eval_name, {}))
        title = tag("th", TITLES.get(eval_name, eval_name), class_="head", scope="rowgroup")
        blank = tag("td", "", colspan=len(heads) - 1)
        rows = [tag("tr", title, blank), *(_row(records, names, eval_name, m, compared) for m in metrics)]
        groups.append(tag("tbody", rows, class_="group"))
    return tag("div", tag("table", tag("thead", tag("tr", heads)), groups), class_="scroll")


def _row(records: Records, names: Sequence[str], eval_name: str, metric: str, compared: bool) -> Markup:
    lower = records.lower(eval_name, metric)
    values = {name: records.evals[name].get(eval_name, {}).get(metric) for name in names}
    shown = {name: number(value) for name, value in values.items() if value is not None and value == value}
    finite = {name: value for name, value in values.items() if name in shown and value is not None}
    best = (min if lower else max)(finite.values()) if len(finite) > 1 else None
    cells: list[Markup] = [tag("th", _metric(metric), " ↓" if lower else None, scope="row",
                               title="lower is better" if lower else None)]  # fmt: skip
    for name in names:
        value = values[name]
        # Equal as printed is equal for the reader: both are bold.
        winner = best is not None and name in shown and shown[name] == number(best)
        cells.append(_cell(value, "best" if winner else None))
        if name == STUDENT and compared:
            now, was = values[STUDENT], values[UNTRAINED]
            cells.append(
                tag("td", delta(was, now, lower=lower)) if now is not None and was is not None else _cell(None)
            )
    return tag("tr", cells)


def _metric(name: str) -> str:
    return METRICS.get(name, name.replace("_", " "))


def _cell(value: float | None, class_: str | None = None) -> Markup:
    return tag("td", "–", class_="none") if value is None else tag("td", number(value), class_=class_)


# --- agreement --------------------------------------------------------------------------------------------------------


def agreement_table(records: Records) -> Markup | None:
    """One row a teacher and metric: before, after, change, and both as dots on a line from 0 to 1."""
    now = records.evals.get(STUDENT, {}).get(AGREEMENT, {})
    was = records.evals.get(UNTRAINED, {}).get(AGREEMENT, {})
    by_teacher: dict[str, list[str]] = {}
    for key in dict.fromkeys([*now, *was]):
        by_teacher.setdefault(key.rpartition("/")[0] or "all teachers", []).append(key)
    if not by_teacher:
        return None
    teachers, groups = records.teachers, []
    for teacher, keys in by_teacher.items():
        colour = teachers.index(teacher) if teacher in teachers else 7
        rows = [tag("tr", tag("th", teacher, class_="head", scope="rowgroup"), tag("td", "", colspan=4))]
        for key in keys:
            before, after = was.get(key), now.get(key)
            lower = records.lower(AGREEMENT, key.rpartition("/")[2])
            change = _cell(None)
            if before is not None and after is not None:
                change = tag("td", delta(before, after, lower=lower))
            line = tag("td", dumbbell(before, after, colour=colour))
            label = tag("th", _metric(key.rpartition("/")[2]), scope="row")
            rows.append(tag("tr", label, _cell(before), _cell(after), change, line))
        groups.append(tag("tbody", rows, class_="group"))
    heads = [tag("th", "teacher"), tag("th", "before"), tag("th", "after", class_="own"), tag("th", "change"),
             tag("th", "0 — 1")]  # fmt: skip
    return tag("div", tag("table", tag("thead", tag("tr", heads)), groups), class_="scroll")
