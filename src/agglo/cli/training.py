"""The command that trains."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from agglo.cli import measure
from agglo.cli.arguments import DEVICE, chosen_device, is_main_process
from agglo.types import AggloError


def train(
    recipe: str = typer.Argument(
        metavar="RECIPE", help="A recipe's name (see `agglo recipes`), a YAML file, or a run folder to resume."
    ),
    overrides: list[str] | None = typer.Argument(
        None, metavar="[key.path=value]...", help="Changes, e.g. train.steps=1000."
    ),
    out: Path | None = typer.Option(None, "--out", "-o", help="Run folder; runs/<recipe> by default."),
    resume: bool = typer.Option(False, "--resume", help="Continue from the newest checkpoint in the run folder."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Delete an earlier run in the run folder."),
    smoke: bool = typer.Option(False, "--smoke", help="Run the recipe's smallest version: a few steps."),
    show: bool = typer.Option(False, "--print", help="Print the complete recipe and stop."),
    device: str | None = DEVICE,
    report: bool = typer.Option(True, "--report/--no-report", help="Write report.html at the end."),
    evals: bool = typer.Option(True, "--evals/--no-evals", help="Run the recipe's evals at the end."),
) -> None:
    """Train a recipe, measure the model and write a report.

    On several GPUs: torchrun --nproc_per_node 8 -m agglo train RECIPE
    """
    from agglo.recipe import load

    resolved = load(recipe, overrides or [], smoke=smoke)
    if show:
        typer.echo(resolved.to_yaml(), nl=False)
        return

    from agglo.dist import local_device

    device = chosen_device(local_device(device))

    from agglo.cli.terminal import status
    from agglo.objectives.base import objective_kind
    from agglo.training.loop import train_model
    from agglo.training.run import default_folder, finish

    folder = out or default_folder(resolved, smoke=smoke, source=recipe)
    with contextlib.ExitStack() as held:  # of the folder's lock, until everything is written
        model = train_model(resolved, folder, resume=resume, overwrite=overwrite, device=device, held=held)
        if not is_main_process():  # one process measures
            return
        with _saved(folder):
            found = finish(
                resolved, folder, device=device, evals=evals, report=report, phase=status, done=measure.print_outcome,
                measured=lambda found: measure.print_run(found, folder), reported=measure.print_page,
            )  # fmt: skip
    steps = objective_kind(resolved).next_steps(shlex.quote(str(folder)), model).replace("\n", "\n  ")
    typer.echo(f"\nNext:\n  {steps}" if steps else "")
    if any(each.failed for each in found.values()):
        raise typer.Exit(1)


@contextlib.contextmanager
def _saved(folder: Path) -> Iterator[None]:
    """After training: on an error, state where the model is and which command completes the rest."""
    try:
        yield
    except (KeyboardInterrupt, AggloError, OSError):
        run = shlex.quote(str(folder))
        typer.echo(f"the model is saved in {folder / 'model'}; to measure and report it: agglo report {run}", err=True)
        typer.echo(f"(only to measure it: agglo eval {run})", err=True)
        raise
