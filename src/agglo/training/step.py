"""One training step: views, targets, forward and backward, update."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agglo import dist
from agglo.data.crops import draw_roam
from agglo.data.loader import Batch, Loader
from agglo.data.shifts import RenderedBatch, draw_shifts
from agglo.data.views import generator, mixup
from agglo.model.model import Model
from agglo.nn.damp import Damp
from agglo.objectives.base import Objective, Result, StepContext, Target, spreads
from agglo.recipe import Recipe, Train
from agglo.teachers.base import Teacher
from agglo.training.checks import fits
from agglo.training.ema import Ema
from agglo.training.metrics import DeviceStep, pack
from agglo.training.optim import is_deferred, update
from agglo.training.parallel import average_gradients, average_statistics
from agglo.training.targets import TargetSource

WINDOWS = 5
"""The stream of random numbers that draws ViTDet windows."""


@dataclass(slots=True)
class Run:
    """The state of a training run.

    Args:
        model: the module that learns: a :class:`agglo.Model`, unless the objective trains something else.
        teachers: as in :class:`TargetSource`.
        adopted: teachers whose heads were copied from ``train.start_from``.
        start: first step.
        reported: targets that were reported as constant.
        skipped: reason by name of every unreadable image of any process.
        notes: lines for the user, printed when the run starts.
    """

    recipe: Recipe
    folder: Path
    device: torch.device
    teachers: dict[str, Teacher]
    model: Any
    ema: Ema
    objective: Objective
    optimizer: torch.optim.Optimizer
    loader: Loader
    targets: TargetSource
    damp: Damp | None = None
    adopted: tuple[str, ...] = ()
    start: int = 0
    reported: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules in a checkpoint."""
        return {"model": self.model, "objective": self.objective} | ({"ema": self.ema.model} if self.ema.decay else {})


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in each phase of the loop since the last :meth:`take`.

    On CUDA these are device times: events are recorded in its stream and read by :meth:`take`, without a
    synchronisation per phase.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, float] = field(default_factory=dict)
    _last: Any = None
    _marks: list[tuple[str, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Add the time since the last call to ``phase``."""
        before, self._last = self._last, self._now()
        self._marks.append((phase, before, self._last))

    def take(self) -> dict[str, float]:
        """Return the seconds by phase, and reset them."""
        if self.device.type == "cuda":
            self._last.synchronize()
        for phase, before, after in self._marks:
            span = before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before
            self.seconds[phase] = self.seconds.get(phase, 0.0) + span
        self._marks = []
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(torch.cuda.current_stream(self.device))
        return mark


def one_step(run: Run, batch: Batch, watch: Stopwatch) -> DeviceStep:
    """Forward, backward and update on one batch; a non-finite update is skipped.

    On CUDA nothing here synchronises with the device.
    """
    before = running_statistics(run.model, run.recipe.train)
    result, spread = forward(run, batch, watch)
    # A target without a term, such as a part of weight 0, does not affect the step.
    spread = {name: value for name, value in spread.items() if name in result.terms}
    step = backward(run, batch, result, is_finite(result, spread, before), spread, watch)
    average_statistics(buffer for buffer, _ in before)
    # BatchNorm counted the batch in the forward pass, good or not; the EMA model, in eval mode, did not.
    for buffer, old in before:
        buffer.copy_(torch.where(step.good, buffer, old))
    return step


def forward(run: Run, batch: Batch, watch: Stopwatch) -> tuple[Result, dict[str, Tensor]]:
    """The objective on one batch, and the spread of its targets (:func:`agglo.objectives.base.spreads`)."""
    config, model, step = run.recipe.train, run.model, batch.step
    images = mixup(_to_device(batch.images, run.device), config.seed, step, run.recipe.data.views.mixup)
    rendered = RenderedBatch(images, batch.field)
    shifts = [_shift(run, batch, view) for view in range(2 + len(run.teachers))]
    view, placement = rendered.crop(batch.size, model.spec.stride, shifts[0])
    watch.lap("mix")
    targets = run.targets(batch, rendered, placement, shifts[2:]) if run.objective.needs_targets else {}
    spread = spreads({name: target.features for name, target in targets.items()})
    watch.lap("teachers")
    set_training(model, config.freeze_norm_statistics)
    mesa = run.recipe.losses.mesa.ramp_at(step) if run.recipe.losses.mesa else 0.0
    with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        average = _average(run, rendered, batch, shifts[1]) if mesa > 0 else None
        context = StepContext(
            step=step, total=config.steps, placement=placement, window=draw_window(config, model, batch),
            heads_only=step < config.head_steps, average=average, mesa_ramp=mesa,
        )  # fmt: skip
        result = run.objective(model, view, targets, context)
    watch.lap("forward")
    return result, spread


def is_finite(result: Result, spread: Mapping[str, Tensor], statistics: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Whether loss, targets and running statistics are finite, as a bool scalar on the device.

    A finite loss does not imply the others: masked positions and dropped teachers are not part of it, and BatchNorm
    maps values of infinite variance to 0.
    """
    good = torch.isfinite(result.loss.detach())
    if spread:
        good = good & ~torch.stack([value.isnan() for value in spread.values()]).any()
    if statistics:
        good = good & torch.cat([buffer.flatten().float() for buffer, _ in statistics]).isfinite().all()
    return good


def backward(
    run: Run, batch: Batch, result: Result, good: Tensor, spread: Mapping[str, Tensor], watch: Stopwatch
) -> DeviceStep:
    """Backward pass and update, if the step is good in all processes."""
    config = run.recipe.train
    norm = torch.zeros_like(result.loss.detach())
    good = dist.all_ranks(good)
    if is_deferred(run.optimizer) or bool(good):
        run.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        watch.lap("backward")
        parameters = [p for p in (*run.model.parameters(), *run.objective.parameters()) if p.grad is not None]
        average_gradients(parameters)
        if config.clip is not None:
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        good = good & torch.isfinite(norm)
        update(run.optimizer, good)
        watch.lap("optimizer")
    values = {"loss": result.loss, "norm": norm}
    values |= {f"term:{name}": value for name, value in result.terms.items()}
    values |= {f"target:{name}": value for name, value in spread.items()}
    return pack(batch.step, batch.names, values, good)


def _to_device(images: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, on CUDA asynchronously from page-locked memory."""
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images.to(device)


def _shift(run: Run, batch: Batch, view: int) -> Tensor:
    """Shifts of a view, in its patches: view 0 is the student's, 1 the EMA student's, then the teachers'."""
    seed, views, count = run.recipe.train.seed, run.recipe.data.views, len(batch.images)
    shifts = draw_shifts(seed, batch.step, view, dist.world_size() * count, views.shift)
    if view < 2 and views.roam:
        # Student and EMA student roam together, so that their views overlap.
        shifts = shifts + draw_roam(seed, batch.step, dist.world_size() * count, views.roam)
    return shifts[dist.local_slice(count)]


@torch.no_grad()
def _average(run: Run, rendered: RenderedBatch, batch: Batch, shifts: Tensor) -> Target:
    """Features of the EMA student for its own view."""
    average: Model = run.ema.model  # type: ignore[assignment]
    view, placement = rendered.crop(batch.size, run.model.spec.stride, shifts)
    return Target(average.encode(view), placement)


def draw_window(config: Train, model: Model, batch: Batch) -> int | None:
    """The window of a step: one of the recipe's that fits the step's grid, or None."""
    if not config.windows or not model.student.windows:
        return None
    rng = generator(config.seed, batch.step, 0, WINDOWS)
    grid = [side // model.spec.stride for side in batch.size]
    legal = [w for w in config.windows if fits(w, (grid[0], grid[1]))]
    if not legal or rng.random() >= config.window_share:
        return None
    return legal[int(rng.integers(len(legal)))]


def running_statistics(model: nn.Module, config: Train) -> list[tuple[Tensor, Tensor]]:
    """The buffers of norms that a step may change, each with a copy."""
    if config.freeze_norm_statistics:
        return []
    found = []
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            found += [(buffer, buffer.clone()) for buffer in module.buffers(recurse=False)]
    return found


def set_training(model: nn.Module, freeze_norm_statistics: bool) -> None:
    """Set training mode; BatchNorm stays in eval mode if its statistics are frozen."""
    model.train()
    if freeze_norm_statistics:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
