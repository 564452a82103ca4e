"""The page of a training run: loss curves, what was measured, feature pictures, text search, how to reproduce it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import ImageStat

from agglo.config import build
from agglo.extras import install_command
from agglo.files import write_text
from agglo.model.model import Model
from agglo.report import page, visuals
from agglo.report.charts import line_chart, stacked_bar
from agglo.report.failures import failures
from agglo.report.markup import Child, Markup, picture, tag
from agglo.report.run import TrainingRun, read_run
from agglo.report.tables import metric_tiles, tile
from agglo.report.visuals import Gallery, Models, Search
from agglo.results.records import STUDENT
from agglo.results.tables import before_and_after, columns, labels, number
from agglo.types import AggloError

MODELLING = ("teachers", "forward", "backward")
"""Phases of the training loop that are not overhead."""

T = TypeVar("T")


def write_run(folder: str | Path, progress: Callable[[str], None] | None = None) -> Path:
    """Write ``report.html`` into a run folder.

    The page holds the folder's files (``recipe.yaml``, ``versions.json``, ``metrics.jsonl``, ``evals/``) and pictures
    made with its models (``initial/``, ``model/``) and the recipe's teachers. It loads nothing and runs no script. A
    missing part is named in its place, with the command that makes it.

    Args:
        folder: a run folder of ``agglo train``, finished or not.
        progress: called with short phrases.

    Returns:
        The path of the page; an older one is replaced.

    Raises:
        ConfigError: the folder is not a run folder.
    """
    run = read_run(Path(folder))
    page.check_page(run.folder / "report.html")

    def attempt(what: str, make: Callable[[], T]) -> tuple[T | None, str]:
        if progress is not None:
            progress(what)
        try:
            return make(), ""
        except Exception as error:  # noqa: BLE001 (the page is written without the part and states the error)
            return None, f"{type(error).__name__}: {error}".rstrip(".")

    models = attempt("loading the student and its teachers", lambda: load_models(run))[0] or Models()
    images = visuals.gallery_images(run.recipe)
    gallery, no_gallery = attempt("painting spatial features", lambda: visuals.gallery(models, run.recipe, images))
    search, no_search = attempt("searching held-out photos by text", lambda: visuals.search(models, run.recipe))
    results = [result for _, result in run.found]
    own = [(place, result) for place, result in run.found if result.model.get("role") == STUDENT]
    unmeasured: list[Child] = [_missing("No results yet. Measure with ", _code(f"agglo report {_quoted(run)}"))]
    sections: list[page.Section] = [
        ("learning", "Learning", _learning(run)),
        ("measured", "Measured", page.measured(results, run.teachers) if results else unmeasured),
        ("resolution", "Resolution", page.resolution(results)),
        ("seen", "Spatial features", _seen(run, gallery, no_gallery)),
        ("found", "Text search", _found(search, no_search)),
        ("matches", "Matches", page.matches(own)),
        ("failures", "Worst images", page.worst(failures(own))),
        ("protocol", "Protocol", page.protocol(results) if results else []),
        ("reproduce", "Reproduce", _reproduce(run)),
    ]
    head = _header(run, models.student, gallery, search)
    html = page.render(run.name, head, sections, f"Made by {_agglo(run)} from the files in {run.folder}.")
    return write_text(run.folder / "report.html", html)


def load_models(run: TrainingRun) -> Models:
    """The run's models; those that cannot be loaded are noted in ``run``."""
    models = Models(_load(run, "model"), _load(run, "initial"))
    teachers = {}
    for name, entry in run.recipe.teachers.items() if run.recipe else ():
        if entry.spatial_weight == 0:  # has no picture, and a text-aligned teacher takes long to build
            continue
        try:
            # One by one, so that a teacher that is not installed does not affect the others.
            teachers[name] = build("teachers", entry.teacher, where=f"teachers.{name}").requires_grad_(False).eval()
        except Exception as error:  # noqa: BLE001 (an outside library may raise anything; the page states it)
            run.notes.append(f"teacher {name} is not shown ({error})")
    models.teachers = teachers
    return models


def _load(run: TrainingRun, name: str) -> Model | None:
    if not (run.folder / name).is_dir():
        return None
    try:
        return Model.load(run.folder / name)
    except (AggloError, OSError, RuntimeError, ValueError) as error:
        run.notes.append(f"{name}/ cannot be loaded ({error})")
        return None


def _agglo(run: TrainingRun) -> str:
    version = str(run.versions.get("agglo", ""))
    return f"agglo {version}" if version[:1].isdigit() else "agglo"


def _missing(*parts: Child) -> Markup:
    return tag("p", *parts, class_="empty")


def _code(command: str) -> Markup:
    return tag("code", command)


def _header(run: TrainingRun, student: Model | None, gallery: Gallery | None, search: Search | None) -> Markup:
    claim = run.recipe.claim.summary if run.recipe else ""
    words = tag(
        "div",
        page.brand("report of a run"),
        tag("h1", run.name),
        tag("p", claim, class_="lede") if claim else None,
        tag("p", _what_happened(run, student), class_="facts"),
    )
    duo = _duo(gallery)
    hero = tag("header", words, duo, class_="hero pictured" if duo else "hero")
    notes = tag("ul", [tag("li", note) for note in run.notes], class_="notes") if run.notes else None
    return tag("div", hero, _tiles(run, search), notes)


def _tiles(run: TrainingRun, search: Search | None, limit: int = 6) -> Markup | None:
    results = [result for _, result in run.found]
    called = labels(results)
    students = {called[result.id] for result in results if result.model.get("role") == STUDENT}
    pair = before_and_after(results) or (("", students.pop()) if len(students) == 1 else None)
    shown = metric_tiles(columns(results), pair) if pair else []
    if search is not None and search.queries:
        big = [str(search.found), tag("small", f" / {len(search.queries)}")]
        before = "" if search.found_before is None else f"from {search.found_before} before training"
        shown.insert(0, tile("Right photo first, by text", big, before))
    if len(shown) < 3 and run.metrics:
        images, exact = run.images
        shown += [tile("Steps", f"{run.steps:,}"), tile("Views seen", f"{'' if exact else '≈ '}{images:,}")]
        if run.seconds:
            shown.append(tile("Views per second", number(images / run.seconds, 2), "over the whole run"))
    return tag("div", shown[:limit], class_="tiles") if shown else None


def _duo(gallery: Gallery | None) -> Markup | None:
    """The image with the largest variation of features, beside the student's picture of it."""
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
        tag("figcaption", f"{name} and the first three principal components of the student's spatial features."),
        class_="duo",
    )  # fmt: skip


def _what_happened(run: TrainingRun, student: Model | None) -> list[Child]:
    recipe, words = run.recipe, []
    if recipe is not None:
        kind = str(recipe.student.get("kind", ""))
        model = str(recipe.student.get("model") or kind)
        facts = [f"{kind} kind"] if model != kind else []
        if student is not None:
            facts.append(f"{sum(p.numel() for p in student.student.parameters()) / 1e6:.1f} M parameters")
            facts.append(f"stride {student.spec.stride}")
        words += ["A ", tag("b", model), f" student ({', '.join(facts)})" if facts else " student", " learned from "]
        words += [_listed([tag("b", name) for name in run.teachers])]
        words += [" at once. " if len(run.teachers) > 1 else ". "]
    images, exact = run.images
    if not run.metrics:
        return [*words, "No step is logged yet."]
    views = f"{'' if exact else '≈ '}{images:,}"
    words += ["In ", tag("b", f"{run.steps:,}"), " steps it was trained on ", tag("b", views), " views"]
    if run.seconds:
        words += [" in ", tag("b", _duration(run.seconds))]
    hardware = _hardware(run)
    return [*words, f" on {hardware}." if hardware else "."]


def _listed(items: Sequence[Child]) -> list[Child]:
    out: list[Child] = []
    for index, item in enumerate(items):
        out += [item] if index == 0 else [" and " if index == len(items) - 1 else ", ", item]
    return out


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _hardware(run: TrainingRun) -> str:
    known = run.versions
    if known.get("device") not in (None, "", "cpu"):
        return str(known["device"])
    threads = str(known.get("threads", ""))
    words = f"{threads} CPU thread{'' if threads == '1' else 's'}" if threads else ""
    system = str(known.get("processor") or known.get("platform", ""))
    system = re.sub(r"^(\w+)-.*(x86_64|amd64|arm64|aarch64).*$", r"\1 \2", system)  # no kernel version in a sentence
    return f"{words} ({system})" if words and system else words or system


def _learning(run: TrainingRun) -> list[Child]:
    series = run.series()
    head = page.intro(
        "The loss per teacher and term: each logged step (faint) and a moving average (strong), in units of the "
        "normalised targets."
    )
    if not series:
        train = _code(f"agglo train {_recipe_name(run)}")
        return [head, _missing("metrics.jsonl holds no losses. Train with ", train)]
    teachers = run.teachers
    charts = []
    for name, points in series.items():
        teacher, _, term = name.rpartition("/")
        colour = teachers.index(teacher) if teacher in teachers else len(teachers)
        charts.append(line_chart(f"{teacher} · {term}" if teacher else name, points, colour))
    speed = [(float(e["step"]), float(e["images_per_second"])) for e in run.metrics
             if isinstance(e.get("images_per_second"), int | float)]  # fmt: skip
    if len(speed) > 1:
        charts.append(line_chart("images per second", speed, 7, unit=" /s", tint=False))
    parts: list[Child] = [head, tag("div", charts, class_="charts")]
    if len(run.metrics) == 1:
        parts.append(tag("p", "One step is logged so far.", class_="foot"))
    phases = run.phases()
    if phases:
        total = sum(phases.values()) or 1.0
        work = sum(phases.get(name, 0.0) for name in MODELLING) / total
        title = f"Time per phase: {100 * work:.0f} % in teachers and student"
        parts.append(tag("div", tag("h3", title), stacked_bar(phases), class_="panel"))
    board = run.folder / "tensorboard"
    if board.is_dir() and any(board.iterdir()):
        live = ["The same numbers, live: ", _code(f"tensorboard --logdir {shlex.quote(str(board))}")]
    else:
        live = ["For live curves, install TensorBoard: ", _code(install_command("log"))]
    parts.append(tag("p", live, class_="foot"))
    return parts


def _seen(run: TrainingRun, found: Gallery | None, why: str) -> list[Child]:
    explained = (
        "The first three principal components of each model's map as colours. A column has one basis for all its rows; "
        "colours of different models are not comparable, except between a teacher and the student's head for it."
    )
    if found is None:
        return [page.intro(explained), _missing(f"No pictures: {why}. Finish the run with ", _code(_resume(run)))]
    return [page.intro(explained), page.sheet(found)]


def _found(found: Search | None, why: str) -> list[Child]:
    if found is None:
        advice = "For one, train with a text-aligned teacher: "
        return [_missing(f"No text search: {why}. {advice}", _code("agglo train quickstart"))]
    before = f" (untrained: {found.found_before})" if found.found_before is not None else ""
    head = page.intro(
        f"{found.photos} held-out photos ranked by the cosine between the student's image embedding (head "
        f"{found.head}) and the text's. The right photo has a green frame; it is ranked first for {found.found} of "
        f"{len(found.queries)} texts{before}. The photos were chosen for subjects that the teacher can name."
    )
    cards = []
    for query in found.queries:
        hits = []
        for place, hit in enumerate(query.hits, 1):
            name = hit.name.rpartition("/")[2]
            caption = tag("figcaption", f"{number(hit.score)} {'✓ ' if hit.right else ''}{name}", title=hit.name)
            thumb = picture(hit.thumb, f"rank {place}: {hit.name}", quality=78)
            hits.append(tag("figure", thumb, caption, class_="right" if hit.right else None))
        late = f"The right photo has rank {query.rank}."
        verdict = tag("p", late, class_="verdict bad") if query.rank > 1 else None
        cards.append(tag("article", tag("h3", query.text), tag("div", hits, class_="hits"), verdict, class_="query"))
    return [head, tag("div", cards, class_="queries")]


def _reproduce(run: TrainingRun) -> list[Child]:
    parts: list[Child] = [page.intro("The same recipe, versions and seed give the same numbers on the same machine.")]
    parts.append(tag("pre", tag("code", f"agglo train {_recipe_name(run)} -o {_quoted(run, '-again')}"), class_="wrap"))
    if run.recipe_text:
        parts.append(tag("details", tag("summary", "Resolved recipe"), tag("pre", tag("code", _yaml(run.recipe_text)))))
    if run.versions:
        rows = []
        for name, value in run.versions.items():
            wide = "wide" if len(str(value)) > 24 else None
            rows.append(tag("div", tag("dt", str(name)), tag("dd", str(value)), class_=wide))
        parts.append(tag("details", tag("summary", "Versions"), tag("dl", rows, class_="versions")))
    else:
        parts.append(_missing("versions.json is missing: `agglo train` writes it when a run begins."))
    parts.append(tag("h3", "Three commands to try next", class_="sub"))
    own = _quoted(run)
    steps = [
        ("Search photos by text with this student, or a folder of yours in place of --photos.",
         f'agglo search --photos "a cup of coffee" --model {own}'),
        ("Show its spatial features of one of your images.", f"agglo view YOUR_IMAGE.jpg -o view.png --model {own}"),
        ("Train ten times longer and compare the two reports.",
         f"agglo train {_recipe_name(run)} train.steps={_longer(run)} -o {_quoted(run, '-long')}"),
    ]  # fmt: skip
    items = [tag("li", tag("p", why), tag("pre", tag("code", command), class_="wrap")) for why, command in steps]
    return [*parts, tag("ul", items, class_="cmd")]


def _yaml(source: str) -> list[Child]:
    out: list[Child] = []
    for line in source.splitlines(keepends=True):
        key = re.match(r"^(\s*(?:- )?)([\w./-]+)(?=:)", line)
        out += [key[1], tag("span", key[2], class_="key"), line[key.end() :]] if key else [line]
    return out


def _recipe_name(run: TrainingRun) -> str:
    """The packaged recipe's name if the run used it unchanged, else the path of the run's recipe."""
    from agglo import recipe as recipes

    path = run.folder / "recipe.yaml"
    if run.recipe is None:
        return shlex.quote(str(path)) if path.is_file() else "quickstart"
    if run.recipe.name in recipes.names() and recipes.load(run.recipe.name) == run.recipe:
        return run.recipe.name
    return shlex.quote(str(path))


def _longer(run: TrainingRun) -> int:
    return 10 * (run.recipe.train.steps if run.recipe else max(1, run.steps))


def _resume(run: TrainingRun) -> str:
    return f"agglo train {_recipe_name(run)} -o {_quoted(run)} --resume"


def _quoted(run: TrainingRun, ending: str = "") -> str:
    return shlex.quote(f"{run.folder}{ending}")
