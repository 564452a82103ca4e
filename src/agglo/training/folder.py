"""The run folder: check whether it may be used, write its first files, remove an earlier run (``--overwrite``)."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agglo import dist
from agglo.files import LOCK, exclusive, versions, write_json, write_text
from agglo.recipe import Recipe, load
from agglo.types import ConfigError

RUN_FILES = (
    "report.html", "evals", "model", "initial", "stages", "checkpoints", "tensorboard", "metrics.jsonl",
    "versions.json", "recipe.yaml",
)  # fmt: skip
"""What --overwrite removes, the files that mark a run folder last; other files are kept."""


@contextlib.contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Lock a run folder for one run; several processes of torchrun are one run, and the main one holds the lock.

    Raises:
        ConfigError: another run is writing to it.
    """
    own = not folder.exists() or (folder.is_dir() and (not _content(folder) or (folder / "recipe.yaml").is_file()))
    if not own:  # `check_folder` refuses it
        yield
        return
    with exclusive(folder, "wait for that run or stop it, or name another run folder with --out"):
        yield


def _content(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != LOCK]


def check_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may use the folder; changes nothing.

    Raises:
        ConfigError: it exists and neither flag is given; it is not a run folder, or has another recipe.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name another run folder")
    used = folder.is_dir() and bool(_content(folder))
    if resume and not used:
        raise ConfigError(f"{folder} has no run to resume: remove --resume to start one")
    if not used:
        return
    if not (resume or overwrite):
        raise ConfigError(f"{folder} exists: continue the run with --resume, or delete it with --overwrite")
    begun = folder / "recipe.yaml"
    if not begun.is_file() or not (folder / "versions.json").is_file():
        raise ConfigError(f"{folder} is not a run folder (no recipe.yaml or versions.json): name another")
    if resume and (changed := differences(load(str(begun)), recipe)):
        raise ConfigError(
            f"{folder} was started with another recipe ({', '.join(changed)}): resume it with "
            f"`{resume_command(folder)}`, or delete it with --overwrite"
        )


def differences(one: Recipe, two: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [found for key in {**a, **b} for found in walk(a.get(key), b.get(key), f"{path}.{key}")]
        return [] if a == b else [path.removeprefix(".")]

    return walk(one.to_dict(), two.to_dict(), "")


def resume_command(folder: Path) -> str:
    """The command that resumes a run with the same number of processes."""
    start = ""
    if dist.launch_rank()[1] > 1:
        here, all_ = os.environ.get("LOCAL_WORLD_SIZE"), os.environ["WORLD_SIZE"]
        start = f"torchrun {f'--nproc_per_node {all_}' if here == all_ else '...'} -m "
    return f"{start}agglo train {shlex.quote(str(folder / 'recipe.yaml'))} --out {shlex.quote(str(folder))} --resume"


def begin_folder(folder: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Write the first files of a run folder; with ``overwrite``, first remove :data:`RUN_FILES`."""
    for name in RUN_FILES if overwrite else ():
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_json(folder / "versions.json", versions())
