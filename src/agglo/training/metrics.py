"""Per-step metrics, kept on the device and fetched in batches to avoid a synchronisation per step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agglo import dist
from agglo.objectives.base import CONSTANT
from agglo.recipe import Recipe

DIVERGED = "Start again with a lower train.lr or with train.clip=1 (--overwrite); earlier checkpoints are intact"
TEACHER = "The learning rate is not the cause: repair the teacher's weights or its input, then resume with --resume"
HALF = ", or set {keys} and start again (--overwrite)"
"""Remedies after too many consecutive skipped steps: a diverging student; a teacher; one in half precision."""


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """Metrics of one step, on the device.

    Args:
        step: from 0.
        images: names of the batch's images.
        labels: of ``values``: ``loss``, ``norm`` (of the gradient), ``term:<name>``, ``target:<target>/<part>``
            (:func:`agglo.objectives.base.spread` of a part that has a term).
        values: float32 ``(K,)``, on the device.
        good: bool scalar on the device: everything that the update depends on is finite, and it was made.
    """

    step: int
    images: Sequence[str]
    labels: tuple[str, ...]
    values: Tensor
    good: Tensor


def pack(step: int, images: Sequence[str], values: Mapping[str, Tensor], good: Tensor) -> DeviceStep:
    """Stack the scalars of a step on their device; means over all processes."""
    stacked = dist.average(torch.stack([n.detach().float() for n in values.values()]))
    return DeviceStep(step, images, tuple(values), stacked, good)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of one step, on the host.

    Args:
        step, images: as in :class:`DeviceStep`.
        terms: the loss terms.
        norm: of the gradient, before clipping.
        problem: what was not finite, or None; the step was then skipped.
        remedy: what to do about it.
        consecutive_skips: number of skipped steps up to and including this one since the last good one.
        constant: ``<target>/<part>`` whose features are the same everywhere.
    """

    step: int
    images: Sequence[str]
    terms: Mapping[str, float]
    norm: float
    problem: str | None
    remedy: str
    consecutive_skips: int
    constant: tuple[str, ...]


@dataclass(slots=True)
class MetricsBuffer:
    """Collects steps; :meth:`fetch` returns those since its last call.

    Args:
        half: names of the teachers in half precision (:func:`half_precision_teachers`).

    Attributes:
        skipped: number of skipped steps.
        consecutive_skips: number of skipped steps since the last good one.
        done: number of steps up to and including the last good one, where a resumed run should begin.
    """

    done: int = 0
    skipped: int = 0
    consecutive_skips: int = 0
    half: Collection[str] = ()
    _pending: list[DeviceStep] = field(default_factory=list)

    def add(self, step: DeviceStep) -> None:
        """Append a step."""
        self._pending.append(step)

    def fetch(self) -> list[StepMetrics]:
        """All steps since the last call, in order; synchronises with the device once."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        flat = torch.cat([torch.cat([each.good.float().reshape(1), each.values]) for each in pending]).tolist()
        found, start = [], 0
        for each in pending:
            good, *values = flat[start : start + len(each.labels) + 1]
            start += len(each.labels) + 1
            found.append(self._metrics(each, bool(good), dict(zip(each.labels, values, strict=True))))
        return found

    def _metrics(self, step: DeviceStep, good: bool, values: Mapping[str, float]) -> StepMetrics:
        self.consecutive_skips = 0 if good else self.consecutive_skips + 1
        self.skipped += not good
        if good:
            self.done = step.step + 1
        problem, remedy = (None, "") if good else _diagnose(values, self.half)
        return StepMetrics(
            step.step,
            step.images,
            _part(values, "term:"),
            values["norm"],
            problem,
            remedy,
            self.consecutive_skips,
            tuple(name for name, spread in _part(values, "target:").items() if spread < CONSTANT),
        )


def half_precision_teachers(recipe: Recipe) -> frozenset[str]:
    """Names of the teachers whose ``dtype`` key is not float32."""
    return frozenset(
        name for name, entry in recipe.teachers.items() if entry.teacher.get("dtype", "float32") != "float32"
    )


def _part(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _diagnose(values: Mapping[str, float], half: Collection[str]) -> tuple[str, str]:
    """Describe the first non-finite value (of a teacher, a term, the sum, the gradient), and the remedy."""
    targets = [name for name, spread in _part(values, "target:").items() if math.isnan(spread)]
    if targets:
        pairs = [target.split("/") for target in targets]
        parts = ", ".join(f"{part} features of teacher {teacher!r}" for teacher, part in pairs)
        names = [name for name in dict.fromkeys(teacher for teacher, _ in pairs) if name in half]
        keys = " and ".join(f"teachers.{name}.dtype=float32" for name in names)
        check = f"{'run it in float32, and ' if names else ''}check its weights and its input"
        return f"{parts}: NaN or infinity; {check}", TEACHER + (HALF.format(keys=keys) if names else "")
    terms = [name for name, value in _part(values, "term:").items() if not math.isfinite(value)]
    if terms:
        return f"{', '.join(terms)} is not finite", DIVERGED
    if not math.isfinite(values["loss"]):
        return "the loss is not finite", DIVERGED
    if not math.isfinite(values["norm"]):
        return "the gradient is not finite", DIVERGED
    return "the running statistics of the student's norms are not finite", DIVERGED
