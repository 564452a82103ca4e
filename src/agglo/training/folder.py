"""The run folder: whose it is, what it begins with, and what may be thrown away."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from agglo import dist
from agglo.files import versions
from agglo.recipe import Recipe, load
from agglo.types import ConfigError

LEFT_BY_A_RUN = (
    "report.html", "evals", "model", "initial", "checkpoints", "tensorboard", "metrics.jsonl", "versions.json",
    "recipe.yaml",
)  # fmt: skip
"""What --overwrite removes, what marks a run folder last; whatever else lies in the folder is somebody's."""


def check_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """See that the run folder may become ours, and touch nothing.

    Raises:
        ConfigError: it exists and neither flag says what to do; it is no run folder, or was begun with another recipe.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name another run folder")
    used = folder.is_dir() and any(folder.iterdir())
    if resume and not used:
        raise ConfigError(f"{folder} holds no run to resume: leave --resume out to start one")
    if not used:
        return
    if not (resume or overwrite):
        raise ConfigError(f"{folder} exists: continue that run with --resume, or throw it away with --overwrite")
    begun = folder / "recipe.yaml"
    if not begun.is_file() or not (folder / "versions.json").is_file():
        raise ConfigError(f"{folder} does not look like a run folder (recipe.yaml, versions.json): name another")
    if resume and (changed := differences(load(str(begun)), recipe)):
        raise ConfigError(
            f"{folder} was begun with another recipe ({', '.join(changed)}): go on with "
            f"`{resume_command(folder)}`, or throw it away with --overwrite"
        )


def differences(one: Recipe, two: Recipe) -> list[str]:
    """Dotted keys at which two recipes differ."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [found for key in {**a, **b} for found in walk(a.get(key), b.get(key), f"{path}.{key}")]
        return [] if a == b else [path.removeprefix(".")]

    return walk(one.flat(), two.flat(), "")


def resume_command(folder: Path) -> str:
    """What to type to go on with a run, with as many processes as there are now."""
    start = ""
    if dist.launch_rank()[1] > 1:
        here, all_ = os.environ.get("LOCAL_WORLD_SIZE"), os.environ["WORLD_SIZE"]
        start = f"torchrun {f'--nproc_per_node {all_}' if here == all_ else '...'} -m "
    return f"{start}agglo train {shlex.quote(str(folder / 'recipe.yaml'))} --out {shlex.quote(str(folder))} --resume"


def begin_folder(folder: Path, recipe: Recipe, *, overwrite: bool) -> None:
    """Write what a run folder begins with; with ``overwrite``, first remove what a run leaves, and nothing else."""
    for name in LEFT_BY_A_RUN if overwrite else ():
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
