"""What became of each step: read now and then, because reading a number from a device waits for everything before it.

A step leaves its numbers where they were computed. The ledger fetches those of several steps in one transfer, counts
what was left out, and names what went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agglo import dist
from agglo.objectives.inspection import CONSTANT
from agglo.recipe import Recipe

DIVERGED = (
    "nothing of these steps was kept. Start again with a lower train.lr or with train.clip=1 (--overwrite); the "
    "checkpoints before them are sound"
)
TEACHER = (
    "nothing of these steps was kept, and no learning rate would change that. Mend the teacher's weights or its input "
    "and go on with --resume"
)
HALF = ", or set {keys} and start again (--overwrite)"
"""The next move after too many steps in a row that were left out: of a student that diverged; of a teacher; of a
teacher in half precision."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One step, as it left the device.

    Args:
        step: from 0.
        images: the batch's names.
        labels: of ``numbers``: ``loss``, ``norm`` (of the gradient), ``term:<name>``, ``target:<teacher>/<part>`` (the
            spread of what the teacher said, :func:`agglo.objectives.inspection.spread`; of parts that have a term).
        numbers: float32 ``(K,)`` on the device.
        good: bool scalar on the device: all that the step rests on is finite, and the update was made.
    """

    step: int
    images: Sequence[str]
    labels: tuple[str, ...]
    numbers: Tensor
    good: Tensor


def pack(step: int, images: Sequence[str], numbers: Mapping[str, Tensor], good: Tensor) -> Taken:
    """A step's scalars, stacked on their device: the means over all processes."""
    stacked = dist.average(torch.stack([n.detach().float() for n in numbers.values()]))
    return Taken(step, images, tuple(numbers), stacked, good)


@dataclass(frozen=True, slots=True)
class Known:
    """One step, read.

    Args:
        step, images: as in :class:`Taken`.
        terms: the loss terms.
        norm: of the gradient, before clipping.
        why: what was not finite, if anything; the step was then left out.
        remedy: what to do about it.
        row: how many steps up to and with this one were left out without a good one between.
        constant: ``<teacher>/<part>`` whose features were the same everywhere.
    """

    step: int
    images: Sequence[str]
    terms: Mapping[str, float]
    norm: float
    why: str | None
    remedy: str
    row: int
    constant: tuple[str, ...]


@dataclass(slots=True)
class Ledger:
    """Collects steps; :meth:`read` fetches all that were not read yet.

    Args:
        half: names of the teachers in half precision (:func:`halved`).

    Attributes:
        skipped: steps that were left out so far.
        row: of them, those since the last good one.
        done: steps up to and with the last good one: where a run that is taken up again should begin.
    """

    done: int = 0
    skipped: int = 0
    row: int = 0
    half: Collection[str] = ()
    _pending: list[Taken] = field(default_factory=list)

    def add(self, taken: Taken) -> None:
        """Keep a step for later."""
        self._pending.append(taken)

    def read(self) -> list[Known]:
        """Everything since the last call, in order; waits for the device once."""
        pending, self._pending = self._pending, []
        if not pending:
            return []
        flat = torch.cat([torch.cat([taken.good.float().reshape(1), taken.numbers]) for taken in pending]).tolist()
        found, start = [], 0
        for taken in pending:
            good, *numbers = flat[start : start + len(taken.labels) + 1]
            start += len(taken.labels) + 1
            found.append(self._know(taken, bool(good), dict(zip(taken.labels, numbers, strict=True))))
        return found

    def _know(self, taken: Taken, good: bool, numbers: Mapping[str, float]) -> Known:
        self.row = 0 if good else self.row + 1
        self.skipped += not good
        if good:
            self.done = taken.step + 1
        why, remedy = (None, "") if good else _why(numbers, self.half)
        return Known(
            taken.step,
            taken.images,
            _part(numbers, "term:"),
            numbers["norm"],
            why,
            remedy,
            self.row,
            tuple(name for name, spread in _part(numbers, "target:").items() if spread < CONSTANT),
        )


def halved(recipe: Recipe) -> frozenset[str]:
    """The teachers that the recipe has in half precision; kinds without a ``dtype`` have none."""
    return frozenset(
        name for name, entry in recipe.teachers.items() if entry.teacher.get("dtype", "float32") != "float32"
    )


def _part(numbers: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}


def _why(numbers: Mapping[str, float], half: Collection[str]) -> tuple[str, str]:
    """What was not finite, nearest to the cause (a teacher, a term, the sum, the gradient), and what to do about it."""
    targets = [name for name, spread in _part(numbers, "target:").items() if math.isnan(spread)]
    if targets:
        said = ", ".join(f"{part} features of teacher {teacher!r}" for teacher, part in (t.split("/") for t in targets))
        names = [name for name in dict.fromkeys(t.split("/")[0] for t in targets) if name in half]
        keys = " and ".join(f"teachers.{name}.dtype=float32" for name in names)
        look = f"{'run it in float32, and ' if names else ''}look at its weights and its input"
        return f"{said}: NaN or infinity; {look}", TEACHER + (HALF.format(keys=keys) if names else "")
    terms = [name for name, value in _part(numbers, "term:").items() if not math.isfinite(value)]
    if terms:
        return f"{', '.join(terms)} is not finite", DIVERGED
    if not math.isfinite(numbers["loss"]):
        return "the loss is not finite", DIVERGED
    if not math.isfinite(numbers["norm"]):
        return "the gradient is not finite", DIVERGED
    return "the running statistics of the student's norms are not finite", DIVERGED
