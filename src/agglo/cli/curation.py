"""The command for FiftyOne."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agglo.cli.arguments import DEVICE, chosen_device
from agglo.types import ConfigError

if TYPE_CHECKING:
    from agglo.integrations.fiftyone.pipeline import Step


def fiftyone(
    folder: Path = typer.Argument(metavar="DIR", help="A folder of photographs, with its sub-folders."),
    name: str | None = typer.Option(None, help="Name of the dataset; that of the folder by default."),
    model: str = typer.Option("agglo-lite", "--model", "-m", help="A released name, a saved model, or a run folder."),
    prompt: list[str] = typer.Option([], help="Also draw a heatmap of the similarity to this text; repeatable."),
    threshold: float = typer.Option(0.1, help="Largest cosine distance of a near duplicate."),
    method: str = typer.Option("umap", help="Layout of the Embeddings panel: umap, tsne or pca."),
    max_size: int | None = typer.Option(None, help="Longer side of the input of heatmaps, in pixels."),
    batch: int = typer.Option(32, help="Batch size."),
    workers: int | None = typer.Option(None, help="Reading processes; half of the cores by default."),
    device: str | None = DEVICE,
    no_app: bool = typer.Option(False, "--no-app", help="Do not open the App."),
    port: int = typer.Option(5151, help="Port of the App."),
    remote: bool = typer.Option(False, "--remote", help="Serve the App without opening a browser."),
) -> None:
    """Curate a folder in FiftyOne: embeddings, heatmaps, search, layout, near duplicates. Resumable."""
    from agglo.integrations.fiftyone.pipeline import Settings, curate

    if batch < 1:
        raise ConfigError(f"--batch must be at least 1, got {batch}")
    if workers is not None and workers < 0:
        raise ConfigError(f"--workers must be at least 0, got {workers}")
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port must be between 1 and 65535, got {port}")
    settings = Settings(
        model=model,
        max_size=max_size,
        prompts=tuple(prompt),
        threshold=threshold,
        method=method,
        batch_size=batch,
        num_workers=workers,
        device=None if device is None else chosen_device(device),
    )
    with _quiet(), _bars() as (progress, report):
        try:
            found = curate(folder, name=name, settings=settings, progress=progress, report=report)
        except KeyboardInterrupt:
            typer.echo("stopped; finished photographs are kept. The same command continues.", err=True)
            raise
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    for path, why in list(found.failed.items())[:10]:
        typer.echo(f"skipped {path}: {why}", err=True)
    if len(found.failed) > 10:
        typer.echo(f"skipped {len(found.failed) - 10} more; the field agglo_error has the reasons", err=True)
    if no_app:
        typer.echo(f"open it with: fiftyone app launch {found.dataset.name}")
    else:
        _open(found.dataset, port, remote=remote)


def _open(dataset: Any, port: int, *, remote: bool) -> None:
    """Serve the App until Ctrl-C."""
    from agglo.extras import require

    launch = require("fiftyone", "fiftyone").launch_app
    with _quiet():
        session = launch(dataset, port=port, address="127.0.0.1", remote=remote, auto=not remote)
    typer.echo(f"the App is at http://127.0.0.1:{port}/datasets/{dataset.slug}; Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        session.wait(-1)
    session.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out FiftyOne's own progress bars and messages below a warning."""
    from agglo.extras import require

    config, log = require("fiftyone", "fiftyone").config, logging.getLogger("fiftyone")
    before, level = getattr(config, "show_progress_bars", None), log.level
    skipped = logging.getLogger("agglo.integrations.fiftyone.records")
    config.show_progress_bars = False
    log.setLevel(logging.WARNING)
    skipped.setLevel(logging.ERROR)  # the photographs are listed at the end
    try:
        yield
    finally:
        config.show_progress_bars = before
        log.setLevel(level)
        skipped.setLevel(logging.NOTSET)


@contextlib.contextmanager
def _bars() -> Iterator[Any]:
    """A progress bar on stderr for the step that runs, and a line on stdout for every finished one."""
    from agglo.cli.terminal import console

    terminal = console(stderr=True)
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done)

        def report(step: Step) -> None:
            if step.name in tasks:
                bar.remove_task(tasks.pop(step.name))
            seconds = f"{step.seconds:.1f} s" if step.done else "up to date"
            typer.echo(f"{step.name:<18} {seconds:>10}   {step.detail}")

        yield progress, report
