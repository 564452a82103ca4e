"""The command that writes and verifies feature caches."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from agglo.cli.arguments import DEVICE, chosen_device
from agglo.types import ConfigError, StorageError

if TYPE_CHECKING:
    from agglo.recipe import Recipe
    from agglo.training.precompute import Summary

_INTERVAL = 10.0
"""Seconds between progress lines without a terminal."""


def cache(
    recipe: str | None = typer.Argument(None, metavar="RECIPE", help="A recipe's name, or a YAML file."),
    overrides: list[str] | None = typer.Argument(
        None, metavar="[key.path=value]...", help="Changes, e.g. data.views.crops=2; use the same ones for training."
    ),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder of the cache; features/<recipe> by default."),
    dtype: str = typer.Option("fp16", help="fp32 (exact), fp16, bf16 or int8; the error of each is measured."),
    batch: int = typer.Option(32, help="Images per forward pass of a teacher."),
    device: str | None = DEVICE,
    smoke: bool = typer.Option(False, "--smoke", help="Use the recipe's smallest version."),
    check: Path | None = typer.Option(None, "--check", metavar="DIR", help="Verify every record of a cache."),
) -> None:
    """Precompute teacher features for a recipe. Resumable."""
    if check is not None:
        if recipe is not None:
            raise ConfigError("--check takes a cache's folder and nothing else: agglo cache --check DIR")
        return _check(check)
    if recipe is None:
        raise ConfigError("name a recipe: agglo cache RECIPE data.views.crops=2, or verify a cache: --check DIR")
    if batch < 1:
        raise ConfigError(f"--batch must be at least 1, got {batch}")
    from agglo.recipe import load

    loaded = load(recipe, overrides or [], smoke=smoke)
    folder = out or Path("features") / loaded.name
    command = shlex.join(
        ["agglo", "cache", recipe, *(overrides or []), "--out", str(folder), "--dtype", dtype]
        + (["--smoke"] if smoke else [])
    )
    _print(folder, _precompute(loaded, folder, dtype, batch, device, command), dtype)
    training = shlex.join(["agglo", "train", recipe, *(overrides or []), f"data.feature_cache={folder}"])
    typer.echo(f"\nNext:\n  {training}{' --smoke' if smoke else ''}")


def _precompute(recipe: Recipe, folder: Path, dtype: str, batch: int, device: str | None, command: str) -> Summary:
    from agglo.training.precompute import precompute

    where = chosen_device(device)
    try:
        with _bar() as show:
            return precompute(
                recipe, folder, dtype=dtype, batch=batch, device=where, progress=show, message=_message
            )  # fmt: skip
    except KeyboardInterrupt:
        _message(f"stopped; records already written are intact. Resume with: {command}")
        raise
    except StorageError as error:
        raise StorageError(f"{error}: {command}") from None


def _print(folder: Path, summary: Summary, dtype: str) -> None:
    if summary.recovered:
        typer.echo(f"truncated {summary.recovered} bytes of partial records of an earlier run")
    rate = f", {summary.bytes / 1e6 / max(summary.seconds, 1e-9):.1f} MB/s" if summary.records else ""
    typer.echo(
        f"{folder}: {summary.done} of {summary.total} crops, {summary.crop_bytes / 1e3:.1f} kB each as {dtype}; "
        f"{summary.records} records written in {summary.seconds:.0f} s{rate}"
    )
    for name, error in summary.errors.items():
        typer.echo(f"  {name}: error {error['relative']:.2%} of the features' spread, at most {error['worst']:.2%}")
    if summary.filtered:
        typer.echo(f"{summary.filtered} images were excluded by their source's filters", err=True)
    if summary.unreadable:
        typer.echo(f"skipped {len(summary.unreadable)} unreadable images:", err=True)
        for name in summary.unreadable[:10]:
            typer.echo(f"  {name}", err=True)


def _check(folder: Path) -> None:
    from agglo.cache.identity import TEACHER, read_manifest, read_teacher
    from agglo.cache.reading import read_coding
    from agglo.cache.records import inspect

    manifest = read_manifest(folder)
    records: dict[str, int] = manifest["records"] if manifest["finished"] else {}
    bad, lost = 0, []
    for name in sorted({path.parent.name for path in folder.glob(f"*/{TEACHER}")} | set(records)):
        if description := read_teacher(folder, name):
            read_coding(folder / name, description)
        intact, damages = inspect(folder / name)
        typer.echo(f"{name}: {intact} intact records" + (f" of {records[name]}" if name in records else ""))
        if intact < records.get(name, 0):
            lost.append(f"{records[name] - intact} of the {records[name]} records of {name}")
        for damage in damages:
            bad += 1
            typer.echo(f"  {damage.file} is damaged at byte {damage.offset}; {damage.intact} of its records are intact")
    if bad:
        raise ConfigError(
            f"{bad} damaged file{'s' if bad > 1 else ''} in {folder}: delete them and rerun the same `agglo cache`; "
            "only their records are recomputed"
        )
    if lost:
        raise ConfigError(
            f"{folder} lost {', '.join(lost)}: run the same `agglo cache` again; only missing records are computed"
        )
    if not manifest["finished"]:
        typer.echo(f"{folder} is intact but unfinished: run the same `agglo cache` again to resume")
        return
    typer.echo(f"{folder} is intact")


def _message(text: str) -> None:
    typer.echo(text, err=True)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar with rate and remaining time; without a terminal, a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from agglo.cli.terminal import console

    terminal = console(stderr=True)
    columns = (TextColumn("caching"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("caching", total=None, pace="")
        pace = Pace()

        def show(done: int, total: int) -> None:
            text = pace.text(done, total)
            bar.update(task, completed=done, total=total, pace=text)
            if not terminal.is_terminal and pace.is_due(done == total):
                _message(f"{done}/{total} crops  {text}")

        yield show


class Pace:
    """Rate and remaining time of this run."""

    def __init__(self) -> None:
        self.began, self.first, self.printed = time.monotonic(), -1, time.monotonic()

    def text(self, done: int, total: int) -> str:
        """``12.3 images/s, 0:04:10 left``; empty before the first crop."""
        if self.first < 0:
            self.first, self.began = done, time.monotonic()
        passed = time.monotonic() - self.began
        if done == self.first or passed <= 0:
            return ""
        rate = (done - self.first) / passed
        left = int((total - done) / rate)
        return f"{rate:.1f} images/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"

    def is_due(self, last: bool) -> bool:
        """Whether to print a line now."""
        if not last and time.monotonic() - self.printed < _INTERVAL:
            return False
        self.printed = time.monotonic()
        return True
