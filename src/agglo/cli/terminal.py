"""Tables of models, kinds, recipes and results; a status line; a progress bar."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agglo.config import POINTS, find, kinds, read_yaml, schema
from agglo.types import AggloError

if TYPE_CHECKING:
    from agglo.results.records import Result
    from agglo.zoo.info import ModelInfo


def table(*columns: str, title: str | None = None, right: int | None = None) -> Table:
    """An empty table; columns from index ``right`` on hold numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        number = right is not None and index >= right
        made.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return made


def models_table() -> Table:
    """The released models."""
    from agglo.zoo.loading import list_models
    from agglo.zoo.releases import SIZES_ASSUME, HubModel

    made = table("model", "params", "size", "licence", "use")
    for model in list_models():
        size = f"{model.megabytes:.1f} MB" if model.bundled else "not bundled"
        if isinstance(model, HubModel):
            size = f"about {model.megabytes / 1000:.1f} GB"
        params = f"{model.params:.1f} M" if model.params is not None else ""
        made.add_row(Text(model.name, "bold"), params, size, model.licence, Text(model.what_for))
    made.caption, made.caption_justify = SIZES_ASSUME, "left"
    return made


def info_table(info: ModelInfo) -> Table:
    """A model's widths, tokens, heads, legal sizes and cost."""
    made = Table(box=None, show_header=False, pad_edge=False)

    def add(name: str, text: str) -> None:
        made.add_row(Text(name, "bold"), Text(text))

    height, width = info.size
    flops, (weights, activations) = info.flops, info.memory
    add("model", info.name)
    add("licence", info.licence)
    add("student", ", ".join(f"{key} {value}" for key, value in info.student.items()))
    heads = f" + {info.params[1] / 1e6:.1f} M in heads" if info.params[1] else ""
    add("parameters", f"{info.params[0] / 1e6:.1f} M{heads}")
    slots = f" ({info.summary[1]} class tokens)" if info.summary[1] > 1 else ""
    add("summary", f"{info.summary[0]}{slots}")
    add("map", f"{info.spatial} channels, a cell every {info.stride} pixels")
    add("tokens", f"class: {', '.join(info.tokens)}; {info.registers} registers")
    largest = f"; made for up to {info.largest}" if info.largest else ""
    add("sizes", f"sides that are multiples of {info.step} pixels; best at {info.preferred}{largest}")
    add("windows", "window=6 to 32 patches (ViTDet), or none" if info.windows else "none")
    for name, widths in info.heads.items():
        text = ", text" if name in info.text else ""
        add(f"head {name}", (_head_widths(*widths) if widths else "widths known after the download") + text)
    add(
        f"cost at {height}x{width}",
        f"{flops / 1e9:.1f} GFLOPs per image; {weights / 1e6:.0f} MB of weights and {activations / 1e6:.0f} MB of "
        "activations in float32, half of both in bfloat16",
    )
    return made


def _head_widths(summary: int | None, spatial: int | None, upsample: int) -> str:
    finer = f", {upsample} times finer" if upsample > 1 else ""
    parts = [f"summary {summary}"] if summary else []
    return ", ".join([*parts, *([f"map {spatial}{finer}"] if spatial else [])])


def kinds_table(point: str | None = None) -> Table:
    """Every kind of one extension point, or of all, with the first line of its docstring."""
    made = table("point", "kind", "what it is")
    for each in [point] if point else POINTS:
        for index, kind in enumerate(kinds(each)):
            made.add_row("" if index else each, Text(kind, "bold"), Text(_first_line(each, kind)))
    return made


def kind_table(point: str, kind: str) -> Table:
    """The keys of one kind: its constructor's keyword-only parameters."""
    made = table("key", "type", "default", title=f"{point}: {kind}")
    for name, field in schema(find(point, kind)).model_fields.items():
        default = "required" if field.is_required() else _plain(field.default)
        made.add_row(Text(name, "bold"), Text(_type_name(field.annotation)), Text(default))
    return made


def kind_help(point: str, kind: str) -> str:
    """A kind's whole docstring."""
    return inspect.getdoc(find(point, kind)) or ""


def recipes_table() -> Table:
    """The recipes in the package and their claims."""
    from agglo.recipe import RECIPES, names

    made = table("recipe", "claim", "hardware", "time")
    for name in names():
        try:
            claim = read_yaml((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), name).get("claim") or {}
            row = [str(claim.get(key, "")) for key in ("summary", "hardware", "time")]
        except AggloError as error:  # a bad file does not hide the others
            row = [str(error), "", ""]
        made.add_row(Text(name, "bold"), *map(Text, row))
    return made


def recipe_table(name: str) -> Table:
    """One recipe's claim, and the commands that run it."""
    from agglo.recipe import load

    recipe = load(name)
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_row(Text("recipe", "bold"), recipe.name)
    for key, value in recipe.claim.model_dump().items():
        if value:
            made.add_row(Text(key, "bold"), Text(str(value)))
    made.add_row(
        Text("teachers", "bold"), Text(", ".join(f"{n} ({e.teacher['kind']})" for n, e in recipe.teachers.items()))
    )
    made.add_row(Text("run", "bold"), f"agglo train {name}   (--smoke: a few steps; --print: the whole recipe)")
    return made


def results_table(results: Sequence[Result]) -> Table:
    """Metrics down, models across; the best number of a row in bold."""
    from agglo.results.tables import columns, number, rows

    order = rows(results)
    made = table("eval", "metric", *order, right=2)
    before = None
    for column in columns(results):
        best = column.best()
        cells = [
            Text(number(column.values[row]) if row in column.values else "-", "bold" if row in best else "")
            for row in order
        ]
        name = f"{column.name} ({column.mark})" if column.mark else column.name
        made.add_row("" if name == before else name, Text(column.metric + (" ↓" if column.lower else "")), *cells)
        before = name
    return made


def _first_line(point: str, kind: str) -> str:
    try:
        return (inspect.getdoc(find(point, kind)) or "").strip().partition("\n")[0]
    except (AggloError, ImportError) as error:  # a third party's kind may be broken; list the others
        return f"cannot be imported: {error}"


def _type_name(annotation: Any) -> str:
    if inspect.isclass(annotation) and not getattr(annotation, "__args__", ()):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _plain(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        return repr(value)


# --- while something runs ---------------------------------------------------------------------------------------------


def console(*, stderr: bool = False) -> Console:
    """The console of stdout or stderr; 160 columns wide if it is not a terminal."""
    made = Console(stderr=stderr)
    # Piped output is read by programs: do not fold rows at 80 columns.
    return made if made.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=160)


@contextlib.contextmanager
def status(title: str) -> Iterator[Callable[[str], None]]:
    """A status line on stderr; yields the function that updates it. Silent if stderr is not a terminal."""
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        yield lambda phrase: None
        return
    with terminal.status(title) as line:
        yield lambda phrase: line.update(f"{title} · {phrase}")


@contextlib.contextmanager
def encoding_bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr with images per second; yields the function that updates it."""
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    terminal = console(stderr=True)
    # Skipped images are listed once, after the bar.
    log = logging.getLogger("agglo.data.loader")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
            task = bar.add_task("encoding", total=total, rate="")

            def show(done: int, total: int) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, completed=done, total=total, rate=f"{speed:.0f} images/s" if speed else "")

            yield show
    finally:
        log.setLevel(level)
