"""The page of eval results: tables, curves over resolution, what each model sees, and where it fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from agglo.report.charts import BOTTOM as BASE
from agglo.report.charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, _grid, _path, _px
from agglo.report.failures import Failures, failures
from agglo.report.markup import Child, Markup, number, picture, tag, text
from agglo.report.tables import METRICS, TITLES
from agglo.results.records import Result, read, results_file
from agglo.results.tables import Column, columns, curves, labels, markdown, model_names, notes
from agglo.types import ConfigError

TEMPLATE = Path(__file__).with_name("template.html")
PICTURES, INDEX = "pictures", "index.json"
"""What a measuring run leaves beside ``results.jsonl``."""


def write_results(places: Sequence[str | Path], out: Path) -> tuple[Path, Path]:
    """Write one self-contained HTML page of all results of some folders, and a Markdown table beside it.

    Args:
        places: folders that hold a ``results.jsonl``, or the files.
        out: the page, ``.html``.

    Returns:
        The page and the table, ``.md``.

    Raises:
        ConfigError: ``out`` does not end in ``.html``, or there is no result.
        ResultError: a file is missing, or of another format.
    """
    if out.suffix != ".html":
        raise ConfigError(f"{out}: a report is an .html file; its table is written beside it as .md")
    found = [(results_file(place).parent, result) for place in places for result in read(place)]
    if not found:
        raise ConfigError("there is no result in these files: make some with `agglo eval MODEL --out FOLDER`")
    results = [result for _, result in found]
    out.parent.mkdir(parents=True, exist_ok=True)
    table = out.with_suffix(".md")
    for path, content in ((table, markdown(results)), (out, render(found, failures(found)))):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    return out, table


def render(found: Sequence[tuple[Path, Result]], failed: Sequence[Failures]) -> str:
    """The whole page."""
    results = [result for _, result in found]
    models = list(model_names(results).values())
    sections = [
        ("measured", "Measured", _measured(results)),
        ("resolution", "Resolution", _curves(results)),
        ("seen", "Seen", _seen(found)),
        ("found", "Found again", _matches(found)),
        ("failures", "Worst failures", _failures(failed)),
        ("protocol", "Protocol", _protocol(results)),
    ]
    kept = [(name, title, parts) for name, title, parts in sections if parts]
    title = ", ".join(models[:3]) + (" and others" if len(models) > 3 else "")
    body: list[Child] = [
        tag("div", tag("header", tag("div",
            tag("p", tag("b", "agglo"), " · results of evals", class_="brand"),
            tag("h1", title),
            tag("p", f"{len(results)} results of {len(models)} model{'s' if len(models) > 1 else ''}.", class_="facts"),
        ), class_="hero")),
        tag("nav", [tag("a", each, href=f"#{name}") for name, each, _ in kept], aria_label="sections"),
        [tag("section", tag("h2", each), parts, id=name) for name, each, parts in kept],
        tag("footer", "Made by agglo from results.jsonl. This page is one file: it loads nothing and sends nothing."),
    ]  # fmt: skip
    before, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("<!--title-->")
    middle, _, after = rest.partition("<!--body-->")
    return before + text(f"{title} · agglo") + middle + "\n".join(map(text, body)) + after


def _intro(words: str) -> Markup:
    return tag("p", words, class_="intro")


# --- tables -----------------------------------------------------------------------------------------------------------


def _measured(results: Sequence[Result]) -> list[Child]:
    found = columns(results)
    models = list(dict.fromkeys(labels(results).values()))
    head = tag("tr", tag("th", ""), [tag("th", model) for model in models])
    groups: dict[str, list[Column]] = {}
    for column in found:
        groups.setdefault(column.name, []).append(column)
    bodies = []
    for name, group in groups.items():
        title = tag("th", TITLES.get(name, name), class_="head", scope="rowgroup")
        rows = [tag("tr", title, tag("td", "", colspan=len(models))), *(_row(column, models) for column in group)]
        bodies.append(tag("tbody", rows, class_="group"))
    said = notes(found)
    return [
        _intro("Every number of a row has the same settings and the same data. The best of a row is bold."),
        tag("div", tag("table", tag("thead", head), bodies), class_="scroll"),
        tag("ul", [tag("li", note) for note in said], class_="notes") if said else None,
    ]


def _row(column: Column, models: Sequence[str]) -> Markup:
    shown = {model: number(value) for model, value in column.values.items()}
    best = column.best(shown)
    mark = f" ({column.mark})" if column.mark else ""
    name = METRICS.get(column.metric, column.metric.replace("_", " "))
    hashes = f"protocol {column.protocol}, data {column.data}"
    cells = [tag("th", name, " ↓" if column.lower else None, mark, scope="row", title=hashes)]
    for model in models:
        known = model in shown
        style = ("best" if model in best else None) if known else "none"
        cells.append(tag("td", shown.get(model, "–"), class_=style))
    return tag("tr", cells)


def _curves(results: Sequence[Result]) -> list[Child]:
    found = curves(results)
    if not found:
        return []
    order = list(dict.fromkeys(labels(results).values()))
    charts = [
        curve_chart(f"{name} {metric}", {order.index(model): (model, points) for model, points in models.items()})
        for (name, metric, _), models in found.items()
    ]
    intro = (
        "A metric against the longer side of what the model saw, in pixels; all other settings and the data are the "
        "same. Whole images (aspect: keep) have several sizes: theirs is the size that they cover."
    )
    return [_intro(intro), tag("div", charts, class_="charts")]


def curve_chart(title: str, series: dict[int, tuple[str, list[tuple[int, float]]]]) -> Markup:
    """Curves of several models in one chart.

    Args:
        title: what is drawn.
        series: colour → name, and ``(x, value)`` points by rising x, two or more.
    """
    every = [point for _, points in series.values() for point in points]
    x = Axis(min(p[0] for p in every), max(p[0] for p in every), LEFT, WIDTH - RIGHT, margin=0.03)
    y = Axis(min(p[1] for p in every), max(p[1] for p in every), HEIGHT - BASE, TOP)
    marks: list[Child] = [_grid(x, y)]
    for colour, (name, points) in series.items():
        at = [(x(a), y(b)) for a, b in points]
        dots = [tag("circle", cx=_px(a), cy=_px(b), r=3, class_="dot") for a, b in at]
        words = ", ".join(f"{a} px {number(b)}" for a, b in points)
        line = tag("path", tag("title", f"{name}: {words}"), d=_path(at), class_="line")
        marks.append(tag("g", line, dots, class_=f"c{colour % 8}"))
    svg = tag("svg", marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    legend = [tag("li", tag("i", class_=f"c{colour % 8}"), name) for colour, (name, _) in series.items()]
    head = tag("figcaption", tag("span", title, class_="chart-name"))
    return tag("figure", head, svg, tag("ul", legend, class_="legend"), class_="chart")


# --- pictures ---------------------------------------------------------------------------------------------------------


def _indices(found: Sequence[tuple[Path, Result]]) -> dict[str, tuple[Path, dict]]:
    """Model → the folder of its pictures and what they show; models without pictures are not there."""
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


def _image(path: Path, alt: str) -> Markup:
    try:
        with Image.open(path) as image:
            return picture(image, alt)
    except OSError:
        return tag("div", "missing", class_="gap")


def _seen(found: Sequence[tuple[Path, Result]]) -> list[Child]:
    indices = {model: (place, index["pca"]) for model, (place, index) in _indices(found).items() if index.get("pca")}
    if not indices:
        return []
    first_place, first = next(iter(indices.values()))
    names = [row["name"] for row in first]
    cells: list[Child] = [tag("div", title, class_="head") for title in ("image", *indices)]
    for row in first:
        cells.append(tag("div", _image(first_place / row["image"], row["name"])))
        for model, (place, rows) in indices.items():
            own = next((each for each in rows if each["name"] == row["name"]), None)
            shown = tag("div", "none", class_="gap") if own is None else _image(place / own["seen"], f"PCA, {model}")
            cells.append(tag("div", shown))
    style = f"grid-template-columns:repeat({len(indices) + 1},minmax(104px,1fr))"
    intro = (
        "Spatial features as colours: the three principal components of a model's map, one basis for all "
        f"{len(names)} images of a column. Colours of different models are not comparable."
    )
    return [_intro(intro), tag("div", tag("div", cells, class_="sheet", style=style), class_="gallery")]


def _matches(found: Sequence[tuple[Path, Result]]) -> list[Child]:
    parts: list[Child] = []
    for model, (place, index) in _indices(found).items():
        shown = [
            tag("figure", _image(place / row["file"], f"{model}: {row['name']}"),
                tag("figcaption", f"{row['name']}: {100 * float(row['right']):.0f} % right"))
            for row in index.get("matches", [])
        ]  # fmt: skip
        if shown:
            parts += [tag("h3", model, class_="sub"), tag("div", shown, class_="charts pairs")]
    if not parts:
        return []
    intro = (
        "The surest matches of points on objects between two views of a scene: green where the model found the same "
        "point within 5 % of the image's side, red where not."
    )
    return [_intro(intro), tag("style", Markup(".pairs img{width:100%;height:auto;border-radius:9px}")), *parts]


def _failures(failed: Sequence[Failures]) -> list[Child]:
    if not failed:
        return []
    cards = []
    for group in failed:
        hits = []
        for each in group.worst:
            name = each.name.rpartition("/")[2]
            values = [tag("div", f"{model} {number(value)}") for model, value in each.values.items()]
            seen = tag("div", name, class_="gap") if each.thumb is None else picture(each.thumb, each.name, quality=78)
            hits.append(tag("figure", seen, tag("figcaption", each.label or name, values, title=each.name)))
        title = f"{group.name} {group.metric}, the worst of {group.count}"
        cards.append(tag("article", tag("h3", title), tag("div", hits, class_="hits values"), class_="query"))
    intro = "Images on which the models do worst on average, with each model's value."
    return [_intro(intro), tag("div", cards, class_="queries")]


# --- protocol ---------------------------------------------------------------------------------------------------------


def _protocol(results: Sequence[Result]) -> list[Child]:
    seen: dict[tuple[str, str], Result] = {result.column: result for result in results}
    called, told = labels(results), {}
    for result in results:
        if result.notes:
            told.setdefault(result.column, {})[called[result.id]] = result.notes
    parts: list[Child] = [_intro("Everything that was chosen. The same hash is the same choice.")]
    for result in seen.values():
        published = f", protocol {result.protocol_name}" if result.protocol_name else ""
        said = {
            "settings": result.settings,
            # A file that an eval's own key names has no images.
            "data": {s: {k: facts[k] for k in ("images", "hash") if k in facts} for s, facts in result.data.items()},
            "view": result.view,
            "versions": result.versions,
            "hardware": result.hardware,
            "notes": told.get(result.column, {}),
        }
        title = f"{result.name} · {result.protocol} / {result.data_hash[:8]}{published}"
        code = tag("pre", tag("code", json.dumps(said, indent=2, ensure_ascii=False)))
        parts.append(tag("details", tag("summary", title), code))
    return parts
