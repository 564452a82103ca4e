"""One step of training: views, teachers, student, losses, update."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from agglo import dist
from agglo.cache.crops import draw_roam
from agglo.data.loader import Batch
from agglo.data.shifts import RenderedBatch, draw_shifts
from agglo.data.views import generator, mixup
from agglo.model.model import Model
from agglo.objectives.distill import Result, Seen
from agglo.objectives.inspection import spreads
from agglo.recipe import Train
from agglo.training.checks import fits
from agglo.training.ledger import Taken, pack
from agglo.training.optim import deferred, update
from agglo.training.parallel import average_gradients, average_statistics
from agglo.training.upsampling import sharpen

if TYPE_CHECKING:
    from agglo.training.loop import Run

WINDOWS = 5
"""The stream of random numbers that draws ViTDet's windows."""


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in each phase of the loop since the last :meth:`take`.

    On CUDA they are the device's: marks go into its stream and are read by :meth:`take`, so no phase is waited for.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, float] = field(default_factory=dict)
    _last: Any = None
    _marks: list[tuple[str, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Book the time since the last call under ``phase``."""
        before, self._last = self._last, self._now()
        self._marks.append((phase, before, self._last))

    def take(self) -> dict[str, float]:
        """The booked seconds, and start again."""
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


def one_step(run: Run, batch: Batch, watch: Stopwatch) -> Taken:
    """Forward, backward and update on one batch; an update that would not be finite is left out.

    On CUDA nothing here waits for the device: what became of the step is in the result, to be read later.
    """
    before = statistics(run.model, run.recipe.train)
    result, told = (sharpen if run.recipe.objective.kind == "upsample" else forward)(run, batch, watch)
    # What has no term, such as a part of weight 0, may be anything: the step does not rest on it.
    told = {name: spread for name, spread in told.items() if name in result.terms}
    taken = learn(run, batch, result, sound(result, told, before), told, watch)
    average_statistics(buffer for buffer, _ in before)
    # BatchNorm has counted the batch while it was encoded, good or not; the averaged model's, in eval mode, has not.
    for buffer, was in before:
        buffer.copy_(torch.where(taken.good, buffer, was))
    return taken


def forward(run: Run, batch: Batch, watch: Stopwatch) -> tuple[Result, dict[str, Tensor]]:
    """The objective on one batch, and how much varies what each teacher said."""
    config, model, step = run.recipe.train, run.model, batch.step
    images = mixup(_sent(batch.images, run.device), config.seed, step, run.recipe.data.views.mixup)
    canvas = RenderedBatch(images, batch.field)
    shifts = [_shift(run, batch, view) for view in range(2 + len(run.teachers))]
    view, placement = canvas.crop(batch.size, model.spec.stride, shifts[0])
    watch.lap("mix")
    targets = run.teach(batch, canvas, shifts[2:], placement)
    told = spreads({name: seen.features for name, seen in targets.items()})
    watch.lap("teachers")
    set_training(model, config.freeze_norm_statistics)
    mesa = run.recipe.losses.mesa.share(step) if run.recipe.losses.mesa else 0.0
    with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        average = _average(run, canvas, batch, shifts[1]) if mesa > 0 else None
        result = run.objective(
            model, view, targets, placement=placement, average=average, mesa_share=mesa,
            heads_only=step < config.head_steps, window=draw_window(config, model, batch),
            step=step, total=config.steps,
        )  # fmt: skip
    watch.lap("forward")
    return result, told


def sound(result: Result, told: Mapping[str, Tensor], statistics: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Whether a step may be made, as a bool scalar on the device: loss, targets and running statistics are finite.

    A finite loss does not say so of the others: masked positions have no part in it, nor has a teacher that was
    dropped; and BatchNorm makes zeros of values whose variance is infinite.
    """
    good = torch.isfinite(result.loss.detach())
    if told:
        good = good & ~torch.stack([spread.isnan() for spread in told.values()]).any()
    if statistics:
        good = good & torch.cat([buffer.flatten().float() for buffer, _ in statistics]).isfinite().all()
    return good


def learn(run: Run, batch: Batch, result: Result, good: Tensor, told: Mapping[str, Tensor], watch: Stopwatch) -> Taken:
    """Backward and update, where the step is good."""
    config = run.recipe.train
    norm = torch.zeros_like(result.loss.detach())
    good = dist.all_ranks(good)
    if deferred(run.optimizer) or bool(good):
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
    numbers = {"loss": result.loss, "norm": norm}
    numbers |= {f"term:{name}": value for name, value in result.terms.items()}
    numbers |= {f"target:{name}": value for name, value in told.items()}
    return pack(batch.step, batch.names, numbers, good)


def _sent(images: Tensor, device: torch.device) -> Tensor:
    """To the device; from page-locked memory, which is copied while both go on."""
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images.to(device)


def _shift(run: Run, batch: Batch, view: int) -> Tensor:
    """Where a view of this step looks: 0 is the student's, 1 the averaged student's, then the teachers'."""
    seed, views, count = run.recipe.train.seed, run.recipe.data.views, len(batch.images)
    shifts = draw_shifts(seed, batch.step, view, dist.world_size() * count, views.shift)
    if view < 2 and views.roam:
        # The student and its average roam together, or they would see too little in common.
        shifts = shifts + draw_roam(seed, batch.step, dist.world_size() * count, views.roam)
    return shifts[dist.local_slice(count)]


@torch.no_grad()
def _average(run: Run, canvas: RenderedBatch, batch: Batch, shifts: Tensor) -> Seen:
    """What the averaged student says of a view of its own."""
    average: Model = run.ema.model  # type: ignore[assignment]
    view, placement = canvas.crop(batch.size, run.model.spec.stride, shifts)
    return Seen(average.encode(view), placement)


def draw_window(config: Train, model: Model, batch: Batch) -> int | None:
    """The window of a step: one of the recipe's that divides the step's grid and is smaller than it, or none.

    A student that cannot look through windows has none.
    """
    if not config.windows or not model.student.windows:
        return None
    rng = generator(config.seed, batch.step, 0, WINDOWS)
    grid = [side // model.spec.stride for side in batch.size]
    legal = [w for w in config.windows if fits(w, (grid[0], grid[1]))]
    if not legal or rng.random() >= config.window_share:
        return None
    return legal[int(rng.integers(len(legal)))]


def statistics(model: nn.Module, config: Train) -> list[tuple[Tensor, Tensor]]:
    """The running statistics that a step may move, and copies of them as they are."""
    if config.freeze_norm_statistics:
        return []
    found = []
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            found += [(buffer, buffer.clone()) for buffer in module.buffers(recurse=False)]
    return found


def set_training(model: nn.Module, freeze_norm_statistics: bool) -> None:
    """Train mode; BatchNorm keeps its running statistics when they are frozen."""
    model.train()
    if freeze_norm_statistics:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
