"""The commands that measure models, report what was measured, and compare two models."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from agglo.types import AggloError, ConfigError

if TYPE_CHECKING:
    from agglo.harness.measuring import Measured
    from agglo.harness.running import Outcome
    from agglo.results.comparing import Compared
    from agglo.results.records import Result
    from agglo.teachers.base import Teacher

_MOST = 5


def eval_command(
    model: str = typer.Argument(
        metavar="MODEL", help="A released name, a saved model, a run folder, or a teacher: '{kind: hog}'."
    ),
    changes: list[str] | None = typer.Argument(
        None, metavar="[eval.key=value]...", help="Changes, e.g. knn.k=10 or segmentation.size=224."
    ),
    suite: str = typer.Option("", "--suite", "-s", help="quick (the default), dense, full or demo."),
    evals: str = typer.Option("", "--evals", help="Kinds instead: knn,zero_shot; with --protocol, names of its evals."),
    protocol: str | None = typer.Option(None, help="As they measured: nvidia, siglino, eupe or probe3d."),
    data: Path | None = typer.Option(None, help="The folder of data sets; AGGLO_DATA by default."),
    sizes: str = typer.Option("", "--sizes", help="Run each eval at several sides, in pixels: 128,224,448."),
    out: Path | None = typer.Option(
        None, "--out", "-o", help="Folder of results.jsonl; RUN/evals or evals/<model> by default."
    ),
    numbers: Path | None = typer.Option(None, "--json", help="Also write the numbers to this .json file."),
    again: bool = typer.Option(False, "--again", help="Measure what is in the folder already, too."),
    features: bool = typer.Option(True, "--features/--no-features", help="Keep encoded images in the folder."),
    pictures: bool = typer.Option(True, "--pictures/--no-pictures", help="Paint what the model sees, for the report."),
    workers: int = typer.Option(0, help="Threads that read images ahead."),
    device: str | None = typer.Option(None, help="cpu, cuda, ...; cpu by default."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the .json file if it exists."),
) -> None:
    """Measure a model; each number is kept as soon as it is there, so an interrupted suite goes on where it stopped."""
    from agglo.harness.protocols import plan
    from agglo.harness.protocols import protocol as published

    if out is not None and out.suffix == ".json":
        raise ConfigError(f"--out {out} is a folder of results: write single numbers with --json {out}")
    target = None
    if numbers is not None:
        from agglo.embedding import check_output

        target = check_output(numbers, overwrite=overwrite, endings=(".json",))
    if suite and (evals or protocol):
        raise ConfigError("--suite excludes --evals and --protocol: name one of them")
    what = evals if protocol else (evals or suite or "quick")
    entries = plan(what, published=protocol, data=data, sizes=_sides(sizes), changes=changes or [])
    loaded, name, options = load(model, device, heads=_heads(entries))
    folder = out or default_folder(model)
    found = _measure(
        loaded, name, entries, folder, built_from=options, published=protocol, again=again, workers=workers,
        keep_features=features, teachers=_teachers(model, entries, device),
    )  # fmt: skip
    if pictures and found.results:
        _paint(loaded, found, folder)
    _tell(found, folder)
    if protocol:
        for line in published(protocol).differs:
            typer.echo(f"not as published: {line}", err=True)
    if target is not None:
        from agglo.files import write_json

        lower = sorted({metric for result in found.results.values() for metric in result.lower_is_better})
        metrics: dict[str, Any] = {each: dict(result.metrics) for each, result in found.results.items()}
        metrics |= {"skipped": found.skipped} if found.skipped else {}
        write_json(target, {"models": {name: metrics}, "lower_is_better": lower})
        typer.echo(f"wrote {target}", err=True)
    if found.failed or not found.results:
        raise typer.Exit(1)


def report(
    runs: list[Path] = typer.Argument(metavar="RUN...", help="A run of agglo train; or folders of agglo eval."),
    out: Path | None = typer.Option(None, "--out", "-o", help="The page of eval results, .html."),
) -> None:
    """One HTML page: of a training run (its evals first, where they are missing), or of all results of some folders."""
    if len(runs) == 1 and not (runs[0] / "results.jsonl").is_file() and _is_run(runs[0]) and out is None:
        return report_run(runs[0])
    from agglo.report.measured import write_results

    page = out or ((runs[0] if runs[0].is_dir() else runs[0].parent) if len(runs) == 1 else Path()) / "report.html"
    if page.is_file() and 'name="generator" content="agglo"' not in page.read_text(encoding="utf-8", errors="ignore"):
        raise ConfigError(f"{page} exists and is no report of ours: name another file with -o")
    html, table = write_results(runs, page)
    typer.echo(f"report: {html}\ntable: {table}")


def compare(
    a: str = typer.Argument(metavar="A", help="A folder of agglo eval; FOLDER#MODEL where it holds several."),
    b: str = typer.Argument(metavar="B", help="The other."),
    most: int = typer.Option(_MOST, help="Classes and images to show of each eval."),
    seed: int = typer.Option(0, help="Of the bootstrap."),
    numbers: Path | None = typer.Option(None, "--json", help="Also write everything to this .json file."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the .json file if it exists."),
) -> None:
    """How sure is a difference: paired bootstrap over images, classes and images that changed."""
    from agglo.results.comparing import compare as pair
    from agglo.results.records import read_images

    target = None
    if numbers is not None:
        from agglo.embedding import check_output

        target = check_output(numbers, overwrite=overwrite, endings=(".json",))
    (ours, a_folder, a_title), (theirs, b_folder, b_title) = (_results(place) for place in (a, b))
    names = [name for name in ours if name in theirs]
    if not names:
        raise ConfigError(f"no eval was run on both: {', '.join(ours)} and {', '.join(theirs)}")
    found = [
        pair(ours[n], theirs[n], read_images(a_folder, ours[n]), read_images(b_folder, theirs[n]), seed) for n in names
    ]
    for one in found:
        _tell_compared(one, a_title, b_title, most)
    only = [name for name in (*ours, *theirs) if name not in names]
    if only:
        typer.echo(f"on one of them only: {', '.join(only)}", err=True)
    if target is not None:
        from dataclasses import asdict

        from agglo.files import write_json

        rows = [{**asdict(one), "lower_is_better": sorted(one.lower_is_better)} for one in found]
        write_json(target, {"a": a_title, "b": b_title, "evals": rows})
        typer.echo(f"wrote {target}", err=True)


# --- models -----------------------------------------------------------------------------------------------------------


def _heads(entries: list[dict[str, Any]]) -> str:
    """The heads to load: those of released models are large, so all of them only where an eval reads them."""
    from agglo.config import find

    return "all" if any(getattr(find("evals", str(e["kind"])), "needs_heads", False) for e in entries) else "text"


def load(model: str, device: str | None, heads: str = "text") -> tuple[Any, str, dict[str, Any] | None]:
    """A model by name or path, or a teacher by its options as YAML; what to call it; and those options."""
    where = checked_device(device) or "cpu"
    if model.lstrip().startswith("{"):
        from agglo.config import build, read_yaml

        options = read_yaml(model, "MODEL")
        teacher = build("teachers", options, where="MODEL").requires_grad_(False).eval().to(where)
        rest = [str(value) for key, value in options.items() if key != "kind"]
        return teacher, " ".join([str(options.get("kind")), *rest]), options
    from agglo.zoo import loading as zoo

    # Heads of ours are small, and a model is one model, whatever is measured.
    return zoo.load(model, heads=None if zoo.is_ours(model) else heads, device=where), model, None


def checked_device(device: str | None) -> str | None:
    """The device, found out to work before anything is loaded onto it.

    Raises:
        ConfigError: it does not work here.
    """
    if device is None:
        return None
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device {device} cannot be used here ({first}): try --device cpu") from None
    return device


def default_folder(model: str) -> Path:
    """Where results of a model go unless told otherwise: into its run folder, else ``evals/<model>``."""
    from agglo.results.identity import file_name

    return Path(model) / "evals" if _is_run(Path(model)) else Path("evals") / file_name(model)


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "model"))


def _teachers(model: str, entries: list[dict[str, Any]], device: str | None) -> dict[str, Teacher] | None:
    """The teachers of a run, where an eval compares with them."""
    from agglo.results.identity import takes_teachers

    recipe = Path(model) / "recipe.yaml"
    if not recipe.is_file() or not any(takes_teachers(str(entry["kind"])) for entry in entries):
        return None
    from agglo.objectives.distill import build_teachers
    from agglo.recipe import load as load_recipe

    return {name: each.to(device or "cpu") for name, each in build_teachers(load_recipe(str(recipe))).items()}


def _sides(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--sizes {text}: give sides in pixels, 128,224,448")
    return [int(part) for part in parts]


# --- what is told -----------------------------------------------------------------------------------------------------


def _measure(loaded: Any, name: str, entries: list[dict[str, Any]], folder: Path, **options: Any) -> Measured:
    from agglo.cli.terminal import status
    from agglo.harness.measuring import measure

    def done(outcome: Outcome) -> None:
        if outcome.metrics is not None:
            first = ", ".join(f"{key} {value:.3f}" for key, value in list(outcome.metrics.items())[:3])
            typer.echo(f"{outcome.name}: {first} ({outcome.seconds:.1f} s)", err=True)
        for warning in outcome.warnings:
            typer.echo(f"  note: {warning}", err=True)

    with status(f"eval · {len(entries)} evals") as say:
        try:
            return measure(loaded, name, entries, folder, progress=say, done=done, **options)
        except KeyboardInterrupt:
            typer.echo(f"stopped; what is finished is in {folder}. The same command goes on from there.", err=True)
            raise


def _paint(loaded: Any, found: Measured, folder: Path) -> None:
    from agglo.cli.terminal import status
    from agglo.harness.pictures import paint

    with status("painting what the model sees"):
        try:
            paint(loaded, found.model["hash"], folder)
        except (AggloError, OSError, ValueError) as error:  # numbers without pictures are still numbers
            typer.echo(f"no pictures: {error}", err=True)


def _tell(found: Measured, folder: Path) -> None:
    name = str(found.model["name"])
    lower = frozenset(metric for result in found.results.values() for metric in result.lower_is_better)
    if found.results:
        print_numbers({name: {each: dict(result.metrics) for each, result in found.results.items()}}, lower)
    if found.known:
        typer.echo(f"already measured: {', '.join(found.known)} (--again measures anew)", err=True)
    for each, why in found.skipped.items():
        typer.echo(f"{each} left out: {why}", err=True)
    for each, why in found.failed.items():
        typer.echo(f"{each} failed: {why}", err=True)
    if not found.results:
        typer.echo(f"nothing was measured on {name}: every eval was left out or failed", err=True)
    else:
        typer.echo(f"results: {folder / 'results.jsonl'}; look at them with `agglo report {shlex.quote(str(folder))}`")


def print_numbers(models: dict[str, Any], lower: frozenset[str]) -> None:
    """The table of numbers, on the terminal."""
    from agglo.cli.terminal import console, numbers_table

    console().print(numbers_table(models, lower))


def measure_run(folder: Path, device: str | None = None) -> None:
    """A training run's evals, with a status line, then their table."""
    from agglo.cli.terminal import status
    from agglo.training.measure import measure

    with status("evals") as say:
        record = measure(folder, device=device, progress=say)
    print_numbers(record["models"], frozenset(record["lower_is_better"]))


def report_run(run: Path) -> None:
    """A training run's page; its evals first, where they were not run yet."""
    recipe = run / "recipe.yaml"
    if recipe.is_file() and (run / "model").is_dir() and not (run / "evals.json").is_file():
        from agglo.recipe import load as load_recipe

        if load_recipe(str(recipe)).evals:
            measure_run(run)
    write_report(run)


def write_report(folder: Path) -> None:
    """A training run's page, and where it is."""
    from agglo.cli.terminal import status
    from agglo.report import write

    with status("report"):
        page = write(folder)
    typer.echo(f"report: {page}")


# --- comparing --------------------------------------------------------------------------------------------------------


def _results(place: str) -> tuple[dict[str, Result], Path, str]:
    """The results of a row (:func:`agglo.results.tables.labels`) by name, the folder they lie in, and the row's label.

    Raises:
        ConfigError: the folder holds no results, or several rows and none is named, or none of that name.
    """
    from agglo.results.records import read, results_file
    from agglo.results.tables import labels

    path, _, wanted = (place, "", "") if os.path.exists(place) else place.rpartition("#")
    found = read(path or place)
    if not found:
        raise ConfigError(f"{results_file(path or place)} holds no results: measure first, with `agglo eval MODEL`")
    called = labels(found)
    names = list(dict.fromkeys(called.values()))
    if not wanted and len(names) > 1:
        raise ConfigError(
            f"{place} holds results of {', '.join(names)}: name one, {shlex.quote(f'{place}#{names[0]}')}"
        )
    if wanted and wanted not in names:
        from agglo.config import nearest

        raise ConfigError(f"{path} holds no results of {wanted!r}{nearest(wanted, names)}")
    wanted = wanted or names[0]
    return {each.name: each for each in found if called[each.id] == wanted}, Path(path or place), wanted


def _numbers(x: float, y: float) -> tuple[str, str, str]:
    return f"{x:.4f}", f"{y:.4f}", f"{y - x:+.4f}"


def _tell_compared(one: Compared, a: str, b: str, most: int) -> None:
    from agglo.cli.terminal import console, table

    if one.why:
        typer.echo(f"{one.name}: not compared, for the two were measured differently: {one.why}\n")
        return
    made = table("metric", a, b, "difference", "95 % interval", "b better", title=one.name, right=1)
    intervals = {interval.metric: interval for interval in one.intervals}
    for metric in dict.fromkeys((*one.metrics, *intervals)):
        interval, values = intervals.get(metric), one.metrics.get(metric)
        arrow = " ↓" if metric in one.lower_is_better else ""
        # A ratio of sums (mIoU) is not the mean of its images' values, and the interval is that of their mean.
        apart = interval is not None and values is not None and abs(interval.a - values[0]) > 1e-6
        if values is not None and (interval is None or apart):
            made.add_row(f"{metric}{arrow}", *_numbers(*values), "", "")
        if interval is not None:
            share = 1 - interval.better if arrow else interval.better
            span = f"{interval.low:+.4f} to {interval.high:+.4f}{' *' if interval.sure else ''}"
            name = f"{metric}{arrow}{', mean of images' if apart else ''}"
            made.add_row(name, *_numbers(interval.a, interval.b), span, f"{share:.0%}")
    console().print(made)
    for metric, rows in (*one.classes.items(), *one.changed.items()):
        if rows:
            kind = "classes" if one.classes.get(metric) is rows else "images"
            console().print(f"{kind} by {metric}: {len(rows)} changed", highlight=False)
            for name, x, y in rows[:most]:
                console().print(f"  {name}: {x:.3f} → {y:.3f}", highlight=False, markup=False)
    for note in one.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo("")
