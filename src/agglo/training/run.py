"""``agglo.train``: train a recipe, measure the result and write its report, as the command ``agglo train`` does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from agglo import dist
from agglo.harness.runs import measure_run
from agglo.model.model import Model
from agglo.objectives.base import objective_kind
from agglo.recipe import Recipe, changed, load, run_of
from agglo.report.run_page import write_run
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
    """Train a recipe, run its evals and write a report.

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
        progress: called with short phrases while measuring.

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
        if dist.launch_rank()[0] == 0 and objective_kind(recipe).trains_student:
            if evals and recipe.evals:
                measure_run(folder, device=device, progress=progress)
            if report:
                write_run(folder, progress)
    return model


def default_folder(recipe: Recipe, *, smoke: bool, source: str | Path | None = None) -> Path:
    """The run folder of a recipe if none is given; a run folder that was named as the recipe is itself."""
    if source is not None and (run := run_of(source)) is not None:
        return run
    return Path("runs") / (recipe.name + ("-smoke" if smoke else ""))
