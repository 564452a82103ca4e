"""The command that writes and checks feature caches."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from agglo.types import ConfigError, StorageError

if TYPE_CHECKING:
    from agglo.cache.writing import Written
    from agglo.recipe import Recipe

_EVERY = 10.0
"""Seconds between two lines where there is no terminal to draw a bar on."""


def cache(
    recipe: str | None = typer.Argument(None, metavar="RECIPE", help="A recipe's name, or a YAML file."),
    overrides: list[str] | None = typer.Argument(
        None, metavar="[key.path=value]...", help="Changes, e.g. data.views.crops=2; give them to training too."
    ),
    out: Path | None = typer.Option(None, "--out", "-o", help="The cache's folder; features/<recipe> by default."),
    dtype: str = typer.Option("fp16", help="fp32 (exact), fp16, bf16 or int8; the error of each is measured and said."),
    batch: int = typer.Option(32, help="Images that a teacher sees at a time."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1, mps; cuda, else cpu, by default."),
    smoke: bool = typer.Option(False, "--smoke", help="The recipe's pocket size."),
    check: Path | None = typer.Option(None, "--check", metavar="DIR", help="Read a whole cache and verify it."),
) -> None:
    """Write what a recipe's teachers say once, so that training reads it; may be stopped and gone on with."""
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
    again = shlex.join(
        ["agglo", "cache", recipe, *(overrides or []), "--out", str(folder), "--dtype", dtype]
        + (["--smoke"] if smoke else [])
    )
    written = _write(loaded, folder, dtype, batch, device, again)
    _tell(folder, written, dtype)
    training = shlex.join(["agglo", "train", recipe, *(overrides or []), f"data.feature_cache={folder}"])
    typer.echo(f"\nNext:\n  {training}{' --smoke' if smoke else ''}")


def _write(recipe: Recipe, folder: Path, dtype: str, batch: int, device: str | None, again: str) -> Written:
    import torch

    from agglo.cache.writing import write

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device {where} cannot be used here ({first}): try --device cpu") from None
    try:
        with _bar() as show:
            return write(recipe, folder, dtype=dtype, batch=batch, device=where, progress=show, say=_say)
    except KeyboardInterrupt:
        _say(f"stopped; what is written is whole. Go on with: {again}")
        raise
    except StorageError as error:
        raise StorageError(f"{error}: {again}") from None


def _tell(folder: Path, written: Written, dtype: str) -> None:
    if written.recovered:
        typer.echo(f"cut off {written.recovered} bytes that an earlier run left half-written")
    rate = f", {written.bytes / 1e6 / max(written.seconds, 1e-9):.1f} MB/s" if written.records else ""
    typer.echo(
        f"{folder}: {written.done} of {written.total} canvases, {written.bytes_an_image / 1e3:.1f} kB each as {dtype}; "
        f"{written.records} records written in {written.seconds:.0f} s{rate}"
    )
    for name, error in written.errors.items():
        typer.echo(f"  {name}: error {error['relative']:.2%} of the features' spread, {error['worst']:.2%} at worst")
    if written.left_out:
        typer.echo(f"{written.left_out} images were left out by their source's filters", err=True)
    if written.unreadable:
        typer.echo(f"skipped {len(written.unreadable)} images that cannot be read:", err=True)
        for name in written.unreadable[:10]:
            typer.echo(f"  {name}", err=True)


def _check(folder: Path) -> None:
    from agglo.cache.identity import TEACHER, read_manifest, read_teacher
    from agglo.cache.reading import read_coding
    from agglo.cache.records import inspect

    manifest = read_manifest(folder)
    records: dict[str, int] = manifest["records"] if manifest["finished"] else {}
    bad, lost = 0, []
    for name in sorted({path.parent.name for path in folder.glob(f"*/{TEACHER}")} | set(records)):
        if known := read_teacher(folder, name):
            read_coding(folder / name, known)
        whole, damages = inspect(folder / name)
        typer.echo(f"{name}: {whole} records are whole" + (f", of {records[name]}" if name in records else ""))
        if whole < records.get(name, 0):
            lost.append(f"{records[name] - whole} of the {records[name]} records of {name}")
        for damage in damages:
            bad += 1
            typer.echo(f"  {damage.file} is damaged at byte {damage.offset}; {damage.whole} records are whole in it")
    if bad:
        raise ConfigError(
            f"{bad} damaged file{'s' if bad > 1 else ''} in {folder}: delete them and run the same `agglo cache` "
            "again; only what was in them is computed anew"
        )
    if lost:
        raise ConfigError(
            f"{folder} has lost {', '.join(lost)}: run the same `agglo cache` again; only what is missing is computed"
        )
    if not manifest["finished"]:
        typer.echo(f"{folder} is sound as far as it goes, and unfinished: run the same `agglo cache` again to go on")
        return
    typer.echo(f"{folder} is sound")


def _say(message: str) -> None:
    typer.echo(message, err=True)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left; where there is no terminal, a line now and then."""
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
            if not terminal.is_terminal and pace.due(done == total):
                _say(f"{done}/{total} canvases  {text}")

        yield show


class Pace:
    """Rate and time left, over what this run did."""

    def __init__(self) -> None:
        self.began, self.first, self.said = time.monotonic(), -1, time.monotonic()

    def text(self, done: int, total: int) -> str:
        """``12.3 images/s, 0:04:10 left``; empty before anything was done."""
        if self.first < 0:
            self.first, self.began = done, time.monotonic()
        passed = time.monotonic() - self.began
        if done == self.first or passed <= 0:
            return ""
        rate = (done - self.first) / passed
        left = int((total - done) / rate)
        return f"{rate:.1f} images/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"

    def due(self, last: bool) -> bool:
        """Whether it is time for a line."""
        if not last and time.monotonic() - self.said < _EVERY:
            return False
        self.said = time.monotonic()
        return True
