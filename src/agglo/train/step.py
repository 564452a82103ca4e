"""One step of training: views, teachers, student, losses, update."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from agglo.data.loader import Batch
from agglo.data.shifts import Canvas, draw_shifts
from agglo.data.views import generator, mix
from agglo.model import Model
from agglo.objectives.distill import Seen
from agglo.recipe import Train
from agglo.types import AggloError

if TYPE_CHECKING:
    from agglo.train.loop import Run

WINDOWS = 5
"""The stream of random numbers that draws ViTDet's windows."""


class NotFiniteError(AggloError, RuntimeError):
    """One step's loss or gradient is not a number: the step is left out.

    Args:
        what: which.
        names: the batch's images.
    """

    def __init__(self, what: str, names: list[str]) -> None:
        super().__init__(what)
        self.names = names


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in each phase of the loop since the last :meth:`take`."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        """Book the time since the last call under ``phase``; a GPU is waited for, or its work would be booked later."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """The booked seconds, and start again."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def one_step(run: Run, batch: Batch, watch: Stopwatch) -> tuple[dict[str, Tensor], Tensor]:
    """Forward, backward and update on one batch.

    Returns:
        The loss terms by name, and the norm of the gradient before clipping.
    """
    config, model, step = run.recipe.train, run.model, batch.step
    images = mix(batch.images.to(run.device), config.seed, step, run.recipe.data.views.mixup)
    canvas = Canvas(images, batch.field)
    shifts = [_shift(run, batch, view) for view in range(2 + len(run.teachers))]
    watch.lap("mix")
    targets = run.objective.teach(run.teachers, canvas, batch.size, model.spec.stride, shifts[2:])
    watch.lap("teachers")
    set_training(model, config.freeze_norm_statistics)
    view, placement = canvas.crop(batch.size, model.spec.stride, shifts[0])
    mesa = run.recipe.losses.mesa.share(step) if run.recipe.losses.mesa else 0.0
    with torch.autocast(run.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        average = _average(run, canvas, batch, shifts[1]) if mesa > 0 else None
        result = run.objective(
            model, view, targets, placement=placement, average=average, mesa_share=mesa,
            heads_only=step < config.head_steps, window=draw_window(config, model, batch),
            step=step, total=config.steps,
        )  # fmt: skip
    watch.lap("forward")
    if not torch.isfinite(result.loss):
        bad = [name for name, value in result.terms.items() if not torch.isfinite(value)]
        raise NotFiniteError(f"{', '.join(bad) or 'the loss'} is not finite", batch.names)
    run.optimizer.zero_grad(set_to_none=True)
    result.loss.backward()
    watch.lap("backward")
    parameters = [p for p in (*model.parameters(), *run.objective.parameters()) if p.grad is not None]
    if config.clip is not None:
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
    if not torch.isfinite(norm):
        raise NotFiniteError("the gradient is not finite", batch.names)
    run.optimizer.step()
    watch.lap("optimizer")
    return dict(result.terms), norm


def _shift(run: Run, batch: Batch, view: int) -> Tensor:
    """Where a view of this step looks: 0 is the student's, 1 the averaged student's, then the teachers'."""
    return draw_shifts(run.recipe.train.seed, batch.step, view, len(batch.images), run.recipe.data.views.shift)


@torch.no_grad()
def _average(run: Run, canvas: Canvas, batch: Batch, shifts: Tensor) -> Seen:
    """What the averaged student says of a view of its own."""
    average: Model = run.ema.model  # type: ignore[assignment]
    view, placement = canvas.crop(batch.size, run.model.spec.stride, shifts)
    return Seen(average.encode(view), placement)


def draw_window(config: Train, model: Model, batch: Batch) -> int | None:
    """The window of a step: none, or one of the recipe's that divides the step's grid and is smaller than it."""
    if not config.windows:
        return None
    rng = generator(config.seed, batch.step, 0, WINDOWS)
    grid = [side // model.spec.stride for side in batch.size]
    legal = [w for w in config.windows if w < max(grid) and all(side % w == 0 for side in grid)]
    if not legal or rng.random() >= config.window_share:
        return None
    return legal[int(rng.integers(len(legal)))]


def set_training(model: nn.Module, freeze_norm_statistics: bool) -> None:
    """Train mode; BatchNorm keeps its running statistics when they are frozen."""
    model.train()
    if freeze_norm_statistics:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
