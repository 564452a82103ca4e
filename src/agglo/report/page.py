"""The sections of the report, from records and pictures to markup. Nothing here computes a feature."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import ImageStat

from agglo.model.model import Model
from agglo.report.charts import line_chart, stacked_bar
from agglo.report.markup import Child, Markup, number, picture, tag, text
from agglo.report.records import Records
from agglo.report.tables import agreement_table, eval_table, tiles
from agglo.report.visuals import Gallery, Search

TEMPLATE = Path(__file__).with_name("template.html")
MODELLING = ("teachers", "forward", "backward")
"""Phases of the loop that are the work itself; the rest is what the loop costs."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attempt:
    """A part that may have failed: ``value``, or ``why`` there is none."""

    value: object | None
    why: str = ""

    def of(self, kind: type[T]) -> T | None:
        """The value, if it is there and of that type."""
        return self.value if isinstance(self.value, kind) else None


def render(records: Records, student: Model | None, gallery: Attempt, search: Attempt) -> str:
    """The whole page."""
    sections = [
        ("learning", "Learning", _learning(records)),
        ("measured", "Measured", _measured(records)),
        ("seen", "Seen", _seen(records, gallery)),
        ("found", "Found by text", _found(records, search)),
        ("reproduce", "Reproduce", _reproduce(records)),
    ]
    body: list[Child] = [
        _header(records, student, gallery.of(Gallery), search.of(Search)),
        tag("nav", [tag("a", title, href=f"#{name}") for name, title, _ in sections], aria_label="sections"),
        [tag("section", parts, id=name) for name, _, parts in sections],
        tag("footer", f"Made by {_agglo(records)} from the files in {records.folder}. "
                      "This page is one file: it loads nothing and sends nothing."),
    ]  # fmt: skip
    before, _, rest = TEMPLATE.read_text(encoding="utf-8").partition("<!--title-->")
    middle, _, after = rest.partition("<!--body-->")
    return before + text(f"{records.name} · agglo") + middle + "\n".join(map(text, body)) + after


def _agglo(records: Records) -> str:
    version = str(records.versions.get("agglo", ""))
    return f"agglo {version}" if version[:1].isdigit() else "agglo"


def _heading(title: str, intro: Child) -> list[Child]:
    return [tag("h2", title), tag("p", intro, class_="intro")]


def _missing(*parts: Child) -> Markup:
    return tag("p", *parts, class_="empty")


def _code(command: str) -> Markup:
    return tag("code", command)


# --- header -----------------------------------------------------------------------------------------------------------


def _header(records: Records, student: Model | None, gallery: Gallery | None, search: Search | None) -> Markup:
    claim = records.recipe.claim.summary if records.recipe else ""
    words = tag(
        "div",
        tag("p", tag("b", "agglo"), " · report of a run", class_="brand"),
        tag("h1", records.name),
        tag("p", claim, class_="lede") if claim else None,
        tag("p", _what_happened(records, student), class_="facts"),
    )
    duo = _duo(gallery)
    hero = tag("header", words, duo, class_="hero pictured" if duo else "hero")
    return tag("div", hero, tiles(records, search), _notes(records))


def _notes(records: Records) -> Markup | None:
    if not records.notes:
        return None
    return tag("ul", [tag("li", note) for note in records.notes], class_="notes")


def _duo(gallery: Gallery | None) -> Markup | None:
    """The image whose features differ most from place to place, beside the student's picture of it."""
    column = next((c for c in gallery.columns if c.title == "student"), None) if gallery else None
    if gallery is None or column is None:
        return None
    rows = zip(gallery.names, gallery.columns[0].pictures, column.pictures, strict=True)
    pairs = [(name, image, seen) for name, image, seen in rows if image is not None and seen is not None]
    if not pairs:
        return None
    name, image, seen = max(pairs, key=lambda pair: sum(ImageStat.Stat(pair[2]).stddev))
    return tag(
        "figure",
        picture(image, name),
        picture(seen, f"PCA of the student's features of {name}", quality=88),
        tag("figcaption", f"{name}, and what the student makes of it: the three principal components of its "
                          "spatial features, as colours."),
        class_="duo",
    )  # fmt: skip


def _what_happened(records: Records, student: Model | None) -> list[Child]:
    recipe, said = records.recipe, []
    if recipe is not None:
        kind = str(recipe.student.get("kind", ""))
        model = str(recipe.student.get("model") or kind)
        facts = [f"{kind} kind"] if model != kind else []
        if student is not None:
            facts.append(f"{sum(p.numel() for p in student.student.parameters()) / 1e6:.1f} M parameters")
            facts.append(f"stride {student.spec.stride}")
        said += ["A ", tag("b", model), f" student ({', '.join(facts)})" if facts else " student", " learned from "]
        said += [_listed([tag("b", name) for name in records.teachers])]
        said += [" at once. " if len(records.teachers) > 1 else ". "]
    images, exact = records.images
    if not records.metrics:
        return [*said, "No step of it is logged yet."]
    said += [
        "In ",
        tag("b", f"{records.steps:,}"),
        " steps it saw ",
        tag("b", f"{'' if exact else '≈ '}{images:,}"),
        " views",
    ]
    if records.seconds:
        said += [" in ", tag("b", _duration(records.seconds))]
    hardware = _hardware(records)
    return [*said, f" on {hardware}." if hardware else "."]


def _listed(items: Sequence[Child]) -> list[Child]:
    out: list[Child] = []
    for index, item in enumerate(items):
        out += [item] if index == 0 else [" and " if index == len(items) - 1 else ", ", item]
    return out


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _hardware(records: Records) -> str:
    known = records.versions
    if known.get("device") not in (None, "", "cpu"):
        return str(known["device"])
    threads = str(known.get("threads", ""))
    words = f"{threads} CPU thread{'' if threads == '1' else 's'}" if threads else ""
    system = str(known.get("processor") or known.get("platform", ""))
    system = re.sub(r"^(\w+)-.*(x86_64|amd64|arm64|aarch64).*$", r"\1 \2", system)  # no kernel version in a sentence
    return f"{words} ({system})" if words and system else words or system


# --- learning ---------------------------------------------------------------------------------------------------------


def _learning(records: Records) -> list[Child]:
    series = records.series()
    head = _heading(
        "Learning",
        "The loss of every teacher, by term. The faint line is each logged step on crops of changing size, the strong "
        "one a moving average; both in the units of the normalised targets.",
    )
    if not series:
        return [
            *head,
            _missing("metrics.jsonl holds no losses. Train with ", _code(f"agglo train {_recipe_name(records)}")),
        ]
    teachers = records.teachers
    charts = []
    for name, points in series.items():
        teacher, _, term = name.rpartition("/")
        colour = teachers.index(teacher) if teacher in teachers else len(teachers)
        charts.append(line_chart(f"{teacher} · {term}" if teacher else name, points, colour))
    speed = [(float(e["step"]), float(e["images_per_second"])) for e in records.metrics
             if isinstance(e.get("images_per_second"), int | float)]  # fmt: skip
    if len(speed) > 1:
        charts.append(line_chart("images per second", speed, 7, unit=" /s", tint=False))
    parts: list[Child] = [*head, tag("div", charts, class_="charts")]
    if len(records.metrics) == 1:
        parts.append(tag("p", "One step is logged so far, so there is a point and no curve.", class_="foot"))
    phases = records.phases()
    if phases:
        total = sum(phases.values()) or 1.0
        work = sum(phases.get(name, 0.0) for name in MODELLING) / total
        title = f"Where the time went: {100 * work:.0f} % in teachers and student"
        parts.append(tag("div", tag("h3", title), stacked_bar(phases), class_="panel"))
    board = records.folder / "tensorboard"
    if board.is_dir() and any(board.iterdir()):
        parts.append(
            tag(
                "p", "The same numbers, live: ", _code(f"tensorboard --logdir {shlex.quote(str(board))}"), class_="foot"
            )
        )
    else:
        parts.append(
            tag("p", "For live curves, install TensorBoard: ", _code('pip install "agglo[log]"'), class_="foot")
        )
    return parts


# --- measured ---------------------------------------------------------------------------------------------------------


def _measured(records: Records) -> list[Child]:
    head = _heading(
        "Measured",
        "The student, the same student before its first step, and its teachers, under the same protocol. "
        "Bold is the best of a row; the change is the student against itself before training.",
    )
    command = _code(f"agglo report {_quoted(records)}")
    table = eval_table(records)
    agreement = agreement_table(records)
    if table is None and agreement is None:
        return [*head, _missing("evals.json is not there, so nothing is measured yet. Measure with ", command)]
    parts: list[Child] = [*head, table or _missing("Only agreement is measured. Measure the rest with ", command)]
    parts.append(tag("h3", "Agreement with each teacher", class_="sub"))
    meaning = (
        "On images kept out of training: the cosine between the summary the student predicts for a teacher and the "
        "teacher's own, and how much of the variance of the teacher's spatial map it explains (R², 1 is all of it)."
    )
    parts.append(tag("p", meaning, class_="intro"))
    parts.append(agreement or _missing("evals.json holds no agreement. Measure it with ", command))
    return parts


# --- seen -------------------------------------------------------------------------------------------------------------


def _seen(records: Records, attempt: Attempt) -> list[Child]:
    head = _heading(
        "Seen",
        "Spatial features as colours: the first three principal components of each model's map. Every column has one "
        "basis for all its rows, so equal colours in a column mean equal features; colours of different models are not "
        "comparable, except between a teacher and the student's answer in its place.",
    )
    found = attempt.of(Gallery)
    if found is None:
        why = attempt.why or "there is no model"
        return [*head, _missing(f"No pictures: {why}. Finish the run with ", _code(_resume(records)))]
    cells: list[Child] = [
        tag("div", column.title, tag("span", column.note) if column.note else None, class_="head")
        for column in found.columns
    ]
    for row, name in enumerate(found.names):
        for column in found.columns:
            shown = column.pictures[row]
            alt = name if column.title == "image" else f"{name}: {column.title}"
            cells.append(tag("div", "none", class_="gap") if shown is None else picture(shown, alt))
    style = f"grid-template-columns:repeat({len(found.columns)},minmax(104px,1fr))"
    return [*head, tag("div", tag("div", cells, class_="sheet", style=style), class_="gallery")]


# --- found ------------------------------------------------------------------------------------------------------------


def _found(records: Records, attempt: Attempt) -> list[Child]:
    found = attempt.of(Search)
    if found is None:
        head = _heading("Found by text", "Photos ranked by a plain sentence.")
        why = attempt.why or "there is no model"
        return [*head, _missing(f"No text search: {why}. A student learns language from a text-aligned teacher: ",
                                _code("agglo train quickstart"))]  # fmt: skip
    before = f" Before training it was {found.found_before}." if found.found_before is not None else ""
    head = _heading(
        "Found by text",
        f"The student ranks {found.photos} photos it never saw in training by the cosine between its image embedding "
        f"(head {found.head}) and the sentence's. The right photo, framed in green, comes first for "
        f"{found.found} of {len(found.queries)} sentences.{before} The photos were chosen for a subject that the "
        "teacher can name.",
    )
    cards = []
    for query in found.queries:
        hits = []
        for place, hit in enumerate(query.hits, 1):
            name = hit.name.rpartition("/")[2]
            caption = tag("figcaption", f"{number(hit.score)} {'✓ ' if hit.right else ''}{name}", title=hit.name)
            mark = "right" if hit.right else None
            hits.append(
                tag("figure", picture(hit.thumb, f"place {place}: {hit.name}", quality=78), caption, class_=mark)
            )
        verdict = None
        if query.rank > 1:
            verdict = tag("p", f"The right photo is number {query.rank}.", class_="verdict bad")
        cards.append(tag("article", tag("h3", query.text), tag("div", hits, class_="hits"), verdict, class_="query"))
    return [*head, tag("div", cards, class_="queries")]


# --- reproduce --------------------------------------------------------------------------------------------------------


def _reproduce(records: Records) -> list[Child]:
    parts = _heading("Reproduce", "Same recipe, same versions, same seed: the same numbers on the same machine.")
    parts.append(
        tag("pre", tag("code", f"agglo train {_recipe_name(records)} -o {_quoted(records, '-again')}"), class_="wrap")
    )
    if records.recipe_text:
        parts.append(
            tag("details", tag("summary", "Resolved recipe"), tag("pre", tag("code", _yaml(records.recipe_text))))
        )
    if records.versions:
        rows = []
        for name, value in records.versions.items():
            wide = "wide" if len(str(value)) > 24 else None
            rows.append(tag("div", tag("dt", str(name)), tag("dd", str(value)), class_=wide))
        parts.append(tag("details", tag("summary", "Versions"), tag("dl", rows, class_="versions")))
    else:
        parts.append(_missing("versions.json is not there: `agglo train` writes it when a run begins."))
    parts.append(tag("h3", "Three commands to try next", class_="sub"))
    run = _quoted(records)
    steps = [
        ("Search photos by text with this student; put a folder of your own in the place of --photos.",
         f'agglo search --photos "a cup of coffee" --model {run}'),
        ("See what it sees in a picture of yours.", f"agglo view YOUR_IMAGE.jpg -o view.png --model {run}"),
        ("Train ten times longer and compare the two reports.",
         f"agglo train {_recipe_name(records)} train.steps={_longer(records)} -o {_quoted(records, '-long')}"),
    ]  # fmt: skip
    parts.append(
        tag(
            "ul",
            [tag("li", tag("p", why), tag("pre", tag("code", cmd), class_="wrap")) for why, cmd in steps],
            class_="cmd",
        )
    )
    return parts


def _yaml(source: str) -> list[Child]:
    out: list[Child] = []
    for line in source.splitlines(keepends=True):
        key = re.match(r"^(\s*(?:- )?)([\w./-]+)(?=:)", line)
        out += [key[1], tag("span", key[2], class_="key"), line[key.end() :]] if key else [line]
    return out


def _recipe_name(records: Records) -> str:
    """The packaged recipe's name where this run used it as it is, else the path of the resolved one."""
    from agglo import recipe as recipes

    path = records.folder / "recipe.yaml"
    if records.recipe is None:
        return shlex.quote(str(path)) if path.is_file() else "quickstart"
    if records.recipe.name in recipes.names() and recipes.load(records.recipe.name) == records.recipe:
        return records.recipe.name
    return shlex.quote(str(path))


def _longer(records: Records) -> int:
    return 10 * (records.recipe.train.steps if records.recipe else max(1, records.steps))


def _resume(records: Records) -> str:
    return f"agglo train {_recipe_name(records)} -o {_quoted(records)} --resume"


def _quoted(records: Records, ending: str = "") -> str:
    return shlex.quote(f"{records.folder}{ending}")
