"""The command line. Commands import heavy packages when they run, so that `agglo --help` is fast."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from agglo.cli import cache as caching
from agglo.cli import catalogue, measure, models
from agglo.cli.arguments import checked_device, is_main_process
from agglo.types import AggloError, ConfigError

INTERRUPTED = 130
ALONE = frozenset({"cache", "embed", "eval", "export", "push", "report", "view"})
"""Commands that run in one process: of several, each would write the same files."""


class Commands(TyperGroup):
    """Prints an error as one line and sets the exit code; ``AGGLO_TRACEBACK=1`` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command: exit code 2 for errors of the input or the system, 130 for Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if os.environ.get("AGGLO_TRACEBACK"):
                raise
            if is_main_process():
                typer.echo("agglo: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # `agglo models | head`
            raise
        except (AggloError, OSError) as error:
            if os.environ.get("AGGLO_TRACEBACK"):
                raise
            if type(error).__name__ == "OtherRankError":  # raised and printed by another process
                raise typer.Exit(2) from None
            what = str(error) if isinstance(error, AggloError) or not error.strerror else _os_error(error)
            typer.echo(f"agglo: {what}", err=True)
            raise typer.Exit(2) from None


def _os_error(error: OSError) -> str:
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{what}: free some space, or write to another disk, and run the same command again" if full else what


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Agglomerative vision backbones: one student distilled from several teachers. "
    "Begin with: agglo train quickstart",
)


def main() -> None:
    """Entry point of the ``agglo`` command."""
    # By default OpenMP's threads spin while they wait and take the cores from the loader's: 10 x slower on two cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _version(show: bool) -> None:
    if show:
        import agglo

        typer.echo(f"agglo {agglo.__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""
    del version
    if ctx.invoked_subcommand in ALONE and os.environ.get("WORLD_SIZE", "1") != "1":
        if not is_main_process():
            raise typer.Exit(2)
        raise ConfigError(
            f"`agglo {ctx.invoked_subcommand}` writes with one process: start it without torchrun (WORLD_SIZE is set)"
        )


# --- training ---------------------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: str = typer.Argument(metavar="RECIPE", help="A recipe's name (see `agglo recipes`) or a YAML file."),
    overrides: list[str] | None = typer.Argument(
        None, metavar="[key.path=value]...", help="Changes, e.g. train.steps=1000."
    ),
    out: Path | None = typer.Option(None, "--out", "-o", help="Run folder; runs/<recipe> by default."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest checkpoint in the run folder."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Throw away what the run folder holds."),
    smoke: bool = typer.Option(False, "--smoke", help="The recipe's pocket size: a few steps, to see that it runs."),
    show: bool = typer.Option(False, "--print", help="Print the resolved recipe and stop."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1, mps; cuda, else cpu, by default."),
    report: bool = typer.Option(True, "--report/--no-report", help="Write report.html at the end."),
    evals: bool = typer.Option(True, "--evals/--no-evals", help="Run the recipe's evals at the end."),
) -> None:
    """Distil a student from its teachers; then measure it and write a report.

    On several GPUs: torchrun --nproc_per_node 8 -m agglo train RECIPE
    """
    from agglo.recipe import load

    resolved = load(recipe, overrides or [], smoke=smoke)
    if show:
        typer.echo(resolved.yaml(), nl=False)
        return
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    folder = out or Path("runs") / (resolved.name + ("-smoke" if smoke else ""))

    from agglo.dist import local_device

    device = checked_device(local_device(device))

    from agglo.training.loop import distill

    distill(resolved, folder, resume=resume, overwrite=overwrite, device=device)
    if not is_main_process():  # the model is saved, and one process measures it
        return
    if resolved.objective.kind == "upsample":
        typer.echo(
            f"\nNext, beside the teacher's keys in a recipe:\n  upsampler: {{kind: featsharp, weights: {folder}}}"
        )
        return
    with _saved(folder):
        complete = not (evals and resolved.evals) or measure.measure_run(folder, device)
        if report:
            measure.write_report(folder)
    run = shlex.quote(str(folder))
    typer.echo(
        f'\nNext:\n  agglo search --photos "a cup of coffee" --model {run}\n'
        f"  agglo view YOUR_IMAGE.jpg -o view.png --model {run}\n"
        f"  agglo embed YOUR_FOLDER -o embeddings.parquet --model {run}"
    )
    if not complete:
        raise typer.Exit(1)


@contextlib.contextmanager
def _saved(folder: Path) -> Iterator[None]:
    """After training: whatever happens now, say that the model is safe and how to get the rest."""
    try:
        yield
    except (KeyboardInterrupt, AggloError, OSError):
        run = shlex.quote(str(folder))
        typer.echo(f"the model is saved in {folder / 'model'}; `agglo report {run}` does the rest", err=True)
        typer.echo(f"(`agglo eval {run}` only measures it)", err=True)
        raise


# --- the other commands -----------------------------------------------------------------------------------------------

app.command("eval")(measure.eval_command)
for command in (
    measure.report, measure.compare,
    models.embed, models.search, models.view, models.export, models.push,
    caching.cache,
    catalogue.models, catalogue.info, catalogue.kinds, catalogue.recipes,
):  # fmt: skip
    app.command()(command)


if __name__ == "__main__":
    main()
