"""``agglo.train``: train a recipe, measure the result and write its report, as the command ``agglo train`` does."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from agglo import dist
from agglo.harness import runs
from agglo.harness.measuring import Measured
from agglo.harness.running import Outcome
from agglo.model.model import Model
from agglo.objectives.base import objective_kind
from agglo.recipe import Recipe, changed, load, run_of
from agglo.report import run_page
from agglo.training.loop import train_model


def train(
    recipe: Recipe | str | Path,
    folder: str | Path | None = None,
    *,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    smoke: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    evals: bool = True,
    report: bool = True,
    quiet: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Model:
    """Train a recipe, run its evals and write a report. Evals that fail are listed in a warning and on the report.

    The run folder gets ``recipe.yaml``, ``versions.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``,
    ``initial/`` (the untrained model), ``model/`` (the averaged weights, with the normalizers folded in), ``evals/``
    and ``report.html``. A first Ctrl-C finishes the step, saves a checkpoint and raises ``KeyboardInterrupt``.

    Under torchrun the processes share each batch and train one model; the main process writes and measures. A signal
    to any of them stops all after the same step.

    Args:
        recipe: a recipe, its name, the path of a YAML file, or a run folder.
        folder: the run folder; by default ``runs/<recipe>``, or the run folder named as the recipe.
        overrides: changes: ``["train.steps=10"]``, or ``{"train.steps": 10, "data.views": {...}}``.
        smoke: the recipe's smallest version: a few steps, to see that it runs.
        resume: continue from the newest checkpoint in the folder.
        overwrite: delete an earlier run in the folder.
        device: ``"cpu"``, ``"cuda"``, ...; None for CUDA if available. Under torchrun, ``"cuda"`` is the GPU of the
            local rank.
        evals: run the recipe's evals after training.
        report: write ``report.html`` after training.
        quiet: print no progress.
        progress: called with progress messages while measuring.

    Returns:
        The trained model in eval mode; what the objective trains, if that is not a student.

    Raises:
        ConfigError: an invalid recipe, or a folder in use without ``resume`` or ``overwrite``.
        DivergenceError: the loss became NaN or infinite.
        OtherRankError: another process of the run raised one of these.
    """
    given = recipe
    recipe = (changed if isinstance(given, Recipe) else load)(given, overrides, smoke=smoke)  # type: ignore[arg-type]
    source = None if isinstance(given, Recipe) else given
    folder = default_folder(recipe, smoke=smoke, source=source) if folder is None else Path(folder)
    with contextlib.ExitStack() as held:  # of the folder's lock, until everything is written
        model = train_model(recipe, folder, resume=resume, overwrite=overwrite, device=device, quiet=quiet, held=held)
        found = finish(
            recipe, folder, device=device, evals=evals, report=report, phase=lambda title: nullcontext(progress)
        )
    failed = [f"{model}: {name}: {why}" for model, each in runs.failures(found).items() for name, why in each.items()]
    if failed:
        lines = "\n  ".join(failed)
        warnings.warn(f"evals failed; the model is saved in {folder / 'model'}:\n  {lines}", stacklevel=2)
    return model


def finish(
    recipe: Recipe,
    folder: Path,
    *,
    device: str | None,
    evals: bool,
    report: bool,
    phase: Callable[[str], AbstractContextManager[Callable[[str], None] | None]],
    done: Callable[[str, Outcome], None] | None = None,
    measured: Callable[[dict[str, Measured]], None] | None = None,
    reported: Callable[[Path], None] | None = None,
) -> dict[str, Measured]:
    """After training, run the recipe's evals and write the report, on the main process.

    Args:
        recipe, folder, device, evals, report: as for :func:`train`.
        phase: opens a phase of this title; gives what is called with short phrases while it lasts.
        done: called with the model's name and the outcome after each eval.
        measured: called with what this function returns, before the report is written.
        reported: called with the path of the report.

    Returns:
        What was measured, by model; empty on other processes and for an objective that trains no student.
    """
    found: dict[str, Measured] = {}
    if dist.launch_rank()[0] != 0 or not objective_kind(recipe).trains_student:
        return found
    if evals and recipe.evals:
        with phase("evals") as progress:
            found = runs.measure_run(folder, device=device, progress=progress, done=done)
        if measured is not None:
            measured(found)
    if report:
        with phase("report") as progress:
            page = run_page.write_run(folder, progress)
        if reported is not None:
            reported(page)
    return found


def default_folder(recipe: Recipe, *, smoke: bool, source: str | Path | None = None) -> Path:
    """The run folder of a recipe if none is given; a run folder that was named as the recipe is itself."""
    if source is not None and (run := run_of(source)) is not None:
        return run
    return Path("runs") / (recipe.name + ("-smoke" if smoke else ""))
