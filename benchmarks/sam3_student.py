"""Does a student trained on SAM 3's trunk give SAM 3's masks? Against a tiny SAM 3 with random weights.

``python benchmarks/run.py sam3_student`` trains the recipe ``sam3_trunk`` (mosaics, windows, PHI-S) at toy size for a
growing number of steps, loads the exported model, installs it in the SAM 3 and compares all logits with those of the
SAM 3 itself on held-out photographs: text, box, and text with box.

A query has a mask that is similar for all images, which any features would reproduce. The correlation is therefore that
of deviations: from the logits of each model, their mean over the images is subtracted, query by query and pixel by
pixel. Controls are an untrained student, and SAM 3's own trunk on other images. ``python benchmarks/sam3_student.py
--page`` writes the published numbers into ``docs/guides/sam3.md``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from PIL import Image
from tiny_sam3 import write as write_sam3
from torch import Tensor

from agglo import recipe
from agglo.config import build
from agglo.integrations.sam3 import install, vision_encoder
from agglo.model.model import Model
from agglo.training.loop import train_model

ROOT = Path(__file__).parents[1]
GOAL = 0.9
STEPS = (50, 200, 800, 3200)
PROMPTS: tuple[dict[str, Any], ...] = (
    {"text": "cat"}, {"text": "red shoe"}, {"input_boxes": [[[20.0, 20.0, 80.0, 70.0]]]},
    {"text": "dog", "input_boxes": [[[10.0, 30.0, 60.0, 90.0]]]},
)  # fmt: skip
OUTPUTS = ("pred_masks", "pred_logits", "presence_logits", "semantic_seg")


def overrides(sam3: Path, sources: str, steps: int) -> list[str]:
    """The recipe at toy size: the whole of it, mosaics and windows included, against the tiny SAM 3."""
    return [
        f"teachers.sam3.model={sam3}", "teachers.sam3.dtype=float32",
        "student.width=128", "student.depth=8", "student.heads=4", "student.max_grid=8", "student.registers=2",
        "heads.spatial.hidden=256", "targets.estimate_images=512", f"data.sources={sources}",
        "data.workers=0", "data.cache_mb=512", "data.views.canvas=null", "data.views.shift=0.0",
        "partitions=[{sizes: [64], batch: 32}, {sizes: [128], batch: 16, weight: 3}]",
        f"train.steps={steps}", "train.lr=2.0e-3", f"train.warmup_steps={min(50, steps // 4)}", "train.ema=0.99",
        "train.windows=[2, 4]", "train.precision=fp32", "train.save_every=1000000", "evals=[]",
    ]  # fmt: skip


@torch.inference_mode()
def logits(model: Any, processor: Any, images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """Each output for all images and prompts, ``(images, ...)``."""
    found: dict[str, list[Tensor]] = {name: [] for name in OUTPUTS}
    for prompt in PROMPTS:
        parts = [model(**processor(images=image, return_tensors="pt", **prompt)) for image in images]
        for name in OUTPUTS:
            found[name].append(torch.cat([getattr(each, name).flatten(1) for each in parts]))
    return {name: torch.cat(each, 1).double() for name, each in found.items()}


def correlation(found: Tensor, wanted: Tensor) -> float:
    """Pearson correlation of deviations from the mean over images, of ``(images, numbers)``."""
    a, b = (each - each.mean(0) for each in (found, wanted))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Correlation per output, and their mean."""
    each = {name: round(correlation(found[name], wanted[name]), 4) for name in OUTPUTS}
    return {**each, "mean": round(statistics.fmean(each.values()), 4)}


@torch.inference_mode()
def feature_error(model: Any, stock: Any, processors: tuple[Any, Any], images: Sequence[Image.Image]) -> float:
    """Mean squared error of the installed trunk's features over their variance, in SAM 3's raw space."""
    maps = []
    for sam, processor in zip((model, stock), processors, strict=True):
        pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])
        maps.append(vision_encoder(sam).backbone(pixels).last_hidden_state.double())
    student, teacher = maps
    return float((student - teacher).square().mean() / (teacher - teacher.mean((0, 1))).square().mean())


def measure(folder: Path, student: Model, images: Sequence[Image.Image]) -> dict[str, float]:
    """Correlations of a student in the SAM 3 of a folder with that SAM 3, and the error of its features."""
    from transformers import Sam3Model, Sam3Processor

    stock, processor = Sam3Model.from_pretrained(folder).eval(), Sam3Processor.from_pretrained(folder)
    model, adapted = install(Sam3Model.from_pretrained(folder).eval(), student.eval())
    found = compare(logits(model, adapted, images), logits(stock, processor, images))
    error = feature_error(model, stock, (adapted, processor), images)
    return {**found, "feature_error": round(error, 4)}


def other_images(folder: Path, images: Sequence[Image.Image]) -> dict[str, float]:
    """The control: SAM 3 itself on other images."""
    from transformers import Sam3Model, Sam3Processor

    stock, processor = Sam3Model.from_pretrained(folder).eval(), Sam3Processor.from_pretrained(folder)
    wanted = logits(stock, processor, images)
    return compare({name: each.roll(1, 0) for name, each in wanted.items()}, wanted)


def run(steps: Sequence[int] = STEPS, held_out: int = 48) -> dict[str, Any]:
    """Train with growing numbers of steps, and compare."""
    photographs = record.SHARED / "data" / "imagenet_samples"
    if not photographs.is_dir():
        return {"skipped": f"no photographs in {photographs}; set AGGLO_SHARED"}
    torch.set_num_threads(2)
    kept = {"kind": "folder", "path": str(photographs), "share": [0.5, 1.0]}
    test = build("sources", kept)
    images = [test.read(index) for index in range(min(held_out, len(test)))]
    sources = f"[{{kind: folder, path: {photographs}, share: [0.0, 0.5]}}, {{kind: scenes, split: train}}]"
    result: dict[str, Any] = {"held_out_images": len(images), "goal": GOAL, "by_steps": {}}
    with tempfile.TemporaryDirectory() as home:
        sam3 = write_sam3(Path(home) / "sam3")
        result["sam3_on_other_images"] = other_images(sam3, images)
        for count in steps:
            began = time.perf_counter()
            folder = Path(home) / str(count)
            train_model(recipe.load("sam3_trunk", overrides(sam3, sources, count)), folder, quiet=True)
            seconds = time.perf_counter() - began
            if "untrained" not in result:
                result["untrained"] = measure(sam3, Model.load(folder / "initial"), images)
            row = {**measure(sam3, Model.load(folder / "model"), images), "minutes": round(seconds / 60, 2)}
            result["by_steps"][str(count)] = row
            print(f"{count} steps: {row}", flush=True)
    means = [row["mean"] for row in result["by_steps"].values()]
    result["rises"] = means == sorted(means) and means[0] > result["untrained"]["mean"]
    result["reached"] = max(means) >= GOAL
    return result


def page(result: dict[str, Any]) -> str:
    """Correlations as a Markdown table."""
    rows = {"SAM 3's trunk on other images": result["sam3_on_other_images"], "untrained": result["untrained"]}
    rows |= {f"{steps} steps, {row['minutes']:.1f} min": row for steps, row in result["by_steps"].items()}
    names = ("mean", *OUTPUTS, "feature_error")
    lines = [
        "| student | mean | masks | query scores | presence | semantic map | squared error / variance |",
        f"|---|{'---:|' * len(names)}",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[key]:.2f}' if key in row else '' for key in names)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--page"]:
        written = json.loads((record.RESULTS / "sam3_student.json").read_text())["result"]
        record.fill(ROOT / "docs" / "guides" / "sam3.md", "sam3_student.py", page(written))
    else:
        print(json.dumps(run((20, 60), 8), indent=2))  # a trial; saves nothing
