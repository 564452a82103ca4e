"""A tiny recipe, the images it trains on, and readers of what a run writes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from agglo import recipe
from agglo.config import override
from agglo.model.model import Model
from agglo.training import loop
from agglo.training.loop import Progress, Run

TINY = {
    "name": "tiny",
    "claim": {"summary": "a test"},
    "student": {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8, "registers": 1},
    "teachers": {
        "toy": {"kind": "toy"},
        "other": {"kind": "toy", "seed": 1, "channels": 8, "stride": 8, "summary": 5},
        "dense": {"kind": "toy", "seed": 2, "summary_weight": 0},
    },
    "heads": {"summary": {"kind": "mlp", "hidden": 16}, "spatial": {"kind": "mlp", "hidden": 16}},
    "targets": {"normalizer": {"kind": "phi_s"}, "estimate_images": 16},
    "partitions": [{"sizes": [32, 48], "batch": 4}, {"sizes": [64], "batch": 2, "weight": 0.3}],
    "train": {"steps": 6, "lr": 3e-3, "ema": 0.9, "log_every": 1, "save_every": 3, "clip": 1.0},
}


COMMAND_RECIPE = """
name: tiny
claim: {{summary: a short claim, time: a second}}
student: {{kind: vit, width: 32, depth: 1, heads: 2, max_grid: 8, registers: 0}}
teachers: {{toy: {{kind: toy}}}}
heads: {{summary: {{kind: mlp, hidden: 16}}, spatial: {{kind: mlp, hidden: 16}}}}
targets: {{normalizer: {{kind: identity}}, estimate_images: 8}}
losses: {{summary: {{kind: cosine}}}}
data: {{sources: [{{kind: folder, path: {folder}}}], workers: 0}}
partitions: [{{sizes: [32], batch: 4}}]
train: {{steps: 2, ema: 0.5}}
"""
"""A recipe file for tests of the commands; ``format`` it with ``folder``, the images."""


def picture(path: Path, generator: torch.Generator) -> None:
    """One file of 80x72 pixels (HxW)."""
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(80, 72), mode="bicubic").clamp(0, 1)[0]
    Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(path)


def write_images(folder: Path, count: int = 6) -> Path:
    """``count`` of them, ``0.png`` and on, in a new folder."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        picture(folder / f"{index}.png", generator)
    return folder


def tiny(data: Path, *overrides: str) -> recipe.Recipe:
    tree = {**TINY, "data": {"sources": [{"kind": "folder", "path": str(data)}], "workers": 0}}
    return recipe.from_dict(override(tree, overrides))


def trace(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Model.load(folder / "model").state_dict()


def started(data: Path, folder: Path, *overrides: str) -> Run:
    """A run whose statistics are fitted, before its first step."""
    run = loop.prepare(tiny(data, *overrides), folder / "run", torch.device("cpu"), resume=False)
    run.folder.mkdir(exist_ok=True)
    with Progress(folder, 1, quiet=True) as progress:
        loop.start(run, progress, [])
    return run


@contextmanager
def interrupted_in(step: int) -> Iterator[None]:
    """Send this process SIGINT in a step of the training loop."""
    real = loop.one_step

    def interrupting(run, batch, watch):
        if batch.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, batch, watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "one_step", interrupting)
        yield
