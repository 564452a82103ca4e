"""Training loop: targets, forward and backward, EMA."""

from __future__ import annotations

import contextlib
import copy
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agglo import dist
from agglo.config import build
from agglo.data.shifts import RenderedBatch
from agglo.files import versions
from agglo.model.artefact import CONFIG
from agglo.model.creation import snap_sizes
from agglo.model.model import Model
from agglo.nn.damp import enable_damp
from agglo.nn.folding import fuse_fixed_norms
from agglo.nn.spectral import enable_spectral, materialize
from agglo.objectives.base import Targets, objective_kind, partition_teachers, refuse_unused_keys
from agglo.recipe import Recipe
from agglo.students.base import Student
from agglo.teachers.base import Teacher
from agglo.training import checkpoint
from agglo.training.checks import can_be_spectral, check_sizes, check_windows
from agglo.training.ema import Ema
from agglo.training.folder import begin_folder, check_folder, locked_run, resume_command
from agglo.training.metrics import MetricsBuffer, StepMetrics, half_precision_teachers
from agglo.training.optim import build_optimizer, is_deferred, set_learning_rate
from agglo.training.parallel import check_batches, gather_names, warnings_on_main
from agglo.training.progress import Progress
from agglo.training.stages import adopt, stage_folder
from agglo.training.step import Run, Stopwatch, one_step
from agglo.training.targets import TargetSource, build_loader, load_teachers
from agglo.types import AggloError, ConfigError

PREPASS_OFFSET = 1 << 40
"""First step number of the pre-pass, so that it draws other views than training."""


class DivergenceError(AggloError, RuntimeError):
    """The loss is not finite; the run folder has the last good checkpoint."""


def train_model(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    quiet: bool = False,
    held: contextlib.ExitStack | None = None,
) -> Model:
    """Train a recipe, without measuring it; see :func:`agglo.train` for arguments and errors.

    The folder is locked for the time of the call, or with ``held`` until that stack is closed.

    The run folder gets ``recipe.yaml``, ``versions.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``,
    ``initial/`` (the untrained model) and ``model/`` (the averaged weights, with the normalizers folded in).
    """
    folder = Path(folder)
    with dist.process_group(device) as device, warnings_on_main(), contextlib.ExitStack() as own:
        dist.run_on_main(lambda: (own if held is None else held).enter_context(locked_run(folder)))
        train_any = _train_stages if recipe.stages else _train_one
        return train_any(recipe, folder, resume=resume, overwrite=overwrite, device=device, quiet=quiet)


def _train_one(
    recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool, device: str | None, quiet: bool
) -> Model:
    dist.run_on_main(lambda: check_folder(folder, recipe, resume=resume, overwrite=overwrite))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = dist.run_on_all(lambda: prepare(recipe, folder, torch.device(device), resume=resume))
    # Only now, so that an invalid recipe leaves an earlier run intact.
    dist.run_on_main(lambda: begin_folder(folder, recipe, overwrite=overwrite))
    with (
        Progress(folder, recipe.train.steps, quiet=quiet, writes=dist.is_main()) as progress,
        interruptible() as interrupted,
    ):
        start(run, progress, interrupted)
        train_steps(run, progress, interrupted)
        model = export(run, progress)
        # Interrupted while saving: the model is complete, but what would follow must not run.
        if dist.any_rank(bool(interrupted)):
            raise KeyboardInterrupt
        return model


def _train_stages(
    recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool, device: str | None, quiet: bool
) -> Model:
    """Train stage after stage below ``stages/``, each from the model before; the last one's is ``model/``.

    A resumed run skips finished stages and resumes the unfinished one.
    """
    dist.run_on_main(lambda: check_folder(folder, recipe, resume=resume, overwrite=overwrite))
    stages = [recipe.stage(index) for index in range(len(recipe.stages))]  # check all before the first one runs
    dist.run_on_all(lambda: [check_batches(stage, dist.world_size()) for stage in stages])
    dist.run_on_main(lambda: begin_folder(folder, recipe, overwrite=overwrite))
    model, previous = None, recipe.train.start_from
    for index, stage in enumerate(stages):
        place = stage_folder(folder, index, recipe.stages[index].name)
        finished = dist.run_on_main(lambda place=place: resume and (place / "model" / CONFIG).is_file())
        if finished:
            model = Model.load(place / "model")
        else:
            begun = dist.run_on_main(lambda place=place: resume and place.is_dir())
            config = stage.train.model_copy(update={"start_from": previous})
            stage = stage.model_copy(update={"train": config})
            model = _train_one(stage, place, resume=begun, overwrite=False, device=device, quiet=quiet)
        previous = str(place / "model")
    if model is None:
        raise ConfigError("stages: the list is empty")
    last = model
    dist.run_on_main(lambda: last.save(folder / "model"))
    return model


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Defer SIGINT and SIGTERM to the end of the step; a second signal interrupts at once.

    Yields:
        The signals received so far.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- before the first step --------------------------------------------------------------------------------------------


def prepare(recipe: Recipe, folder: Path, device: torch.device, *, resume: bool) -> Run:
    """Build everything and check the recipe; writes nothing.

    Raises:
        ConfigError: the recipe does not fit its objective, student or teachers.
    """
    torch.manual_seed(recipe.train.seed)
    check_batches(recipe, dist.world_size())
    kind = objective_kind(recipe)
    refuse_unused_keys(recipe, kind.unused)
    if recipe.data.feature_cache is not None and not kind.cacheable:
        raise ConfigError(
            f"data.feature_cache: a feature cache does not store the targets of objective {recipe.objective['kind']}: "
            "remove the key"
        )
    fresh = not (resume and checkpoint.checkpoints(folder / "checkpoints"))
    teachers = {name: teacher.to(device) for name, teacher in load_teachers(recipe).items()}
    built, teachers = kind.build_model(recipe, teachers, initialize=fresh)
    model: Any = built
    adopted: tuple[str, ...] = ()
    notes: list[str] = []
    if kind.trains_student:
        adopted = adopt(model, recipe.train.start_from) if recipe.train.start_from and fresh else ()
        recipe, notes = snap_sizes(recipe, model.step())
        check_sizes(recipe, model.spec.stride, teachers)
        notes += check_windows(recipe, model)
        model.provenance = provenance(recipe, teachers)
    objective = build("objectives", recipe.objective, recipe, model, teachers, where="objective")
    targets = TargetSource(recipe, teachers, model.spec.stride, device, objective.compute)
    loader = build_loader(recipe, targets)
    if recipe.train.spectral and can_be_spectral(model.student):
        enable_spectral(model.student)
    model.to(device)
    objective.to(device)
    damp = enable_damp(model.student, recipe.train.damp, seed=recipe.train.seed) if recipe.train.damp else None
    if recipe.train.freeze_norm_statistics and recipe.train.precision == "fp32":
        _fuse_norms(model.student, device)
    ema, optimizer = Ema(model, recipe.train.ema), build_optimizer(model, recipe.train, objective)
    return Run(
        recipe, folder, device, targets.teachers, model, ema, objective, optimizer, loader, targets, damp, adopted,
        notes=notes,
    )  # fmt: skip


def _fuse_norms(student: Student, device: torch.device) -> None:
    """Fuse norms of fixed statistics; in half precision the folded weights would be rounded."""
    images = torch.randn(2, 3, *(2 * student.spec.step,) * 2, generator=torch.Generator().manual_seed(0)).to(device)

    def run() -> dict[str, Tensor]:
        found = student(images)
        return {name: part for name in ("summary", "spatial") if (part := getattr(found, name)) is not None}

    student.eval()
    fuse_fixed_norms(student, run)
    student.train()


def start(run: Run, progress: Progress, interrupted: list[int]) -> None:
    """Load the newest checkpoint; without one, fit the statistics and save the untrained model."""
    for note in run.notes:
        progress.message(note)
    found = dist.gather([path.name for path in checkpoint.checkpoints(run.folder / "checkpoints")])
    if any(each != found[0] for each in found):
        error = ConfigError(f"{run.folder} differs between processes: name a folder that all machines share")
        dist.run_on_main(lambda: _raise(error))
    if found[0]:
        run.start = dist.run_on_all(lambda: checkpoint.restore(run.folder / "checkpoints", run.parts, run.optimizer))
        progress.rewind(run.start)
        progress.message(f"resumed at step {run.start} of {run.recipe.train.steps}")
        return
    dist.broadcast(run.model)
    dist.broadcast(run.objective)
    if run.objective.needs_statistics:
        for note in run.objective.fit(prepass(run, progress, interrupted)):
            progress.message(note)
    run.objective.unfold(run.model, run.adopted)
    run.ema.reset(run.model)
    dist.run_on_main(lambda: exportable(run, run.model).save(run.folder / "initial"))


def prepass(run: Run, progress: Progress, interrupted: list[int]) -> Iterator[Targets]:
    """Targets of ``targets.estimate_images`` images per teacher, for normalizers and losses that need statistics."""
    wanted = run.recipe.targets.estimate_images
    counts: dict[str, int] = {}
    progress.message(f"pre-pass: fitting the statistics of the targets on {wanted} images")
    for batch in run.loader.iterate(PREPASS_OFFSET, 2 * PREPASS_OFFSET):
        if dist.any_rank(bool(interrupted)):
            command = resume_command(run.folder)
            progress.message(f"stopped in the pre-pass, before the first step; resume with: {command}")
            raise KeyboardInterrupt
        yield run.targets(batch, RenderedBatch(batch.images.to(run.device), batch.field))
        chosen = partition_teachers(run.recipe, run.teachers, batch.partition)
        for name in run.teachers:
            counts[name] = counts.get(name, 0) + (name in chosen) * dist.world_size() * len(batch.images)
        least = min(counts.values())
        progress.status(f"pre-pass: {min(least, wanted)} of {wanted} images")
        if least >= wanted:
            return


# --- steps ------------------------------------------------------------------------------------------------------------


def train_steps(run: Run, progress: Progress, interrupted: list[int]) -> None:
    """Run the remaining steps."""
    config, watch, began = run.recipe.train, Stopwatch(run.device), time.monotonic()
    buffer = MetricsBuffer(run.start, half=half_precision_teachers(run.recipe))
    images_seen, since = 0, time.perf_counter()
    for batch in run.loader.iterate(run.start, config.steps):
        watch.lap("data")
        step = batch.step
        # Each step has its own seed, so that a resumed run draws the same numbers.
        torch.manual_seed((config.seed * 1_000_003 + step) % (1 << 63))
        rate = set_learning_rate(run.optimizer, step, config)
        if run.damp is not None:
            run.damp.set_step(step)
        taken = one_step(run, batch, watch)
        buffer.add(taken)
        if is_deferred(run.optimizer):
            run.ema.update(run.model, step, taken.good)
        elif bool(taken.good):
            run.ema.update(run.model, step)
        watch.lap("ema")
        images_seen += dist.world_size() * len(batch.images)
        done, stops = step + 1, dist.any_rank(bool(interrupted))
        logs = done % config.log_every == 0 or done == config.steps
        saves = stops or done % config.save_every == 0 or done == config.steps
        last = None
        if logs or saves or not is_deferred(run.optimizer):
            for last in buffer.fetch():
                check_step(run, progress, buffer, last)
        if logs and last is not None and last.problem is None:
            now = time.perf_counter()
            speed = images_seen / (now - since)
            images_seen, since = 0, now
            elapsed = time.monotonic() - began
            progress.show(done, dict(last.terms), speed, elapsed / (done - run.start) * (config.steps - done))
            progress.record(done, {
                "terms": dict(last.terms), "lr": rate, "grad_norm": last.norm, "images_per_second": speed,
                "size": max(batch.size), "seconds": watch.take(), "elapsed": elapsed,
                "skipped_images": len(skipped_images(run)), "skipped_steps": buffer.skipped,
            })  # fmt: skip
            watch.lap("log")
        # No checkpoint after a skipped step, unless the run ends here.
        if saves and (buffer.consecutive_skips == 0 or stops or done == config.steps):
            save(run, done)
            watch.lap("checkpoint")
        if stops:
            progress.message(
                f"stopped at step {done} of {config.steps} and saved; resume with: {resume_command(run.folder)}"
            )
            raise KeyboardInterrupt


def check_step(run: Run, progress: Progress, buffer: MetricsBuffer, step: StepMetrics) -> None:
    """Report a skipped step and constant targets; stop after too many consecutive skipped steps.

    Raises:
        DivergenceError: more than ``train.patience`` were skipped; a checkpoint was saved.
    """
    for name in step.constant:
        teacher, part = name.split("/")
        if name not in run.reported:
            run.reported.add(name)
            progress.message(
                f"step {step.step}: the {part} features of teacher {teacher!r} are constant over the batch: check that "
                "its weights are loaded and that the images differ"
            )
            progress.record(step.step + 1, {"constant_target": name, "images": gather_names(step.images)})
    if step.problem is None:
        return
    progress.record(step.step + 1, {"skipped_step": step.problem, "images": gather_names(step.images)})
    progress.message(f"step {step.step}: {step.problem}; skipped (its images are listed in metrics.jsonl)")
    if step.consecutive_skips > run.recipe.train.patience:
        run.optimizer.zero_grad(set_to_none=True)
        save(run, buffer.done)
        error = DivergenceError(
            f"step {step.step}: {step.problem}; consecutive skipped steps: {step.consecutive_skips}. {step.remedy}"
        )
        dist.run_on_main(lambda: _raise(error))


def save(run: Run, done: int) -> None:
    """Save a checkpoint after ``done`` steps, on the main process; the others wait."""
    dist.run_on_main(lambda: checkpoint.save(run.folder / "checkpoints", done, run.parts, run.optimizer))


def skipped_images(run: Run) -> dict[str, str]:
    """Reason by name of every unreadable image of any process; a collective call."""
    # The copy is made at once, as the loader's threads write to the dictionary.
    new = {name: why for name, why in dict(run.loader.skipped).items() if name not in run.skipped}
    for part in dist.gather(new):
        run.skipped.update(part)
    return run.skipped


def _raise(error: Exception) -> None:
    raise error


# --- after the last step ----------------------------------------------------------------------------------------------


def export(run: Run, progress: Progress) -> Any:
    """Save the averaged model as ``model/``, and return it."""
    model = exportable(run, run.ema.model)
    dist.run_on_main(lambda: model.save(run.folder / "model"))
    for name, why in skipped_images(run).items():
        progress.message(f"skipped {name}: {why}")
    progress.message(f"saved {run.folder / 'model'}")
    return model


def exportable(run: Run, model: Any) -> Any:
    """A copy in eval mode, without noise and reparametrisation, and with the objective's :meth:`Objective.fold`."""
    model = copy.deepcopy(model).eval()
    if run.recipe.train.spectral:
        materialize(model.student)
    return run.objective.fold(model)


def provenance(recipe: Recipe, teachers: dict[str, Teacher]) -> dict[str, Any]:
    """The provenance of a saved model: its recipe, teachers and training."""
    return {
        "recipe": recipe.name,
        "teachers": {name: f"{recipe.teachers[name].teacher['kind']} ({t.licence})" for name, t in teachers.items()},
        "steps": recipe.train.steps,
        "agglo": versions()["agglo"],
    }
