"""The commands eval, report and compare."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from agglo.cli.arguments import DEVICE, JSON, OVERWRITE_JSON, checked_json, chosen_device
from agglo.types import AggloError, ConfigError

if TYPE_CHECKING:
    from agglo.harness.measuring import Measured
    from agglo.harness.running import Outcome
    from agglo.results.comparing import Compared
    from agglo.teachers.base import Teacher


def eval_command(
    model: str = typer.Argument(
        metavar="MODEL", help="A released name, a saved model, a run folder, or a teacher: '{kind: hog}'."
    ),
    changes: list[str] | None = typer.Argument(
        None, metavar="[eval.key=value]...", help="Changes, e.g. knn.k=10 or segmentation.size=224."
    ),
    suite: str = typer.Option("", "--suite", "-s", help="quick (default), dense, full or demo."),
    evals: str = typer.Option("", "--evals", help="Comma-separated kinds, instead of --suite: knn,zero_shot."),
    protocol: str | None = typer.Option(None, help="A published protocol: nvidia, siglino, eupe or probe3d."),
    data: Path | None = typer.Option(None, help="Folder of data sets; AGGLO_DATA by default."),
    sizes: str = typer.Option("", "--sizes", help="Run each eval at several sides, in pixels: 128,224,448."),
    out: Path | None = typer.Option(
        None, "--out", "-o", help="Folder of results.jsonl; RUN/evals or evals/<model> by default."
    ),
    numbers: Path | None = JSON,
    again: bool = typer.Option(False, "--again", help="Measure existing results again."),
    features: bool = typer.Option(True, "--features/--no-features", help="Keep encoded images in the folder."),
    pictures: bool = typer.Option(True, "--pictures/--no-pictures", help="Paint spatial features for the report."),
    workers: int = typer.Option(0, help="Threads that read images ahead."),
    device: str | None = DEVICE,
    overwrite: bool = OVERWRITE_JSON,
) -> None:
    """Measure a model. Resumable. Without options, a training run is measured as `agglo train` does."""
    from agglo.harness.protocols import plan
    from agglo.harness.protocols import protocol as published

    if out is not None and out.suffix == ".json":
        raise ConfigError(f"--out {out} is a folder of results: write single numbers with --json {out}")
    target = checked_json(numbers, overwrite=overwrite)
    if suite and (evals or protocol):
        raise ConfigError("--suite excludes --evals and --protocol: name one of them")
    what = evals if protocol else (evals or suite or "quick")
    entries = plan(what, published=protocol, data=data, sizes=_sides(sizes), changes=changes or [])
    device = chosen_device(device)
    if not (suite or evals or protocol or data or sizes or changes or out) and _has_evals(Path(model)):
        return _eval_run(
            Path(model), device, target, again=again, workers=workers, features=features, pictures=pictures
        )
    loaded, name, options = load(model, device, heads=_heads(entries))
    folder = out or default_folder(model)
    facts = None
    if _is_run(Path(model)) and folder == default_folder(model):  # beside what `agglo train` measured, under one name
        from agglo.harness.runs import facts_of
        from agglo.results.records import STUDENT

        name, facts = STUDENT, facts_of(Path(model), STUDENT)
    found = _measure(
        loaded, name, entries, folder, built_from=options, facts=facts, published=protocol, again=again,
        workers=workers, keep_features=features, teachers=_teachers(model, entries, device),
    )  # fmt: skip
    if pictures and found.results:
        _paint(loaded, found, folder)
    _print_measured([found], folder)
    if protocol:
        for line in published(protocol).differs:
            typer.echo(f"not as published: {line}", err=True)
    if target is not None:
        _write_numbers([found], target)
    if found.failed or not found.results:
        raise typer.Exit(1)


def report(
    runs: list[Path] = typer.Argument(metavar="RUN...", help="Run folder or results folders."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Page to write, .html."),
    device: str | None = DEVICE,
) -> None:
    """Write an HTML page of a training run, or of all results of some folders."""
    from agglo.report.page import check_page, write_results

    if len(runs) == 1 and not (runs[0] / "results.jsonl").is_file() and _is_run(runs[0]) and out is None:
        check_page(runs[0] / "report.html")
        return report_run(runs[0], chosen_device(device))

    page = out or ((runs[0] if runs[0].is_dir() else runs[0].parent) if len(runs) == 1 else Path()) / "report.html"
    html, table = write_results(runs, page)
    typer.echo(f"report: {html}\ntable: {table}")


def compare(
    a: str = typer.Argument(metavar="A", help="First run or results folder; FOLDER#MODEL if it has several models."),
    b: str = typer.Argument(metavar="B", help="Second run or results folder."),
    most: int = typer.Option(5, help="Number of classes and images to show per metric."),
    seed: int = typer.Option(0, help="Seed of the bootstrap."),
    numbers: Path | None = JSON,
    overwrite: bool = OVERWRITE_JSON,
) -> None:
    """Compare two models image by image, with paired bootstrap intervals."""
    from agglo.results.comparing import chosen_models, pair_results, read_models
    from agglo.results.comparing import compare as pair
    from agglo.results.records import read_images

    target = checked_json(numbers, overwrite=overwrite)
    first, second = read_models(a), read_models(b)
    a_title, b_title = chosen_models(first, second)
    a_results, b_results = first.of(a_title), second.of(b_title)
    pairs = pair_results(a_results, b_results)
    if not pairs:
        of_a, of_b = (", ".join(dict.fromkeys(each.name for each in found)) for found in (a_results, b_results))
        raise ConfigError(f"no eval was run on both: {of_a} and {of_b}")
    found = [pair(x, y, read_images(first.folder, x), read_images(second.folder, y), seed) for x, y in pairs]
    if a_title == b_title and first.folder != second.folder:
        a_title, b_title = f"{first.folder}#{a_title}", f"{second.folder}#{b_title}"
    for one in found:
        _print_compared(one, a_title, b_title, most)
    names = {name for x, y in pairs for name in (x.name, y.name)}
    only = [name for name in dict.fromkeys(r.name for r in (*a_results, *b_results)) if name not in names]
    if only:
        typer.echo(f"evaluated for one model only: {', '.join(only)}", err=True)
    if target is not None:
        from dataclasses import asdict

        from agglo.files import write_json

        rows = [{**asdict(one), "lower_is_better": sorted(one.lower_is_better)} for one in found]
        write_json(target, {"a": a_title, "b": b_title, "evals": rows})
        typer.echo(f"wrote {target}", err=True)


# --- models -----------------------------------------------------------------------------------------------------------


def _heads(entries: list[dict[str, Any]]) -> str:
    """The heads to load. Those of released models are large: all of them only if an eval reads them."""
    from agglo.config import find

    return "all" if any(getattr(find("evals", str(e["kind"])), "needs_heads", False) for e in entries) else "text"


def load(model: str, device: str, heads: str = "text") -> tuple[Any, str, dict[str, Any] | None]:
    """A model by name or path, or a teacher by its options as YAML; its name in tables; and those options."""
    if model.lstrip().startswith("{"):
        from agglo.config import build, read_yaml

        options = read_yaml(model, "MODEL")
        teacher = build("teachers", options, where="MODEL").requires_grad_(False).eval().to(device)
        rest = [str(value) for key, value in options.items() if key != "kind"]
        return teacher, " ".join([str(options.get("kind")), *rest]), options
    from agglo.zoo import loading as zoo

    # Heads of agglo models are small; loading all of them gives the model one hash for every eval.
    return zoo.load(model, heads=None if zoo.is_ours(model) else heads, device=device), model, None


def default_folder(model: str) -> Path:
    """The default folder of a model's results: in its run folder, else ``evals/<model>``."""
    from agglo.results.identity import file_name

    return Path(model) / "evals" if _is_run(Path(model)) else Path("evals") / file_name(model)


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "model"))


def _teachers(model: str, entries: list[dict[str, Any]], device: str) -> dict[str, Teacher] | None:
    """The teachers of a run, if an eval compares with them."""
    from agglo.results.identity import takes_teachers

    recipe = Path(model) / "recipe.yaml"
    if not recipe.is_file() or not any(takes_teachers(str(entry["kind"])) for entry in entries):
        return None
    from agglo.objectives.base import build_teachers
    from agglo.recipe import load as load_recipe

    return {name: each.to(device) for name, each in build_teachers(load_recipe(str(recipe))).items()}


def _sides(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and len(part) <= 6 and int(part) for part in parts):
        raise ConfigError(f"--sizes {text}: give sides in pixels, 128,224,448")
    return [int(part) for part in parts]


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(loaded: Any, name: str, entries: list[dict[str, Any]], folder: Path, **options: Any) -> Measured:
    from agglo.cli.terminal import status
    from agglo.harness.measuring import measure

    with status(f"eval · {len(entries)} evals") as show:
        try:
            return measure(loaded, name, entries, folder, progress=show, done=_print_outcome, **options)
        except KeyboardInterrupt:
            typer.echo(f"stopped; finished results are in {folder}. The same command resumes.", err=True)
            raise


def _print_outcome(outcome: Outcome, model: str = "") -> None:
    if outcome.metrics is not None:
        first = ", ".join(f"{key} {value:.3f}" for key, value in list(outcome.metrics.items())[:3])
        typer.echo(f"{model}{outcome.name}: {first} ({outcome.seconds:.1f} s)", err=True)
    for warning in outcome.warnings:
        typer.echo(f"  note: {warning}", err=True)


def _write_numbers(measured: Sequence[Measured], target: Path) -> None:
    from agglo.files import write_json

    models: dict[str, dict[str, Any]] = {}
    lower: set[str] = set()
    for found in measured:
        metrics: dict[str, Any] = {each: dict(result.metrics) for each, result in found.results.items()}
        models[found.model["name"]] = metrics | ({"skipped": found.skipped} if found.skipped else {})
        lower |= {metric for result in found.results.values() for metric in result.lower_is_better}
    write_json(target, {"models": models, "lower_is_better": sorted(lower)})
    typer.echo(f"wrote {target}", err=True)


def _paint(loaded: Any, found: Measured, folder: Path) -> None:
    from agglo.cli.terminal import status
    from agglo.harness.pictures import paint

    with status("painting spatial features"):
        try:
            paint(loaded, found.model["hash"], folder)
        except (AggloError, OSError, ValueError) as error:  # the numbers are kept without pictures
            typer.echo(f"no pictures: {error}", err=True)


def _print_measured(measured: Sequence[Measured], folder: Path) -> None:
    from agglo.cli.terminal import console, results_table

    # A known result may have another name (`knn` for `knn@64`).
    results = [replace(result, name=name) for found in measured for name, result in found.results.items()]
    if results:
        console().print(results_table(results))
    for found in measured:
        for note in found.notes:
            typer.echo(f"note: {note}", err=True)
        name = f"{found.model['name']}: " if len(measured) > 1 else ""
        if found.known:
            typer.echo(f"{name}already measured: {', '.join(found.known)} (use --again to repeat)", err=True)
        for each, why in found.skipped.items() if found.model.get("role") != "teacher" else ():
            typer.echo(f"{name}{each} left out: {why}", err=True)
        for each, why in found.failed.items():
            typer.echo(f"{name}{each} failed: {why}", err=True)
    if results:
        typer.echo(f"results: {folder / 'results.jsonl'}; view them with `agglo report {shlex.quote(str(folder))}`")
    else:
        names = ", ".join(str(found.model["name"]) for found in measured)
        typer.echo(f"nothing was measured on {names}: every eval was left out or failed", err=True)


def print_outcome(model: str, outcome: Outcome) -> None:
    """Print the outcome of an eval on a model of a run."""
    _print_outcome(outcome, f"{model}: ")


def print_run(found: dict[str, Measured], folder: Path) -> None:
    """Print the table of a training run."""
    from agglo.harness.runs import RESULTS

    _print_measured(list(found.values()), folder / RESULTS)


def print_page(page: Path) -> None:
    """Print the path of a report."""
    typer.echo(f"report: {page}")


def measure_run(folder: Path, device: str | None = None, **options: Any) -> dict[str, Measured]:
    """Measure a training run and print the table."""
    from agglo.cli.terminal import status
    from agglo.harness import runs

    with status("evals") as show:
        found = runs.measure_run(folder, device=device, progress=show, done=print_outcome, **options)
    print_run(found, folder)
    return found


def _has_evals(folder: Path) -> bool:
    from agglo.harness.runs import has_evals

    return has_evals(folder)


def _eval_run(
    run: Path, device: str, target: Path | None, *, again: bool, workers: int, features: bool, pictures: bool
) -> None:
    """Measure a run as training does: student, untrained student and teachers, with the recipe's evals."""
    from agglo.harness.runs import RESULTS
    from agglo.results.records import STUDENT

    found = measure_run(run, device, again=again, workers=workers, keep_features=features)
    if pictures and found[STUDENT].results:
        _paint(load(str(run), device)[0], found[STUDENT], run / RESULTS)
    if target is not None:
        _write_numbers(list(found.values()), target)
    if any(each.failed for each in found.values()) or not found[STUDENT].results:
        raise typer.Exit(1)


def report_run(run: Path, device: str | None = None) -> None:
    """Write the page of a training run; measure the run first if its results are missing."""
    complete = True
    if (run / "recipe.yaml").is_file() and (run / "model").is_dir() and not _is_measured(run):
        complete = not any(each.failed for each in measure_run(run, device).values())
    write_report(run)
    if not complete:
        raise typer.Exit(1)


def _is_measured(run: Path) -> bool:
    from agglo.harness import runs

    try:
        return runs.is_measured(run)
    except AggloError:
        if (run / runs.RESULTS / "results.jsonl").is_file():  # the page names the damaged recipe or model
            return True
        raise


def write_report(folder: Path) -> None:
    """Write the page of a training run and print its path."""
    from agglo.cli.terminal import status
    from agglo.report.run_page import write_run

    with status("report") as show:
        page = write_run(folder, show)
    print_page(page)


# --- comparing --------------------------------------------------------------------------------------------------------


def _numbers(x: float, y: float) -> tuple[str, str, str]:
    return f"{x:.4f}", f"{y:.4f}", f"{y - x:+.4f}"


def _print_compared(one: Compared, a: str, b: str, most: int) -> None:
    from agglo.cli.terminal import console, table

    if one.why:
        typer.echo(f"{one.name}: not compared, measured differently: {one.why}\n")
        return
    made = table("metric", a, b, "difference", "95 % interval", "b better", title=one.name, right=1)
    intervals = {interval.metric: interval for interval in one.intervals}
    for metric in dict.fromkeys((*one.metrics, *intervals)):
        interval, values = intervals.get(metric), one.metrics.get(metric)
        arrow = " ↓" if metric in one.lower_is_better else ""
        # A ratio of sums (mIoU) is not the mean of its images' values; the interval is that of the mean.
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
