"""Sizes: all teachers at all resolutions, cropped position embeddings, windows in training."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from torch import Tensor

from claims.base import HOG, LITE, Claim, Means, Numbers, explained, held_out, student_maps, target_maps, trained

AT = "agreement at "


class OnlyAt(torch.nn.Module):
    """A balancer that restricts each teacher's terms to one size."""

    def __init__(self, balancer: Any, loader: Any, homes: dict[str, int]) -> None:
        super().__init__()
        self.balancer, self.loader, self.homes = balancer, loader, homes
        self.weighs_images = False

    def forward(self, terms: dict[str, Tensor], *, step: int, total: int, **rest: Any) -> Tensor:
        from agglo.data.views import draw_resolution

        size = max(draw_resolution(self.loader.seed, step, self.loader.partitions).size)
        # Targets at other sizes are computed and discarded, so that both arms see the same images.
        kept = {
            name: term if self.homes[name.split("/")[0]] == size else 0 * term.detach() for name, term in terms.items()
        }
        return self.balancer(kept, step=step, total=total, **rest)


class Resolutions(Claim):
    """All teachers at stochastic resolutions stop mode switching: EfficientNet-Lite0 and HOG, either each at one size
    (96 and 224 px), or both at a set of sizes; agreement with each teacher is measured from 96 to 448 px.
    Jump: the largest drop of agreement with either teacher from one size to the next. Consistency: share of images
    whose nearest neighbour is the same at the next size. Loss: 1 - agreement. Goal: no jump (no drop above 0.05), equal
    or better consistency, and half the worst loss at an unseen size."""

    SIZES = (96, 128, 160, 224, 320, 448)
    UNSEEN = (160, 320, 448)
    STEADY = 0.05
    """Largest drop of agreement from one size to the next that does not count as a jump."""
    WORST, JUMP, SAME = "worst loss at an unseen size", "largest jump", "neighbours that stay"
    arms = ("each teacher at its own size", "both at all sizes")
    shown = (AT,)
    judged = (WORST, JUMP)
    curve = True

    def measure(self, arm: str, seed: int) -> Numbers:
        teachers = {"lite": {**LITE, "summary_weight": 1}, "hog": HOG["hog"]}
        own = arm == self.arms[0]
        sizes = (
            "[{sizes: [96], batch: 32}, {sizes: [224], batch: 8}]"
            if own
            else "[{sizes: [96, 128, 192], batch: 20}, {sizes: [224, 256], batch: 8}]"
        )
        changes = ["student.max_grid=28", f"partitions={sizes}"]
        homes = {"lite": 96, "hog": 224}
        balancer = (lambda inner, loader: OnlyAt(inner, loader, homes)) if own else None
        run = trained(seed, teachers, changes, balancer=balancer)
        found: Numbers = {}
        losses, jumps, chosen = [], [], []
        before: dict[str, float] = {}
        for size in self.SIZES:
            images = held_out(size, 48)
            here = {
                name: explained(student_maps(run, images, name), target_maps(run, images, run.teachers[name], name))
                for name in teachers
            }
            jumps += [before[name] - here[name] for name in before]
            before = here
            losses += [1 - value for value in here.values()] if size in self.UNSEEN else []
            found |= {f"{AT}{size} px with {name}": value for name, value in here.items()}
            chosen.append(neighbours(run, images))
        same = [float((a == b).float().mean()) for a, b in itertools.pairwise(chosen)]
        return found | {self.WORST: max(losses), self.JUMP: max(jumps), self.SAME: statistics.mean(same)}

    def verdict(self, means: Means) -> tuple[bool, str]:
        without, with_it = (means[arm] for arm in self.arms)
        parts = (
            (self.WORST, with_it[self.WORST] <= without[self.WORST] / 2, "halved", "not halved"),
            (self.JUMP, with_it[self.JUMP] <= self.STEADY, "none", "still one"),
            (self.SAME, with_it[self.SAME] >= without[self.SAME], "as many", "fewer"),
        )
        texts = [
            f"{key} {without[key]:.3f} to {with_it[key]:.3f} ({yes if met else no})" for key, met, yes, no in parts
        ]
        return all(met for _, met, _, _ in parts), ", ".join(texts)


@torch.no_grad()
def neighbours(run: Any, images: Tensor) -> Tensor:
    """Nearest neighbour of each image by the student's summary."""
    summary = torch.cat([run.ema.model.encode(part).summary for part in images.split(16)])
    unit = torch.nn.functional.normalize(summary - summary.mean(0), dim=1)
    likeness = unit @ unit.T
    return likeness.fill_diagonal_(-2).argmax(1)


class Cpe(Claim):
    """Cropped position embeddings (CPE) generalise to untrained sizes and aspect ratios: HOG as teacher, trained at
    96 px square with position embeddings of that size, or random viewports of larger ones. Goal: better agreement at
    untrained sizes and aspect ratios."""

    SEEN, UNSEEN = "agreement at 96x96", "agreement, mean of the unseen"
    VIEWS = ((96, 96), (64, 64), (128, 128), (192, 192), (256, 256), (64, 128), (128, 64), (96, 224), (224, 96))
    arms = ("fixed table", "CPE")
    shown = (SEEN, UNSEEN)
    judged = (UNSEEN,)

    def measure(self, arm: str, seed: int) -> Numbers:
        run = trained(seed, HOG, ["student.max_grid=16"] if arm == "CPE" else ["student.pos_dropout=0.0"])
        found: Numbers = {}
        for size in self.VIEWS:
            images = held_out(size, 48)
            target = target_maps(run, images, run.teachers["hog"], "hog")
            found[f"{AT}{size[0]}x{size[1]}"] = explained(student_maps(run, images, "hog"), target)
        unseen = [value for key, value in found.items() if key != self.SEEN]
        return found | {self.UNSEEN: statistics.mean(unseen)}

    def verdict(self, means: Means) -> tuple[bool, str]:
        without, with_it = (means[arm] for arm in self.arms)
        return with_it[self.UNSEEN] > without[self.UNSEEN], (
            f"{without[self.UNSEEN]:.3f} to {with_it[self.UNSEEN]:.3f} at unseen sizes and aspects, "
            f"{without[self.SEEN]:.3f} to {with_it[self.SEEN]:.3f} at the trained size"
        )


class Windows(Claim):
    """ViTDet's windows in training: 8 blocks, 2 of them global, at 128 px, windows of 2 patches at inference. Goal:
    at most half the loss of agreement without them."""

    WHOLE, SMALL, LOST = "agreement, whole image", "agreement, windows of 2", "lost"
    arms = ("never in training", "in half of the steps")
    shown = (WHOLE, SMALL)
    judged = (LOST,)

    def measure(self, arm: str, seed: int) -> Numbers:
        changes = [
            "student.max_grid=8",
            "student.depth=8",
            "student.num_global=2",
            "partitions=[{sizes: [128], batch: 20}]",
        ]
        run = trained(seed, HOG, changes + (["train.windows=[2, 4]"] if arm == self.arms[1] else []))
        images = held_out(128)
        target = target_maps(run, images, run.teachers["hog"], "hog")
        found = {w: explained(student_maps(run, images, "hog", window=w), target) for w in (0, 2)}
        return {self.WHOLE: found[0], self.SMALL: found[2], self.LOST: found[0] - found[2]}

    def verdict(self, means: Means) -> tuple[bool, str]:
        without, with_it = (means[arm] for arm in self.arms)
        return with_it[self.LOST] <= without[
            self.LOST
        ] / 2, f"{without[self.LOST]:.3f} lost without, {with_it[self.LOST]:.3f} with"
