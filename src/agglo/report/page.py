"""The page of eval results: tables, curves over input size, feature pictures, matches, worst images, protocols.

A run's page (:mod:`agglo.report.run_page`) has the same sections and some of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from agglo.files import write_text
from agglo.report.charts import curve_chart
from agglo.report.failures import Failures, failures
from agglo.report.markup import Child, Markup, picture, tag, text
from agglo.report.tables import agreement_table, is_agreement, metric_table
from agglo.report.visuals import Column, Gallery
from agglo.results.records import STUDENT, Result, current, read, results_file
from agglo.results.tables import before_and_after, columns, curves, labels, markdown, model_names, notes, number, rows
from agglo.types import ConfigError

TEMPLATE = Path(__file__).with_name("template.html")
PICTURES, INDEX = "pictures", "index.json"
"""Written by :mod:`agglo.harness.pictures` beside ``results.jsonl``."""

Section = tuple[str, str, list[Child]]
"""Id, title and content; a section without content is left out."""


def check_page(page: Path) -> None:
    """Refuse to replace a file that is not a report of agglo.

    Raises:
        ConfigError: names it.
    """
    if page.is_file() and 'name="generator" content="agglo"' not in page.read_text(encoding="utf-8", errors="ignore"):
        raise ConfigError(f"{page} exists and is not a report of agglo: name another file with -o, or move it away")


def write_results(places: Sequence[str | Path], out: Path) -> tuple[Path, Path]:
    """Write one self-contained HTML page of all results of some folders, and a Markdown table beside it.

    Args:
        places: folders that hold a ``results.jsonl``, or the files.
        out: the page, ``.html``.

    Returns:
        The page and the table, ``.md``.

    Raises:
        ConfigError: ``out`` does not end in ``.html``, or there are no results.
        ResultError: a file is missing, or of another format.
    """
    if out.suffix != ".html":
        raise ConfigError(f"{out}: a report is an .html file; its table is written beside it as .md")
    check_page(out)
    table = out.with_suffix(".md")
    start = table.read_text(encoding="utf-8", errors="ignore")[:10] if table.is_file() else ""
    if start and not start.startswith(("| model |", "No results")):
        raise ConfigError(f"{table} exists and is not a table of agglo: name another page with -o")
    found = [(results_file(place).parent, result) for place in places for result in current(read(place))]
    if not found:
        raise ConfigError("these files hold no results: make some with `agglo eval MODEL --out FOLDER`")
    results = [result for _, result in found]
    names = model_names(results)
    # A run is named by its student, not by the teachers measured before it.
    ranked = sorted(results, key=lambda result: result.model.get("role", STUDENT) != STUDENT)
    models = list(dict.fromkeys(names[str(result.model["hash"])] for result in ranked))
    title = ", ".join(models[:3]) + (" and others" if len(models) > 3 else "")
    facts = f"{len(results)} results of {len(models)} model{'s' if len(models) > 1 else ''}."
    words = tag("div", brand("results of evals"), tag("h1", title), tag("p", facts, class_="facts"))
    head = tag("div", tag("header", words, class_="hero"))
    sections: list[Section] = [
        ("measured", "Measured", measured(results)),
        ("resolution", "Resolution", resolution(results)),
        ("seen", "Spatial features", _seen(found)),
        ("matches", "Matches", matches(found)),
        ("failures", "Worst images", worst(failures(found))),
        ("protocol", "Protocol", protocol(results)),
    ]
    return (
        write_text(out, render(title, head, sections, "Made by agglo from results.jsonl.")),
        write_text(table, markdown(results)),
    )


def render(title: str, head: Markup, sections: Sequence[Section], footer: str) -> str:
    """The whole page: head, navigation, sections."""
    kept = [section for section in sections if section[2]]
    body: list[Child] = [
        head,
        tag("nav", [tag("a", each, href=f"#{name}") for name, each, _ in kept], aria_label="sections"),
        [tag("section", tag("h2", each), parts, id=name) for name, each, parts in kept],
        tag("footer", f"{footer} This page is one file: it loads nothing and sends nothing."),
    ]
    before, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("<!--title-->")
    middle, _, after = rest.partition("<!--body-->")
    return before + text(f"{title} · agglo") + middle + "\n".join(map(text, body)) + after


def brand(kind: str) -> Markup:
    """The line above the title."""
    return tag("p", tag("b", "agglo"), f" · {kind}", class_="brand")


def intro(words: Child) -> Markup:
    """The paragraph under a section's title."""
    return tag("p", words, class_="intro")


def measured(results: Sequence[Result], teachers: Sequence[str] = ()) -> list[Child]:
    """Every metric of every model, agreement with the teachers apart.

    Args:
        results: of any number of models.
        teachers: in the order of their colours; else as measured.
    """
    found, order, pair = columns(results), rows(results), before_and_after(results)
    apart = [column for column in found if pair and is_agreement(column)]
    change = " The change is the student against itself before training." if pair else ""
    why = notes(found)
    parts: list[Child] = [
        intro(f"All numbers of a row have the same settings and the same data. Bold is the best of a row.{change}"),
        metric_table([column for column in found if column not in apart], order, pair),
        tag("ul", [tag("li", note) for note in why], class_="notes") if why else None,
    ]
    if pair and apart:
        teachers = teachers or list(dict.fromkeys(c.metric.rpartition("/")[0] for c in apart if "/" in c.metric))
        meaning = (
            "The cosine between the summary the student predicts for a teacher and the teacher's own, and the share of "
            "the variance of the teacher's spatial map that it explains (R², 1 is all of it)."
        )
        parts += [tag("h3", "Agreement with each teacher", class_="sub"), intro(meaning)]
        parts.append(agreement_table(apart, pair, teachers))
    return parts


def resolution(results: Sequence[Result]) -> list[Child]:
    """Metrics over the input size, where one was measured at several."""
    found, order = curves(results), rows(results)
    charts = [
        curve_chart(f"{name} {metric}", {order.index(model): (model, points) for model, points in models.items()})
        for (name, metric, _), models in found.items()
    ]
    explained = (
        "A metric over the longer side of the input, in pixels; all other settings and the data are the same. Whole "
        "images (aspect: keep) have several sizes; they stand at the size that they cover."
    )
    return [intro(explained), tag("div", charts, class_="charts")] if charts else []


def protocol(results: Sequence[Result]) -> list[Child]:
    """Settings, data, versions and hardware of each protocol, folded."""
    distinct: dict[tuple[str, str], Result] = {result.column: result for result in results}
    called = labels(results)
    remarks: dict[tuple[str, str], dict[str, Sequence[str]]] = {}
    for result in results:
        if result.notes:
            remarks.setdefault(result.column, {})[called[result.id]] = result.notes
    parts: list[Child] = [intro("Settings and data of every number. Equal hashes mean equal settings and equal data.")]
    for result in distinct.values():
        published = f", protocol {result.protocol_name}" if result.protocol_name else ""
        facts = {
            "settings": result.settings,
            # A file named by an eval's own key has no number of images.
            "data": {s: {k: each[k] for k in ("images", "hash") if k in each} for s, each in result.data.items()},
            "view": result.view,
            "versions": result.versions,
            "hardware": result.hardware,
            "notes": remarks.get(result.column, {}),
        }
        title = f"{result.name} · {result.protocol} / {result.data_hash[:8]}{published}"
        code = tag("pre", tag("code", json.dumps(facts, indent=2, ensure_ascii=False)))
        parts.append(tag("details", tag("summary", title), code))
    return parts


def _painted(found: Sequence[tuple[Path, Result]]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Model → the folder of its pictures and their index; models without pictures are left out."""
    called = model_names([result for _, result in found])
    indices = {}
    for folder, result in found:
        key = str(result.model["hash"])
        place = folder / PICTURES / key
        try:
            indices.setdefault(called[key], (place, json.loads((place / INDEX).read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            continue
    return indices


def _open(path: Path | None) -> Image.Image | None:
    try:
        return None if path is None else Image.open(path).convert("RGB")
    except OSError:
        return None


def sheet(gallery: Gallery) -> Markup:
    """A grid of pictures with a head over each column."""
    heads = [(column.title, tag("span", column.note) if column.note else None) for column in gallery.columns]
    cells: list[Child] = [tag("div", *head, class_="head") for head in heads]
    for row, name in enumerate(gallery.names):
        for column in gallery.columns:
            shown = column.pictures[row]
            alt = name if column.title == "image" else f"{name}: {column.title}"
            cells.append(tag("div", "none", class_="gap") if shown is None else picture(shown, alt))
    style = f"grid-template-columns:repeat({len(gallery.columns)},minmax(104px,224px))"
    return tag("div", tag("div", cells, class_="sheet", style=style), class_="gallery")


def _seen(found: Sequence[tuple[Path, Result]]) -> list[Child]:
    indices = {model: (place, index["pca"]) for model, (place, index) in _painted(found).items() if index.get("pca")}
    if not indices:
        return []
    place, first = next(iter(indices.values()))
    gallery = Gallery([row["name"] for row in first], [Column("image", "", [_open(place / r["image"]) for r in first])])
    for model, (place, painted) in indices.items():
        files = {row["name"]: place / row["seen"] for row in painted}
        gallery.columns.append(Column(model, "", [_open(files.get(name)) for name in gallery.names]))
    explained = (
        "The first three principal components of each model's map as colours, one basis per column for all "
        f"{len(first)} images. Colours of different models are not comparable."
    )
    return [intro(explained), sheet(gallery)]


def matches(found: Sequence[tuple[Path, Result]]) -> list[Child]:
    """Matched points between two views of a scene, for the models whose pictures were painted."""
    parts: list[Child] = []
    for model, (place, index) in _painted(found).items():
        shown = []
        for row in index.get("matches", []):
            image = _open(place / row["file"])
            seen = tag("div", "missing", class_="gap") if image is None else picture(image, f"{model}: {row['name']}")
            caption = f"{row['name']}: {100 * float(row['right']):.0f} % correct"
            shown.append(tag("figure", seen, tag("figcaption", caption)))
        if shown:
            parts += [tag("h3", model, class_="sub"), tag("div", shown, class_="charts pairs")]
    explained = (
        "The most certain matches of points on objects between two views of a scene: green if the match is within 5 % "
        "of the image's longer side of the true point, else red."
    )
    style = tag("style", Markup(".pairs img{width:100%;height:auto;border-radius:9px}"))
    return [intro(explained), style, *parts] if parts else []


def worst(failed: Sequence[Failures]) -> list[Child]:
    """The worst images of every metric that is recorded per image."""
    cards = []
    for group in failed:
        hits = []
        for each in group.worst:
            name = each.name.rpartition("/")[2]
            values = [tag("div", f"{model} {number(value)}") for model, value in each.values.items()]
            seen = tag("div", name, class_="gap") if each.thumb is None else picture(each.thumb, each.name, quality=78)
            hits.append(tag("figure", seen, tag("figcaption", each.label or name, values, title=each.name)))
        title = f"{group.name} {group.metric}, the worst of {group.count}"
        cards.append(tag("article", tag("h3", title), tag("div", hits, class_="hits values"), class_="query plain"))
    explained = "The images with the worst mean over the models, with each model's value."
    return [intro(explained), tag("div", cards, class_="queries")] if cards else []
