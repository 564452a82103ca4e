"""FeatSharp on an offline teacher: error against the teacher's finer maps, and the remaining fixed pattern.

The teacher is EfficientNet-Lite0 at 128 pixels; as a convnet it also gives reference features at 256 and 384 pixels.
Its features are hardly position-locked, so a second set of runs adds a pattern as strong as its signal to every image.
``python benchmarks/run.py featsharp`` trains five upsamplers, a few minutes each on one thread, and draws
``docs/figures/featsharp_*.png``. ``STEPS=3`` is a trial.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 128
COUNT = 64
STEPS = int(os.environ.get("STEPS", "250"))
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
WITHOUT_BIAS = "FeatSharp, its learned map b left out"
SHOWN = ("photos/coffee", "photos/chelsea", "photos/motorcycle_left")

ARMS: dict[str, dict[str, Any]] = {
    "x2": {"factor": 2, "pattern": False, "set": []},
    "x2, fixed pattern": {"factor": 2, "pattern": True, "set": []},
    "x3": {"factor": 3, "pattern": False, "set": []},
    "x3, fixed pattern": {"factor": 3, "pattern": True, "set": []},
    "x2, views at the teacher's own scale": {"factor": 2, "pattern": False, "set": ["objective.zoom=[0.95, 1.0526]"]},
}


class Patterned(torch.nn.Module):
    """A teacher whose map carries the same noise at the same positions, for every image."""

    def __init__(self, teacher: Any, pattern: Tensor) -> None:
        super().__init__()
        self.teacher, self.spec, self.pattern = teacher, teacher.spec, pattern

    def forward(self, images: Tensor) -> Any:
        out = self.teacher(images)
        return type(out)(out.summary, out.spatial + self.pattern)


def held_out(factor: int) -> tuple[Tensor, list[str]]:
    """Held-out photographs: the `heldout` split of `photos`, and ImageNet samples if available."""
    from agglo.config import build
    from agglo.data.loader import evaluation_batches

    sources = [build("sources", {"kind": "photos", "split": "heldout"})]
    if (record.SHARED / "data" / "imagenet_samples").is_dir():
        sources.append(build("sources", {"kind": "folder", "path": str(record.SHARED / "data" / "imagenet_samples")}))
    images, names = [], []
    for source in sources:
        for batch in evaluation_batches(source, SIDE * factor, 8):
            images.append(batch.images)
            names += [source.name(index) for index in batch.indices]
            if len(names) >= COUNT:
                break
    return torch.cat(images)[:COUNT], names[:COUNT]


@torch.no_grad()
def maps(encode: Any, images: Tensor) -> Tensor:
    """``encode(images).spatial``, in small batches."""
    return torch.cat([encode(part).spatial for part in images.split(8)])


@torch.no_grad()
def pattern_for(teacher: Any, images: Tensor) -> Tensor:
    """Noise as strong as the teacher's signal, zero-mean over positions: ``(C, h, w)``."""
    from agglo.preprocess import resize

    signal = maps(teacher, resize(images, (SIDE, SIDE)))
    noise = torch.randn(signal.shape[1:], generator=torch.Generator().manual_seed(3))
    return (noise - noise.mean((1, 2), keepdim=True)) * signal.std((0, 2, 3))[:, None, None]


def trained(arm: dict[str, Any], pattern: Tensor | None) -> tuple[Any, Any, float]:
    """The EMA upsampler of a training run, its teacher, and the duration in minutes."""
    from agglo import recipe
    from agglo.training import loop

    size = SIDE * arm["factor"]
    loaded = recipe.load(
        "featsharp_quick",
        [
            f"train.steps={STEPS}",
            f"teachers.lite0.upsampler.factor={arm['factor']}",
            f"partitions.0.sizes=[{size}]",
            f"objective.zoom=[{0.75 * arm['factor']}, {1.05 * arm['factor']}]",
            *arm["set"],
        ],
    )
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        folder.mkdir()
        run = loop.prepare(loaded, folder, torch.device("cpu"), resume=False)
        if pattern is not None:
            patterned: dict[str, Any] = {name: Patterned(each, pattern) for name, each in run.teachers.items()}
            run.teachers = patterned
        began = time.perf_counter()
        with loop.Progress(folder, STEPS, quiet=True) as progress:
            loop.start(run, progress, [])
            loop.train_steps(run, progress, [])
        minutes = (time.perf_counter() - began) / 60
    run.ema.model.eval()
    return run.ema.model, run.teachers["lite0"], minutes


def measure(found: Tensor, wanted: Tensor, factor: int, pattern: Tensor | None) -> dict[str, float]:
    """Error against the clean teacher's finer map: total, position-locked, and at seams."""
    error = found - wanted
    locked = error.mean(0)
    locked = locked - locked.mean((1, 2), keepdim=True)
    index = torch.arange(wanted.shape[-1]) % (wanted.shape[-1] // factor)
    border = (index == 0) | (index == index.max())
    border[0] = border[-1] = False  # the image border is not a seam
    squared, inner = error.square().mean((0, 1)), slice(factor, -factor)
    seam = border[:, None] | border[None]
    result = {
        "mse": float(error.square().mean()),
        "mse away from the image's border": float(squared[inner, inner].mean()),
        "position-locked energy of the error": float(locked.square().mean()),
        "position-locked energy away from the image's border": float(locked[:, inner, inner].square().mean()),
        "error at seams over elsewhere": float(squared[seam].mean() / squared[~seam].mean()),
    }
    if pattern is not None:
        # The pattern may appear once, as large as the image, and once per tile.
        once = F.interpolate(pattern[None], locked.shape[-2:], mode="bilinear")[0]
        both = torch.stack([once.flatten(), pattern.repeat(1, factor, factor).flatten()], 1)
        shares = torch.linalg.lstsq(both, locked.flatten()[:, None]).solution.flatten()
        result |= {"pattern, as large as the image": float(shares[0]), "pattern, once a tile": float(shares[1])}
    return {key: round(value, 4) for key, value in result.items()}


def show(name: str, images: Tensor, names: list[str], found: dict[str, Tensor]) -> None:
    """``docs/figures/featsharp_<name>.png``: photographs and their maps, one PCA basis per photograph."""
    from PIL import Image

    from agglo.report.picture import pca_basis, pca_picture, side_by_side, stacked

    rows = []
    for photo in SHOWN:
        place = names.index(photo)
        pixels = (images[place] * 255).byte().permute(1, 2, 0).numpy()
        basis = pca_basis([found["teacher"][place]])
        size = (192, 192)
        pictures = [Image.fromarray(pixels).resize(size)]
        pictures += [pca_picture(each[place], basis, size, smooth=False) for each in found.values()]
        rows.append(side_by_side(pictures, ["image", *found] if photo == SHOWN[-1] else ()))
    FIGURES.mkdir(exist_ok=True)
    stacked(rows).save(FIGURES / f"featsharp_{name}.png", optimize=True)


def run() -> dict[str, Any]:
    """Every arm: bilinear, tiles, FeatSharp before and after training."""
    from agglo.config import build

    torch.set_num_threads(1)
    clean = build("teachers", {"kind": "timm", "model": "tf_efficientnet_lite0", "size": SIDE, "summary": False})
    result: dict[str, Any] = {"steps": STEPS, "side": SIDE, "threads": torch.get_num_threads()}
    for name, arm in ARMS.items():
        factor, size = arm["factor"], (SIDE, SIDE)
        images, names = held_out(factor)
        result["photographs"] = len(images)
        wanted = maps(clean, images)
        pattern = pattern_for(clean, images) if arm["pattern"] else None
        upsampler, teacher, minutes = trained(arm, pattern)
        start = build("upsamplers", {"kind": "featsharp", "factor": factor}, clean.spec, size)
        start.normalizer.load_state_dict(upsampler.normalizer.state_dict())
        kinds = {kind: build("upsamplers", {"kind": kind, "factor": factor}, clean.spec, size)
                 for kind in ("bilinear", "tiles")}  # fmt: skip
        unbiased = copy.deepcopy(upsampler)
        torch.nn.init.zeros_(unbiased.bias)
        kinds |= {"FeatSharp before its first step": start.eval(), "FeatSharp": upsampler, WITHOUT_BIAS: unbiased}
        found = {kind: maps(partial(up, teacher), images) for kind, up in kinds.items()}
        rows = {kind: measure(each, wanted, factor, pattern) for kind, each in found.items()}
        for row in rows.values():
            for key in [key for key in row if key.startswith(("mse", "position-locked"))]:
                row[f"{key}, over bilinear's"] = round(row[key] / rows["bilinear"][key], 4)
        result[name] = {"minutes": round(minutes, 1), "variance of the teacher": round(float(wanted.var(0).mean()), 3)}
        result[name] |= rows
        print(name, result[name], flush=True)
        shown = {"teacher": wanted, **{kind: found[kind] for kind in ("bilinear", "tiles", "FeatSharp")}}
        if "scale" not in name:
            show(name.replace(", ", "_").replace(" ", "_"), images, names, shown)
    return result
