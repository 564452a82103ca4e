"""Same numerics or an explanation: a small run's losses, step by step, against the committed trace.

A change that moves them writes the trace anew (``AGGLO_WRITE_GOLDEN=1 pytest tests/golden``), and docs/log.md says why.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from agglo import recipe
from agglo.training.loop import train_model

TRACE = Path(__file__).parent / "trace.json"
RECIPE = {
    "name": "golden",
    "claim": {"summary": "a fixed small run"},
    "student": {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8, "registers": 1},
    "teachers": {
        "toy": {"kind": "toy"},
        "hog": {"kind": "hog", "cell": 8, "group": 2, "summary_weight": 0},
    },
    "heads": {"summary": {"kind": "mlp", "hidden": 16}, "spatial": {"kind": "mlp", "hidden": 16}},
    "targets": {"estimate_images": 32},
    "partitions": [{"sizes": [32, 48], "batch": 8}],
    "train": {"steps": 12, "lr": 3e-3, "log_every": 1, "warmup_steps": 3, "clip": 1.0, "ema": 0.9},
}


def test_losses_equal_the_committed_trace(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    generator = torch.Generator().manual_seed(7)
    for index in range(5):
        coarse = torch.rand(1, 3, 5, 5, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, size=(64, 56), mode="bilinear")[0]
        Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(images / f"{index}.png")
    data = {"sources": [{"kind": "folder", "path": str(images)}], "views": {"mixup": 0.5}, "workers": 0}
    train_model(recipe.from_dict({**RECIPE, "data": data}), tmp_path / "run", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trace = [line["terms"] for line in lines]
    if os.environ.get("AGGLO_WRITE_GOLDEN"):
        TRACE.write_text(json.dumps(trace, indent=1) + "\n")
        pytest.fail("the trace was written anew: say in docs/log.md why, and run again")
    for now, then in zip(trace, json.loads(TRACE.read_text()), strict=True):
        assert now == pytest.approx(then, rel=2e-3)
