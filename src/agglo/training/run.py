"""``agglo.train``: train a recipe, measure the result and write its report, as the command ``agglo train`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from agglo import dist
from agglo.harness.runs import measure_run
from agglo.model.model import Model
from agglo.objectives.base import objective_kind
from agglo.recipe import Recipe, load
from agglo.report.run_page import write_run
from agglo.training.loop import train_model


def train(
    recipe: Recipe | str,
    folder: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
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
        recipe: a recipe, its name, or the path of a YAML file.
        folder: the run folder; ``runs/<recipe>`` by default.
        overrides: changes ``key.path=value``, for a recipe given by name or path.
        smoke: the recipe's smallest version, likewise: a few steps, to see that it runs.
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
    if not isinstance(recipe, Recipe):
        recipe = load(recipe, overrides, smoke=smoke)
    folder = default_folder(recipe, smoke=smoke) if folder is None else Path(folder)
    model = train_model(recipe, folder, resume=resume, overwrite=overwrite, device=device, quiet=quiet)
    if dist.launch_rank()[0] == 0 and objective_kind(recipe).trains_student:
        if evals and recipe.evals:
            measure_run(folder, device=device, progress=progress)
        if report:
            write_run(folder, progress)
    return model


def default_folder(recipe: Recipe, *, smoke: bool) -> Path:
    """The run folder of a recipe if none is given."""
    return Path("runs") / (recipe.name + ("-smoke" if smoke else ""))
