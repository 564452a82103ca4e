"""Fixed-pattern noise with and without shift equivariance and SE-MESA."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from claims.base import (
    HOG,
    SIDE,
    Claim,
    Means,
    Numbers,
    Wrapped,
    explained,
    held_out,
    student_maps,
    target_maps,
    trained,
)

ENERGY, CLEAN = "pattern energy in the prediction", "agreement with the clean teacher"
LOCKED, CHANGE = "position-locked energy in the backbone", "feature change under a shift of one patch"
CHANGES = {
    "one crop for all": [],
    "shifted crops": ["data.views.shift=0.5"],
    "shifted crops, SE-MESA": ["data.views.shift=0.5", "losses.mesa={kind: se_mesa, start: 50, ramp: 50}"],
}


class Patterned(Wrapped):
    """A teacher whose map carries the same noise at the same positions, for every image."""

    def __init__(self, teacher: Any, pattern: Tensor) -> None:
        super().__init__(teacher)
        self.register_buffer("pattern", pattern)

    def forward(self, images: Tensor) -> Any:
        out = self.teacher(images)
        return type(out)(out.summary, out.spatial + self.pattern)


def pattern_for(teacher: Any, seed: int) -> Tensor:
    """Noise as strong as the teacher's signal, zero-mean over positions: ``(C, h, w)``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        signal = teacher(held_out(count=32)).spatial
    noise = torch.randn(signal.shape[1], *signal.shape[-2:], generator=generator).to(signal.device)
    noise = noise - noise.mean((1, 2), keepdim=True)
    return noise * signal.std((0, 2, 3))[:, None, None]


def shift_change(run: Any, wide: Tensor) -> float:
    """Relative change of the features of the same content when the crop moves by one patch."""
    one, other = student_maps(run, wide[..., :SIDE, :SIDE]), student_maps(run, wide[..., 16:, 16:])
    a, b = one[..., 1:, 1:], other[..., :-1, :-1]
    centred = a - a.mean((0, 2, 3), keepdim=True)
    return float((a - b).square().mean() / centred.square().mean())


@cache
def look(arm: str, seed: int) -> Numbers:
    """Train an arm with the pattern; both claims use the same runs."""
    from agglo.config import build

    images = held_out()
    clean = build("teachers", HOG["hog"]).to(images.device)
    pattern = pattern_for(clean, seed)
    run = trained(seed, HOG, CHANGES[arm], {"hog": lambda teacher, _: Patterned(teacher, pattern)})
    normalizer = run.objective.normalizers["hog"]
    target = target_maps(run, images, clean, "hog")
    noise = normalizer.multiply(normalizer.whiten, pattern[None])[0]
    found = student_maps(run, images, "hog")
    residual = (found - target).mean(0)
    residual = residual - residual.mean((1, 2), keepdim=True)
    backbone = student_maps(run, images)
    locked = backbone.mean(0) - backbone.mean((0, 2, 3))[:, None, None]
    spread = backbone - backbone.mean((0, 2, 3), keepdim=True)
    return {
        ENERGY: float((residual * noise).sum() / noise.square().sum()) ** 2,
        CLEAN: explained(found, target),
        LOCKED: float(locked.square().mean() / spread.square().mean()),
        CHANGE: shift_change(run, held_out(SIDE + 16)),
    }


class FixedPattern(Claim):
    """Shift equivariance removes fixed-pattern noise: HOG as teacher, with position-locked noise as strong as its
    signal. Energy: the squared share of the pattern in the student's prediction. Goal: at least 4 times less, at equal
    or better agreement with the clean teacher."""

    arms = ("one crop for all", "shifted crops")
    shown = (ENERGY, CLEAN)
    judged = (ENERGY, CLEAN)

    def measure(self, arm: str, seed: int) -> Numbers:
        found = look(arm, seed)
        return {key: found[key] for key in (ENERGY, CLEAN)}

    def verdict(self, means: Means) -> tuple[bool, str]:
        without, with_it = (means[arm] for arm in self.arms)
        ratio = without[ENERGY] / max(with_it[ENERGY], 1e-9)
        return ratio >= 4 and with_it[CLEAN] >= without[CLEAN], (
            f"{ratio:.1f} times less, agreement {without[CLEAN]:.3f} to {with_it[CLEAN]:.3f}"
        )


class SeMesa(Claim):
    """SE-MESA keeps the pattern out of the backbone: the same teacher and noise. Energy: position-locked share of the
    variance of the backbone features. Goal: lower energy, and less change of features under a shift of one patch."""

    arms = ("shifted crops", "shifted crops, SE-MESA")
    shown = (LOCKED, CHANGE)
    judged = (LOCKED, CHANGE)

    def measure(self, arm: str, seed: int) -> Numbers:
        found = look(arm, seed)
        return {key: found[key] for key in (LOCKED, CHANGE, CLEAN)}

    def verdict(self, means: Means) -> tuple[bool, str]:
        without, with_it = (means[arm] for arm in self.arms)
        return all(with_it[key] < without[key] for key in (LOCKED, CHANGE)), (
            f"locked energy {without[LOCKED]:.3f} to {with_it[LOCKED]:.3f}, "
            f"change {without[CHANGE]:.3f} to {with_it[CHANGE]:.3f}"
        )
