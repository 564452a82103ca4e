"""The base class of claims, and training and evaluation of their arms."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEPS = int(os.environ.get("STEPS", "300"))
WIDTH = int(os.environ.get("WIDTH", "128"))
"""Channels of the student, which has 4 blocks; use more on a GPU."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE = 96

Numbers = dict[str, float]
Means = Mapping[str, Mapping[str, float]]
"""Arm → metric → mean over the seeds."""

BASE: dict[str, Any] = {
    "name": "ablation",
    "claim": {"summary": "one arm of an ablation"},
    # Position embeddings of the grid's size: absolute positions, so that position-locked features can be learned.
    "student": {
        "kind": "vit", "width": WIDTH, "depth": 4, "heads": max(2, WIDTH // 64), "max_grid": SIDE // 16, "registers": 2,
    },
    "heads": {"summary": {"kind": "mlp", "hidden": 192}, "spatial": {"kind": "mlp", "hidden": 192}},
    "targets": {"normalizer": {"kind": "phi_s"}, "estimate_images": 256},
    "losses": {"summary": {"kind": "angular"}, "spatial": {"kind": "mse"}},
    "data": {
        "sources": [
            {"kind": "scenes", "split": "train", "weight": 3},
            {"kind": "photos", "split": "train", "weight": 1},
        ],
        "views": {"scale": [0.25, 1.0]},
    },
    "partitions": [{"sizes": [SIDE], "batch": 32}],
    "train": {"steps": STEPS, "lr": 1e-3, "warmup_steps": 20, "ema": 0.99, "clip": 1.0, "save_every": 100_000},
}  # fmt: skip
HOG = {"hog": {"kind": "hog", "cell": 8, "group": 2}}
LITE = {"kind": "timm", "model": "tf_efficientnet_lite0", "stage": 3}


YES, NO, WITHIN = "yes", "no", "within the seeds' spread"


class Claim(ABC):
    """One claim; its docstring is published on the page.

    Attributes:
        arms: names of the arms, the one without the ingredient first.
        judged: metrics that the ingredient should change. Differences of the first two arms within the spread of the
            seeds are inconclusive.
        shown: metrics of the figure, or the common prefix of a curve's metrics (``agreement at ``).
        curve: whether the figure is a curve over the numbers in the metrics' names.
    """

    arms: tuple[str, ...]
    shown: tuple[str, ...]
    judged: tuple[str, ...] = ()
    curve: bool = False

    @abstractmethod
    def measure(self, arm: str, seed: int) -> Numbers:
        """Train one arm from one seed and return its metrics."""

    @abstractmethod
    def verdict(self, means: Means) -> tuple[bool, str]:
        """Whether the goal of the claim is met, and the numbers that decide it."""

    def judge(self, arms: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[str, str]:
        """:data:`YES`, :data:`NO` or :data:`WITHIN`, and the numbers that decide it.

        :data:`YES` requires every judged metric to change by more than the spread of the seeds (maximum - minimum, of
        the arm with the larger one); :data:`NO` requires one that does.

        Args:
            arms: by arm and metric, ``mean`` and ``spread``.
        """
        holds, verdict = self.verdict({arm: {m: v["mean"] for m, v in values.items()} for arm, values in arms.items()})
        without, with_it = (arms[arm] for arm in self.arms[:2])
        moved = [
            abs(with_it[m]["mean"] - without[m]["mean"]) > max(with_it[m]["spread"], without[m]["spread"])
            for m in self.judged
        ]
        if holds:
            return (YES if all(moved) else WITHIN), verdict
        return (NO if any(moved) or not moved else WITHIN), verdict


def trained(
    seed: int,
    teachers: Mapping[str, Any],
    changes: Sequence[str],
    wrap: Mapping[str, Callable[[Any, Tensor], Any]] | None = None,
    balancer: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """A finished run: its teachers (wrapped ones included), objective, and EMA model in eval mode.

    Args:
        seed: seed of all randomness.
        teachers: teachers of the recipe.
        changes: overrides of the recipe, as on the command line.
        wrap: by teacher, a function of it and some training images that returns a replacement.
        balancer: a function of balancer and loader that returns a replacement.
    """
    from agglo import recipe
    from agglo.config import override
    from agglo.training import loop

    tree = override({**BASE, "teachers": dict(teachers)}, [f"train.seed={seed}", *changes])
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        folder.mkdir()
        decoded = recipe.from_dict(tree)
        run = loop.prepare(decoded, folder, torch.device(DEVICE), resume=False)
        if wrap:
            seen = torch.cat([run.loader.batch((1 << 41) + number).images for number in range(4)]).to(DEVICE)
            for name, make in wrap.items():
                run.teachers[name] = make(run.teachers[name], seen)
        if balancer is not None:
            run.objective.balancer = balancer(run.objective.balancer, run.loader)
        with loop.Progress(folder, decoded.train.steps, quiet=True) as progress:
            loop.start(run, progress, [])
            loop.train_steps(run, progress, [])
    run.ema.model.eval()
    return run


_KEPT: dict[tuple[int | tuple[int, int], int], Tensor] = {}


def held_out(size: int | tuple[int, int] = SIDE, count: int = 96) -> Tensor:
    """Images no arm was trained on: the test split of `scenes`, and held-out photographs."""
    from agglo.config import build
    from agglo.data.loader import evaluation_batches

    if (size, count) not in _KEPT:
        found: list[Tensor] = []
        for options in ({"kind": "scenes", "split": "test"}, {"kind": "photos", "split": "heldout"}):
            for batch in evaluation_batches(build("sources", options), size, 32):
                found.append(batch.images)
                if sum(map(len, found)) >= count:
                    break
        _KEPT[size, count] = torch.cat(found)[:count].to(DEVICE)
    return _KEPT[size, count]


@torch.no_grad()
def student_maps(run: Any, images: Tensor, head: str | None = None, **options: Any) -> Tensor:
    """Spatial features of the EMA student, or of one of its heads in normalised space."""
    parts = []
    for part in images.split(16):
        features = run.ema.model.encode(part, **options)
        parts.append(features.spatial if head is None else run.ema.model.heads[head](features).spatial)
    return torch.cat(parts)


@torch.no_grad()
def target_maps(run: Any, images: Tensor, teacher: Any, name: str) -> Tensor:
    """Teacher features of the student's views, in the normalised space of the run, on the teacher's grid."""
    from agglo.preprocess import resize

    size = teacher.input_size((images.shape[-2], images.shape[-1]), run.model.spec.stride)
    return torch.cat(
        [run.objective.normalizers[name](teacher(resize(part, size)).spatial.float()) for part in images.split(16)]
    )


def explained(prediction: Tensor, target: Tensor) -> float:
    """Share of the target's variance over images and positions that the prediction explains."""
    centred = target - target.mean((0, 2, 3), keepdim=True)
    return float(1 - (prediction - target).square().sum() / centred.square().sum())


class Wrapped(torch.nn.Module):
    """A modified teacher with the spec and licence of the original."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher, self.spec, self.licence = teacher, teacher.spec, teacher.licence
        self.input_size = teacher.input_size
