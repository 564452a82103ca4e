"""The claims of the C-RADIOv4 recipe, each with and without its ingredient, over several seeds, on two cores.

``python benchmarks/run.py ablations`` trains small ViTs on `scenes` and photographs with offline teachers and writes
``results/ablations.json`` and ``docs/ablations.md``. A claim that does not hold at this size is in the table all the
same. ``CLAIMS=fixed_pattern,scales`` runs some of them, ``SEEDS=1 STEPS=3`` a trial.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEEDS = tuple(range(int(os.environ.get("SEEDS", "3"))))
STEPS = int(os.environ.get("STEPS", "300"))
SIDE = 96
DOCS = Path(__file__).parents[1] / "docs"

BASE: dict[str, Any] = {
    "name": "ablation",
    "claim": {"summary": "one arm of an ablation"},
    # The table is as large as the grid: positions are absolute, and whatever is locked to them can be learned.
    "student": {"kind": "vit", "width": 192, "depth": 4, "heads": 3, "max_grid": SIDE // 16, "registers": 2},
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
}
HOG = {"hog": {"kind": "hog", "cell": 8, "group": 2}}


# --- training and looking ---------------------------------------------------------------------------------------------


def trained(
    seed: int, teachers: dict[str, Any], changes: Sequence[str], wrap: dict[str, Callable[[Any], Any]] | None = None
) -> Any:
    """A finished run: its teachers (wrapped ones included), objective, and averaged model in eval mode."""
    from agglo import recipe
    from agglo.config import override
    from agglo.train import loop

    tree = override({**BASE, "teachers": teachers}, [f"train.seed={seed}", *changes])
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        folder.mkdir()
        run = loop.prepare(recipe.decode(tree), folder, torch.device("cpu"), resume=False)
        for name, make in (wrap or {}).items():
            run.teachers[name] = make(run.teachers[name])
        with loop.Progress(folder, STEPS, quiet=True) as progress:
            loop.start(run, progress, [])
            loop.train(run, progress, [])
    run.ema.model.eval()
    return run


def held_out(size: int = SIDE, count: int = 96) -> Tensor:
    """Images no arm was trained on: the test split of `scenes`, and photographs kept out."""
    from agglo.config import build
    from agglo.data.loader import evaluation_batches

    found: list[Tensor] = []
    for options in ({"kind": "scenes", "split": "test"}, {"kind": "photos", "split": "heldout"}):
        found += [batch.images for batch in evaluation_batches(build("sources", options), size, 32)]
    return torch.cat(found)[:count]


@torch.no_grad()
def student_maps(run: Any, images: Tensor, head: str | None = None) -> Tensor:
    """The averaged student's map, or what one of its heads says in normalised space."""
    features = run.ema.model.encode(images)
    return features.spatial if head is None else run.ema.model.heads[head](features).spatial


@torch.no_grad()
def target_maps(run: Any, images: Tensor, teacher: Any, name: str) -> Tensor:
    """What a teacher says, in the run's normalised space."""
    return run.objective.normalizers[name](teacher(images).spatial.float())


def explained(prediction: Tensor, target: Tensor) -> float:
    """Share of the target's variance over images and positions that the prediction explains."""
    centred = target - target.mean((0, 2, 3), keepdim=True)
    return float(1 - (prediction - target).square().sum() / centred.square().sum())


# --- claims -----------------------------------------------------------------------------------------------------------


class Patterned(torch.nn.Module):
    """A teacher whose map carries the same noise at the same positions, whatever the image."""

    def __init__(self, teacher: Any, pattern: Tensor) -> None:
        super().__init__()
        self.teacher, self.spec, self.licence = teacher, teacher.spec, teacher.licence
        self.input_size = teacher.input_size
        self.register_buffer("pattern", pattern)

    def forward(self, images: Tensor) -> Any:
        out = self.teacher(images)
        return type(out)(out.summary, out.spatial + self.pattern)


def pattern_for(teacher: Any, seed: int) -> Tensor:
    """Noise as strong as the teacher's own signal, with no mean over positions: ``(C, h, w)``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        signal = teacher(held_out(count=32)).spatial
    grid = signal.shape[-2:]
    noise = torch.randn(signal.shape[1], *grid, generator=generator)
    noise = noise - noise.mean((1, 2), keepdim=True)
    return noise * signal.std((0, 2, 3))[:, None, None]


def fixed_pattern(seed: int) -> dict[str, dict[str, float]]:
    """Shift equivariance stops fixed-pattern noise; SE-MESA keeps it out of the backbone."""
    from agglo.config import build

    images = held_out()
    clean = build("teachers", HOG["hog"])
    pattern = pattern_for(clean, seed)
    arms = {
        "one crop for all": [],
        "shifted crops": ["data.views.shift=0.5"],
        "shifted crops, SE-MESA": ["data.views.shift=0.5", "losses.mesa={kind: se_mesa, start: 50, ramp: 50}"],
    }
    result = {}
    for arm, changes in arms.items():
        run = trained(seed, HOG, changes, {"hog": lambda teacher: Patterned(teacher, pattern)})
        normalizer = run.objective.normalizers["hog"]
        target = target_maps(run, images, clean, "hog")
        noise = normalizer.multiply(normalizer.whiten, pattern[None])[0]
        found = student_maps(run, images, "hog")
        residual = (found - target).mean(0)
        residual = residual - residual.mean((1, 2), keepdim=True)
        share = float((residual * noise).sum() / noise.square().sum())
        centred = found - (residual.mean((1, 2), keepdim=True))
        backbone = student_maps(run, images)
        locked = backbone.mean(0) - backbone.mean((0, 2, 3))[:, None, None]
        spread = backbone - backbone.mean((0, 2, 3), keepdim=True)
        result[arm] = {
            "pattern energy in the prediction": share**2,
            "agreement with the clean teacher": explained(centred, target),
            "position-locked energy in the backbone": float(locked.square().mean() / spread.square().mean()),
            "feature change under a shift of one patch": shift_change(run, held_out(SIDE + 16)),
        }
    return result


def shift_change(run: Any, wide: Tensor) -> float:
    """Relative change of the same content's features when the crop moves by one patch."""
    one, other = student_maps(run, wide[..., :SIDE, :SIDE]), student_maps(run, wide[..., 16:, 16:])
    a, b = one[..., 1:, 1:], other[..., :-1, :-1]
    centred = a - a.mean((0, 2, 3), keepdim=True)
    return float((a - b).square().mean() / centred.square().mean())


class Scaled(torch.nn.Module):
    """A teacher in other units."""

    def __init__(self, teacher: Any, factor: float) -> None:
        super().__init__()
        self.teacher, self.spec, self.licence, self.factor = teacher, teacher.spec, teacher.licence, factor
        self.input_size = teacher.input_size

    def forward(self, images: Tensor) -> Any:
        out = self.teacher(images)
        return type(out)(out.summary, out.spatial * self.factor)


def scales(seed: int) -> dict[str, dict[str, float]]:
    """PHI-S: teachers whose scales differ a hundredfold are learned equally well."""
    teachers = {"fine": {"kind": "hog", "cell": 8, "group": 2}, "coarse": {"kind": "hog", "cell": 16, "group": 1}}
    images, result = held_out(), {}
    for arm, changes in {"plain MSE": ["targets.normalizer.kind=identity"], "PHI-S": []}.items():
        run = trained(seed, teachers, changes, {"coarse": lambda teacher: Scaled(teacher, 100.0)})
        shares = {
            name: explained(student_maps(run, images, name), target_maps(run, images, run.teachers[name], name))
            for name in teachers
        }
        result[arm] = {
            "variance explained, teacher of scale 1": shares["fine"],
            "variance explained, teacher of scale 100": shares["coarse"],
            "points between them": 100 * abs(shares["fine"] - shares["coarse"]),
        }
    return result


class Cone(torch.nn.Module):
    """A teacher whose summaries lie in a cone of a given dispersion: its own, turned towards one direction."""

    def __init__(self, teacher: Any, dispersion: float, images: Tensor) -> None:
        super().__init__()
        self.teacher, self.spec, self.licence = teacher, teacher.spec, teacher.licence
        self.input_size = teacher.input_size
        with torch.no_grad():
            summary = teacher(images).summary
        self.register_buffer("mean", summary.mean(0))
        self.register_buffer("std", summary.std(0) + 1e-6)
        generator = torch.Generator().manual_seed(5)
        direction = torch.randn(summary.shape[1], generator=generator)
        self.register_buffer("direction", direction / direction.norm())
        low, high, unit = 0.0, 1e3, (summary - self.mean) / self.std
        for _ in range(60):  # the further along the direction, the narrower the cone
            self.push = (low + high) / 2
            low, high = (self.push, high) if self._dispersion(unit) > dispersion else (low, self.push)

    def _dispersion(self, unit: Tensor) -> float:
        y = unit + self.push * self.direction
        mean = torch.nn.functional.normalize(y.mean(0), dim=0)
        return float(torch.nn.functional.normalize(y, dim=1).matmul(mean).clamp(-1, 1).arccos().square().mean())

    def forward(self, images: Tensor) -> Any:
        out = self.teacher(images)
        return type(out)((out.summary - self.mean) / self.std + self.push * self.direction, None)


def cones(seed: int) -> dict[str, dict[str, float]]:
    """Angular loss with dispersion: teachers with a narrow and a wide cone are learned equally well."""
    images = held_out(64, 96)
    lite = {"kind": "timm", "model": "tf_efficientnet_lite0", "stage": 3, "spatial_weight": 0}
    wanted = {"narrow": 0.7, "wide": 2.1}
    result = {}
    for arm, loss in {
        "cosine": "losses.summary.kind=cosine",
        "angle over dispersion": "losses.summary.kind=angular",
    }.items():
        run = trained(
            seed, dict.fromkeys(wanted, lite), [loss, "partitions=[{sizes: [64], batch: 32}]"],
            {name: lambda teacher, d=d: Cone(teacher, d, images) for name, d in wanted.items()},
        )  # fmt: skip
        errors = {}
        with torch.no_grad():
            features = run.ema.model.encode(images)
            for name, dispersion in wanted.items():
                said = run.ema.model.heads[name](features).summary
                angle = torch.cosine_similarity(said, run.teachers[name](images).summary).clamp(-1, 1).arccos()
                errors[name] = float(angle.square().mean()) / dispersion
        result[arm] = {
            "error over dispersion, narrow cone": errors["narrow"],
            "error over dispersion, wide cone": errors["wide"],
            "ratio": max(errors.values()) / min(errors.values()),
        }
    return result


def windows(seed: int) -> dict[str, dict[str, float]]:
    """ViTDet's windows in training: less is lost when they are switched on at inference."""
    images, result = held_out(128), {}
    deep = ["student.max_grid=8", "student.depth=8", "student.num_global=2", "partitions=[{sizes: [128], batch: 24}]"]
    for arm, changes in {"never in training": [], "in half of the steps": ["train.windows=[2, 4]"]}.items():
        run = trained(seed, HOG, [*deep, *changes])
        target = target_maps(run, images, run.teachers["hog"], "hog")
        with torch.no_grad():
            found = {}
            for window in (0, 2):
                features = run.ema.model.encode(images, window=window)
                found[window] = explained(run.ema.model.heads["hog"](features).spatial, target)
        result[arm] = {
            "agreement, whole image": found[0],
            "agreement, windows of 2": found[2],
            "lost": found[0] - found[2],
        }
    return result


def damp(seed: int) -> dict[str, dict[str, float]]:
    """DAMP: agreement with the teacher's view of the clean image, from images that are corrupted."""
    images, result = held_out(), {}
    for arm, changes in {"without": [], "sigma 0.1": ["train.damp=0.1"], "sigma 0.2": ["train.damp=0.2"]}.items():
        run = trained(seed, HOG, changes)
        target = target_maps(run, images, run.teachers["hog"], "hog")
        shares = {name: explained(student_maps(run, spoil(images), "hog"), target) for name, spoil in SPOIL.items()}
        corrupted = [value for name, value in shares.items() if name != "clean"]
        result[arm] = {
            "agreement, clean": shares["clean"],
            "agreement, mean of corruptions": statistics.mean(corrupted),
        }
    return result


def _blur(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def _noise(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _jpeg(images: Tensor) -> Tensor:
    import io

    from PIL import Image

    from agglo.preprocess import to_tensor

    found = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=10)
        found.append(to_tensor(Image.open(stream)))
    return torch.stack(found)


SPOIL: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda images: images,
    "noise": _noise,
    "blur": _blur,
    "JPEG": _jpeg,
    "contrast": lambda images: 0.5 + 0.4 * (images - 0.5),
}

CLAIMS: dict[str, Callable[[int], dict[str, dict[str, float]]]] = {
    "fixed_pattern": fixed_pattern,
    "scales": scales,
    "cones": cones,
    "windows": windows,
    "damp": damp,
}


# --- the report -------------------------------------------------------------------------------------------------------


def run() -> dict[str, Any]:
    """Every claim over every seed: mean and spread (largest less smallest) of each number."""
    chosen = os.environ.get("CLAIMS", ",".join(CLAIMS)).split(",")
    result: dict[str, Any] = {"seeds": len(SEEDS), "steps": STEPS}
    for name in chosen:
        began = time.perf_counter()
        drawn = [CLAIMS[name](seed) for seed in SEEDS]
        result[name] = {
            arm: {
                metric: {
                    "mean": round(statistics.mean(d[arm][metric] for d in drawn), 5),
                    "spread": round(max(d[arm][metric] for d in drawn) - min(d[arm][metric] for d in drawn), 5),
                }
                for metric in drawn[0][arm]
            }
            for arm in drawn[0]
        }
        result[name]["minutes"] = round((time.perf_counter() - began) / 60, 1)
        print(name, result[name], flush=True)
    write_page(result)
    return result


def write_page(result: dict[str, Any]) -> None:
    """``docs/ablations.md``: a table for each claim."""
    lines = [
        "# Ablations", "",
        f"What each ingredient does, with and without, in one run: small ViTs, {result['steps']} steps, two cores, "
        f"{result['seeds']} seeds (`python benchmarks/run.py ablations`, `benchmarks/results/ablations.json`). Mean "
        "and, in brackets, largest less smallest.",
    ]  # fmt: skip
    for name, make in CLAIMS.items():
        if name not in result:
            continue
        arms = {arm: values for arm, values in result[name].items() if arm != "minutes"}
        lines += ["", f"## {name.replace('_', ' ')}", "", (make.__doc__ or "").strip(), ""]
        lines += ["| | " + " | ".join(arms) + " |", "| --- |" + " --- |" * len(arms)]
        for metric in next(iter(arms.values())):
            cells = [f"{v[metric]['mean']:.4f} ({v[metric]['spread']:.4f})" for v in arms.values()]
            lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    (DOCS / "ablations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
