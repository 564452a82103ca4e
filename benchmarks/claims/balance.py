"""Balance between teachers: PHI-S for feature scales, dispersion for summary cones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from claims.base import LITE, Claim, Means, Numbers, Wrapped, explained, held_out, student_maps, target_maps, trained

FINE, COARSE = "variance explained, teacher of scale 1", "variance explained, teacher of scale 100"
BETWEEN = "points between them"


class Scaled(Wrapped):
    """A teacher with scaled features."""

    def __init__(self, teacher: Any, factor: float) -> None:
        super().__init__(teacher)
        self.factor = factor

    def forward(self, images: Tensor) -> Any:
        out = self.teacher(images)
        return type(out)(out.summary, out.spatial * self.factor)


class Scales(Claim):
    """PHI-S: teachers whose scales differ by a factor of 100 are learned equally well. HOG as two teachers, one
    scaled by 100. Goal: explained variances within 5 points of each other."""

    arms = ("plain MSE", "PHI-S")
    shown = (FINE, COARSE)
    judged = (BETWEEN,)

    def measure(self, arm: str, seed: int) -> Numbers:
        teachers = {"fine": {"kind": "hog", "cell": 8, "group": 2}, "coarse": {"kind": "hog", "cell": 8, "group": 2}}
        changes = ["targets.normalizer.kind=identity"] if arm == "plain MSE" else []
        run = trained(seed, teachers, changes, {"coarse": lambda teacher, _: Scaled(teacher, 100.0)})
        images = held_out()
        shares = {
            name: explained(student_maps(run, images, name), target_maps(run, images, run.teachers[name], name))
            for name in teachers
        }
        return {FINE: shares["fine"], COARSE: shares["coarse"], BETWEEN: 100 * abs(shares["fine"] - shares["coarse"])}

    def verdict(self, means: Means) -> tuple[bool, str]:
        without, with_it = (means[arm] for arm in self.arms)
        return with_it[BETWEEN] <= 5, f"{with_it[BETWEEN]:.1f} points apart; plain MSE {without[BETWEEN]:.1f}"


NARROW, WIDE, RATIO = "error over dispersion, narrow cone", "error over dispersion, wide cone", "ratio"
WANTED = {"narrow": 0.7, "wide": 2.1}


class Cone(Wrapped):
    """A teacher whose summaries are moved towards one direction, into a cone of a given dispersion."""

    def __init__(self, teacher: Any, dispersion: float, images: Tensor) -> None:
        super().__init__(teacher)
        with torch.no_grad():
            summary = teacher(images).summary
        self.register_buffer("mean", summary.mean(0))
        self.register_buffer("std", summary.std(0) + 1e-6)
        generator = torch.Generator().manual_seed(5)
        direction = torch.randn(summary.shape[1], generator=generator).to(summary.device)
        self.register_buffer("direction", direction / direction.norm())
        low, high, unit = 0.0, 1e3, (summary - self.mean) / self.std
        for _ in range(60):  # the further along the direction, the narrower the cone
            self.push = (low + high) / 2
            self.axis = (unit + self.push * self.direction).mean(0)
            low, high = (
                (self.push, high) if self.spread(unit + self.push * self.direction) > dispersion else (low, self.push)
            )

    def spread(self, summary: Tensor) -> float:
        """Mean squared angle to the axis of the cone."""
        return float(torch.cosine_similarity(summary, self.axis[None]).clamp(-1, 1).arccos().square().mean())

    def forward(self, images: Tensor) -> Any:
        out = self.teacher(images)
        return type(out)((out.summary - self.mean) / self.std + self.push * self.direction, None)


class Cones(Claim):
    """The angular loss with dispersion balances cones: EfficientNet-Lite0's summaries as two teachers, in a cone of
    dispersion 0.7 and one of 2.1 over the training images. Error: mean squared angle on held-out images over their
    mean squared angle to the cone's axis (1: no better than the axis). Goal: the two within a ratio of 1.3."""

    arms = ("plain cosine", "angle over dispersion, fitted")
    shown = (NARROW, WIDE)
    judged = (RATIO,)

    def measure(self, arm: str, seed: int) -> Numbers:
        images = held_out(64, 96)
        lite = {**LITE, "spatial_weight": 0}
        kind = "cosine" if arm == self.arms[0] else "angular"
        run = trained(
            seed, dict.fromkeys(WANTED, lite), [f"losses.summary.kind={kind}", "partitions=[{sizes: [64], batch: 32}]"],
            {name: lambda teacher, seen, d=d: Cone(teacher, d, seen) for name, d in WANTED.items()},
        )  # fmt: skip
        errors = {}
        with torch.no_grad():
            features = run.ema.model.encode(images)
            for name in WANTED:
                predicted, target = run.ema.model.heads[name](features).summary, run.teachers[name](images).summary
                angle = torch.cosine_similarity(predicted, target).clamp(-1, 1).arccos()
                errors[name] = float(angle.square().mean()) / run.teachers[name].spread(target)
        return {
            NARROW: errors["narrow"], WIDE: errors["wide"], RATIO: max(errors.values()) / min(errors.values()),
        }  # fmt: skip

    def verdict(self, means: Means) -> tuple[bool, str]:
        without, with_it = (means[arm] for arm in self.arms)
        return with_it[RATIO] <= 1.3, f"ratio {with_it[RATIO]:.2f}; plain cosine {without[RATIO]:.2f}"
