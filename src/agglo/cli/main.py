"""The command line. Commands import heavy packages when they run, so that `agglo --help` is fast."""

from __future__ import annotations

import errno
import os
import re
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from agglo.cli import cache as caching
from agglo.cli import catalogue, curation, measure, models, process, segmenting, training
from agglo.cli.arguments import is_main_process
from agglo.types import AggloError, ConfigError

INTERRUPTED = 130
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|failed to|unable to) allocate|alloc_failed|bad_alloc"
    r"|overflow when|storage size calculation overflowed",
    re.IGNORECASE,
)
"""Texts of the plain RuntimeErrors that torch raises for missing memory: the CPU allocators, CUDA, cuBLAS, cuDNN."""

ALONE = frozenset({"cache", "embed", "eval", "export", "fiftyone", "push", "report", "segment", "view"})
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
        except (MemoryError, OverflowError, RuntimeError) as error:
            what = _resource_error(error)
            if os.environ.get("AGGLO_TRACEBACK") or what is None:
                raise
            typer.echo(f"agglo: {what}", err=True)
            raise typer.Exit(2) from None


def _resource_error(error: Exception) -> str | None:
    """One line on missing memory or a number that is too large; None for other errors."""
    first = next(iter(str(error).strip().splitlines()), "")[:300]
    if isinstance(error, OverflowError):
        return f"a number is too large ({first}): use a smaller one"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return f"out of memory ({first or type(error).__name__}): use a smaller size or batch"
    return None


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
    process.configure()
    if not os.environ.get("AGGLO_TRACEBACK"):  # without the line of code that raised it
        warnings.formatwarning = lambda message, *_, **__: f"note: {' '.join(str(message).split())}\n"
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


app.command()(training.train)
app.command("eval")(measure.eval_command)
for command in (
    measure.report, measure.compare,
    models.embed, models.search, models.view, segmenting.segment, models.export, models.push,
    curation.fiftyone,
    caching.cache,
    catalogue.models, catalogue.info, catalogue.kinds, catalogue.recipes,
):  # fmt: skip
    app.command()(command)


if __name__ == "__main__":
    main()
