"""The training loop, read from top to bottom: teachers speak, the student answers, the average follows."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agglo import dist
from agglo.cache.lessons import Lessons, find_teachers, loader_for
from agglo.data.loader import Batch, Loader
from agglo.data.shifts import RenderedBatch
from agglo.files import versions
from agglo.model.artefact import CONFIG
from agglo.model.creation import create, snap_sizes
from agglo.model.model import Model
from agglo.nn.damp import Damp, enable_damp
from agglo.nn.placement import Placement
from agglo.nn.spectral import enable_spectral, materialize
from agglo.objectives.distill import Distill, Seen
from agglo.objectives.wrapping import begin_step
from agglo.recipe import Recipe
from agglo.teachers.base import Teacher
from agglo.training import checkpoint
from agglo.training.checks import can_be_spectral, check_sizes, check_windows
from agglo.training.ema import Ema
from agglo.training.folder import begin_folder, check_folder, resume_command
from agglo.training.ledger import Known, Ledger, halved
from agglo.training.optim import build_optimizer, deferred, set_learning_rate
from agglo.training.parallel import check_batches, everyones, one_voice
from agglo.training.progress import Progress
from agglo.training.rendering import canvases, margin
from agglo.training.stages import adopt, stage_folder, translate
from agglo.training.step import Stopwatch, one_step
from agglo.training.stopping import interruptible
from agglo.training.upsampling import assemble
from agglo.types import AggloError, ConfigError

PREPASS_OFFSET = 1 << 40
"""Steps of the pre-pass are numbered from here, so that they draw other views than training does."""


class DivergenceError(AggloError, RuntimeError):
    """The loss is not a number; the run folder still holds the last good checkpoint."""


@dataclass(slots=True)
class Run:
    """Everything a training run holds in memory."""

    recipe: Recipe
    folder: Path
    device: torch.device
    teachers: dict[str, Teacher]
    model: Model
    ema: Ema
    objective: Distill
    optimizer: torch.optim.Optimizer
    loader: Loader
    damp: Damp | None = None
    adopted: tuple[str, ...] = ()
    start: int = 0
    told: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lessons: Lessons | None = None

    def teach(
        self, batch: Batch, canvas: RenderedBatch, shifts: Sequence[Tensor] | None = None, view: Placement | None = None
    ) -> dict[str, Seen]:
        """What the teachers say of a batch: each of a view of its own, or all of the whole canvas of a fixed crop.

        Args:
            batch: the step's.
            canvas: its images, on the device.
            shifts: of the teachers' views; None: all look at the middle.
            view: where the student looks; None: at all of the canvas.
        """
        if self.lessons is not None:
            return self.lessons.teach(batch, canvas.images, view)
        chosen = self.teaching(batch.partition)
        begin_step(chosen.values(), self.recipe.train.seed, batch.step)
        mine = None if shifts is None else [s for name, s in zip(self.teachers, shifts, strict=True) if name in chosen]
        return self.objective.teach(chosen, canvas, batch.size, self.model.spec.stride, mine)

    def teaching(self, partition: int) -> dict[str, Teacher]:
        """The teachers of a partition."""
        names = self.recipe.partitions[partition].teachers or self.teachers
        return {name: teacher for name, teacher in self.teachers.items() if name in names}

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules a checkpoint holds."""
        return {"model": self.model, "objective": self.objective} | ({"ema": self.ema.model} if self.ema.decay else {})


def distill(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> Model:
    """Train a student as the recipe says.

    The run folder gets ``recipe.yaml`` (resolved), ``versions.json``, ``metrics.jsonl``, ``tensorboard/``,
    ``checkpoints/``, ``initial/`` (the model before its first step) and ``model/`` (the averaged weights with the
    normalizers folded in: the artefact). Ctrl-C finishes the step, saves, and raises ``KeyboardInterrupt``.

    Several processes that torchrun started share each batch and train one model; the first of them writes. A signal to
    any of them stops all after the same step.

    Args:
        recipe: what to do.
        folder: the run folder.
        resume: go on from the newest checkpoint in it.
        overwrite: throw away what it holds.
        device: ``"cpu"``, ``"cuda"``, ...; the best there is when None. Of several processes, ``"cuda"`` gives each
            the GPU of its local rank.
        quiet: no progress on the terminal.

    Returns:
        The trained model, in eval mode.

    Raises:
        ConfigError: the folder is in use and neither flag is given; a size the student cannot take.
        DivergenceError: the loss became NaN or infinite.
        OtherRankError: another process of the run met one of these and raised it.
    """
    folder = Path(folder)
    with dist.process_group(device) as device, one_voice():
        if recipe.stages:
            return distill_stages(recipe, folder, resume=resume, overwrite=overwrite, device=device, quiet=quiet)
        return distill_one(recipe, folder, resume=resume, overwrite=overwrite, device=device, quiet=quiet)


def distill_one(
    recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool, device: str | None, quiet: bool
) -> Model:
    """A recipe without stages."""
    dist.run_on_main(lambda: check_folder(folder, recipe, resume=resume, overwrite=overwrite))
    run = dist.run_on_all(lambda: prepare(recipe, folder, torch.device(device or _best_device()), resume=resume))
    # Only now: a recipe that does not fit must not cost a run.
    dist.run_on_main(lambda: begin_folder(folder, recipe, overwrite=overwrite))
    with (
        Progress(folder, recipe.train.steps, quiet=quiet, writes=dist.is_main()) as progress,
        interruptible() as interrupted,
    ):
        start(run, progress, interrupted)
        train(run, progress, interrupted)
        model = export(run, progress)
        # During the last save: the model is there, and what would follow was not wanted.
        if dist.any_rank(bool(interrupted)):
            raise KeyboardInterrupt
        return model


def distill_stages(
    recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool, device: str | None, quiet: bool
) -> Model:
    """Stage after stage, each a run of its own below ``stages/`` that starts from the one before.

    The folder gets the whole recipe, and the last stage's model as ``model/``. A resumed run skips the stages that are
    finished and goes on in the one that is not.
    """
    dist.run_on_main(lambda: check_folder(folder, recipe, resume=resume, overwrite=overwrite))
    stages = [recipe.stage(index) for index in range(len(recipe.stages))]  # all of them must fit before one is run
    dist.run_on_all(lambda: [check_batches(stage, dist.world_size()) for stage in stages])
    dist.run_on_main(lambda: begin_folder(folder, recipe, overwrite=overwrite))
    model, before = None, recipe.train.start_from
    for index, stage in enumerate(stages):
        place = stage_folder(folder, index, recipe.stages[index].name)
        finished = dist.run_on_main(lambda place=place: resume and (place / "model" / CONFIG).is_file())
        if finished:
            model = Model.load(place / "model")
        else:
            begun = dist.run_on_main(lambda place=place: resume and place.is_dir())
            train = stage.train.model_copy(update={"start_from": before})
            stage = stage.model_copy(update={"train": train})
            model = distill_one(stage, place, resume=begun, overwrite=False, device=device, quiet=quiet)
        before = str(place / "model")
    if model is None:
        raise ConfigError("stages: there are none")
    last = model
    dist.run_on_main(lambda: last.save(folder / "model"))
    return model


def prepare(recipe: Recipe, folder: Path, device: torch.device, *, resume: bool) -> Run:
    """Build everything, and find out whatever can be wrong before anything is written."""
    torch.manual_seed(recipe.train.seed)
    check_batches(recipe, dist.world_size())
    if recipe.objective.kind == "upsample":
        return Run(recipe, folder, device, **assemble(recipe, device))
    teachers = {name: teacher.to(device) for name, teacher in find_teachers(recipe).items()}
    model = create(recipe, teachers, initialize=not resume or not checkpoint.checkpoints(folder / "checkpoints"))
    fresh = not checkpoint.checkpoints(folder / "checkpoints") if resume else True
    adopted = adopt(model, recipe.train.start_from) if recipe.train.start_from and fresh else ()
    recipe, notes = snap_sizes(recipe, model.step())
    check_sizes(recipe, model, teachers)
    notes += check_windows(recipe, model)
    objective = Distill(recipe, {name: teacher.spec for name, teacher in teachers.items()}, model.student)
    lessons = Lessons(recipe, teachers, model.spec.stride, device) if recipe.data.views.crops else None
    teachers = teachers if lessons is None else lessons.teachers
    pixels = canvases(recipe, model.spec.stride, teachers) if recipe.data.views.canvas == "auto" else None
    loader = loader_for(recipe, margin(recipe, model, teachers), lessons, pixels)
    model.provenance = provenance(recipe, teachers)
    if recipe.train.spectral and can_be_spectral(model.student):
        enable_spectral(model.student)
    model.to(device)
    objective.to(device)
    damp = enable_damp(model.student, recipe.train.damp, seed=recipe.train.seed) if recipe.train.damp else None
    ema, optimizer = Ema(model, recipe.train.ema), build_optimizer(model, recipe.train, objective.parameters())
    run = Run(recipe, folder, device, teachers, model, ema, objective, optimizer, loader, damp, adopted)
    run.lessons, run.notes = lessons, notes
    return run


def start(run: Run, progress: Progress, interrupted: list[int]) -> None:
    """Go on from the newest checkpoint, or fit the statistics and keep the untrained model."""
    for note in run.notes:
        progress.say(note)
    found = dist.gather([path.name for path in checkpoint.checkpoints(run.folder / "checkpoints")])
    if any(each != found[0] for each in found):
        error = ConfigError(f"{run.folder} is not the same folder for all processes: name one that all machines share")
        dist.run_on_main(lambda: _raise(error))
    if found[0]:
        run.start = dist.run_on_all(lambda: checkpoint.restore(run.folder / "checkpoints", run.parts, run.optimizer))
        progress.rewind(run.start)
        progress.say(f"resumed at step {run.start} of {run.recipe.train.steps}")
        return
    dist.broadcast(run.model)
    dist.broadcast(run.objective)
    if run.objective.needs_statistics:
        for note in run.objective.fit(prepass(run, progress, interrupted)):
            progress.say(note)
    translate(run.model, run.objective, run.adopted)
    run.ema.reset(run.model)
    dist.run_on_main(lambda: plain(run, run.model).save(run.folder / "initial"))


def prepass(run: Run, progress: Progress, interrupted: list[int]) -> Iterator[dict[str, Any]]:
    """Teacher features of ``targets.estimate_images`` images, for the normalizers and losses that need statistics."""
    wanted, seen = run.recipe.targets.estimate_images, dict.fromkeys(run.teachers, 0)
    progress.say(f"pre-pass: the teachers look at {wanted} images to fit the normalizers")
    for batch in run.loader.iterate(PREPASS_OFFSET, 2 * PREPASS_OFFSET):
        if dist.any_rank(bool(interrupted)):
            progress.say(
                f"stopped in the pre-pass, before the first step; begin again with: {resume_command(run.folder)}"
            )
            raise KeyboardInterrupt
        canvas = RenderedBatch(batch.images.to(run.device), batch.field)
        told = run.teach(batch, canvas)
        yield told
        for name in told:
            seen[name] += dist.world_size() * len(batch.images)
        least = min(seen.values())
        progress.note(f"pre-pass: {min(least, wanted)} of {wanted} images")
        if least >= wanted:
            return


def train(run: Run, progress: Progress, interrupted: list[int]) -> None:
    """All remaining steps."""
    config, watch, began = run.recipe.train, Stopwatch(run.device), time.monotonic()
    ledger, images_seen, since = Ledger(run.start, half=halved(run.recipe)), 0, time.perf_counter()
    for batch in run.loader.iterate(run.start, config.steps):
        watch.lap("data")
        step = batch.step
        # Every step has its own seed, so that a resumed run draws what the straight one drew.
        torch.manual_seed((config.seed * 1_000_003 + step) % (1 << 63))
        rate = set_learning_rate(run.optimizer, step, config)
        if run.damp is not None:
            run.damp.set_step(step)
        taken = one_step(run, batch, watch)
        ledger.add(taken)
        if deferred(run.optimizer):
            run.ema.update(run.model, step, taken.good)
        elif bool(taken.good):
            run.ema.update(run.model, step)
        watch.lap("ema")
        images_seen += dist.world_size() * len(batch.images)
        done, stops = step + 1, dist.any_rank(bool(interrupted))
        logs = done % config.log_every == 0 or done == config.steps
        saves = stops or done % config.save_every == 0 or done == config.steps
        last = None
        if logs or saves or not deferred(run.optimizer):
            for last in ledger.read():
                judge(run, progress, ledger, last)
        if logs and last is not None and last.why is None:
            now = time.perf_counter()
            speed = images_seen / (now - since)
            images_seen, since = 0, now
            elapsed = time.monotonic() - began
            progress.show(done, dict(last.terms), speed, elapsed / (done - run.start) * (config.steps - done))
            progress.record(done, {
                "terms": dict(last.terms), "lr": rate, "grad_norm": last.norm, "images_per_second": speed,
                "size": max(batch.size), "seconds": watch.take(), "elapsed": elapsed,
                "skipped_images": len(skipped_images(run)), "skipped_steps": ledger.skipped,
            })  # fmt: skip
            watch.lap("log")
        # A step that was left out is no place to begin again, unless the run ends there.
        if saves and (ledger.row == 0 or stops or done == config.steps):
            save(run, done)
            watch.lap("checkpoint")
        if stops:
            progress.say(
                f"stopped at step {done} of {config.steps} and saved; go on with: {resume_command(run.folder)}"
            )
            raise KeyboardInterrupt


def judge(run: Run, progress: Progress, ledger: Ledger, known: Known) -> None:
    """Tell of a step that was left out, or of a teacher that says one thing only; stop when it was too often in a row.

    Raises:
        DivergenceError: more than ``train.patience`` in a row were left out; a checkpoint was saved.
    """
    for name in known.constant:
        teacher, part = name.split("/")
        if name not in run.told:
            run.told.add(name)
            progress.say(
                f"step {known.step}: the {part} features of teacher {teacher!r} are the same everywhere in the batch: "
                "check that its weights are loaded and that the images differ"
            )
            progress.record(known.step + 1, {"constant_target": name, "images": everyones(known.images)})
    if known.why is None:
        return
    progress.record(known.step + 1, {"skipped_step": known.why, "images": everyones(known.images)})
    progress.say(f"step {known.step}: {known.why}; the step is left out (its images are named in metrics.jsonl)")
    if known.row > run.recipe.train.patience:
        run.optimizer.zero_grad(set_to_none=True)
        save(run, ledger.done)
        error = DivergenceError(f"step {known.step}: {known.why}, the {known.row}. step in a row; {known.remedy}")
        dist.run_on_main(lambda: _raise(error))


def save(run: Run, done: int) -> None:
    """A checkpoint after so many steps: the main process writes it, the others wait."""
    dist.run_on_main(lambda: checkpoint.save(run.folder / "checkpoints", done, run.parts, run.optimizer))


def skipped_images(run: Run) -> dict[str, str]:
    """Name to reason of every bad image that any process has met so far; all must ask, and tell what is new."""
    # A copy is made at once; the loader's threads write on while it is looked at.
    new = {name: why for name, why in dict(run.loader.skipped).items() if name not in run.skipped}
    for part in dist.gather(new):
        run.skipped.update(part)
    return run.skipped


def _raise(error: Exception) -> None:
    raise error


def export(run: Run, progress: Progress) -> Model:
    """The averaged weights with the normalizers folded in, saved as ``model/``."""
    model = plain(run, run.ema.model)  # type: ignore[arg-type]
    dist.run_on_main(lambda: model.save(run.folder / "model"))
    for name, why in skipped_images(run).items():
        progress.say(f"skipped {name}: {why}")
    progress.say(f"saved {run.folder / 'model'}")
    return model


def plain(run: Run, model: Model) -> Model:
    """A copy for use: no noise, no reparametrisation, heads that answer in the teachers' own spaces, in eval mode."""
    model = copy.deepcopy(model).eval()
    if run.recipe.train.spectral:
        materialize(model.student)
    return run.objective.fold(model)


def provenance(recipe: Recipe, teachers: dict[str, Teacher]) -> dict[str, Any]:
    """What the artefact says of its own training."""
    return {
        "recipe": recipe.name,
        "teachers": {name: f"{recipe.teachers[name].teacher['kind']} ({t.licence})" for name, t in teachers.items()},
        "steps": recipe.train.steps,
        "agglo": versions()["agglo"],
    }


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
