"""Cost of each ingredient of the recipe per training step, with the same student and teachers in one process.

An arm is one step (teachers, student, heads, losses, backward, AdamW, EMA) of a ViT-S/16 at 224 pixels with a batch of
16 and two teachers, HOG and EfficientNet-Lite0; arms alternate. Images come from memory, so rendering the margin of
shifted views is not included. Ratios are medians of per-round ratios, of wall-clock time and of the CPU time of all
threads, which other processes disturb less.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

THREADS = 2
SIZE = 224
BATCH = 16

RECIPE: dict[str, Any] = {
    "name": "step_cost",
    "claim": {"summary": "one step"},
    "student": {"kind": "vit", "width": 384, "depth": 12, "heads": 6, "registers": 4},
    "teachers": {
        "hog": {"kind": "hog", "summary_weight": 0},
        "lite0": {"kind": "timm", "model": "tf_efficientnet_lite0", "weights": "bundled"},
    },
    "heads": {"summary": {"kind": "mlp", "hidden": 384}, "spatial": {"kind": "mlp", "hidden": 384}},
    "targets": {"normalizer": {"kind": "identity"}, "estimate_images": 64},
    "losses": {"summary": {"kind": "cosine"}, "spatial": {"kind": "mse"}},
    "partitions": [{"sizes": [SIZE], "batch": BATCH}],
    "train": {"steps": 1000, "ema": 0.9996},
}

WHOLE = ("targets.normalizer.kind=phi_s", "losses.summary.kind=angular", "data.views.shift=0.5")
ARMS: dict[str, tuple[str, ...]] = {
    "bare": (),
    "recipe": WHOLE,
    "damp": (*WHOLE, "train.damp=0.1"),
    "mesa": (*WHOLE, "losses.mesa={kind: se_mesa}"),
}
"""``bare``: cosine and MSE on one crop, raw targets; ``recipe``: shifts, PHI-S and angular; then one more each."""


class Span(NamedTuple):
    """Wall-clock seconds, and CPU seconds of all threads."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Span:
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Span) -> Span:
        return Span(self.wall - other.wall, self.processor - other.processor)


def prepare(arm: tuple[str, ...], folder: Path) -> tuple[Any, list[Any]]:
    """A run after target estimation, and a few batches."""
    import torch

    from agglo.config import override
    from agglo.recipe import from_dict
    from agglo.training import loop

    tree = {**RECIPE, "data": {"sources": [{"kind": "photos"}], "workers": 0}}
    run = loop.prepare(from_dict(override(tree, arm)), folder, torch.device("cpu"), resume=False)
    folder.mkdir()
    with loop.Progress(folder, 1, quiet=True) as progress:
        loop.start(run, progress, [])
    return run, [run.loader.batch(step) for step in range(3)]


def take(run: Any, batch: Any) -> Span:
    """One step of the loop, without the loader."""
    import torch

    from agglo.training.step import Stopwatch, one_step

    began = Span.now()
    torch.manual_seed(batch.step)
    if run.damp is not None:
        run.damp.set_step(batch.step)
    taken = one_step(run, batch, Stopwatch())
    run.ema.update(run.model, batch.step)
    if not bool(taken.good):
        raise RuntimeError("a step was skipped, so its time is meaningless")
    return Span.now() - began


def encode(run: Any, batch: Any, *, training: bool) -> Span:
    """A forward pass on one view, of the student in training or of the EMA student."""
    import torch

    from agglo.data.shifts import RenderedBatch

    canvas = RenderedBatch(batch.images, batch.field)
    view, _ = canvas.crop(batch.size, run.model.spec.stride, torch.zeros(len(batch.images), 2, dtype=torch.long))
    model = run.model if training else run.ema.model
    with torch.set_grad_enabled(training):
        began = Span.now()
        features = model.encode(view)
        span = Span.now() - began
    del features
    return span


def run(rounds: int = 12) -> dict[str, Any]:
    """All arms, alternating, after a warm-up round."""
    import torch

    torch.set_num_threads(THREADS)
    load = os.getloadavg()[0]
    spans: list[dict[str, Span]] = []
    with tempfile.TemporaryDirectory() as folder:
        made = {name: prepare(arm, Path(folder) / name) for name, arm in ARMS.items()}
        for index in range(rounds + 1):
            # Reverse every other round: the first arm finds other caches.
            order = list(made) if index % 2 else list(reversed(made))
            times = {name: take(made[name][0], made[name][1][index % 3]) for name in order}
            student, batches = made["mesa"]
            times["student_forward"] = encode(student, batches[index % 3], training=True)
            times["average_forward"] = encode(student, batches[index % 3], training=False)
            spans += [times] if index else []
    return {
        "setting": f"ViT-S/16, {SIZE} px, batch {BATCH}, hog + tf_efficientnet_lite0, fp32, {THREADS} threads",
        "rounds": rounds,
        "load_at_start": round(load, 2),
        "load_at_end": round(os.getloadavg()[0], 2),
        "goals": {
            "recipe_over_bare": "at most 1.05",
            "damp_over_recipe": "at most 1.08",
            "mesa_in_student_forwards": "at most 1",
        },
        **{clock: _ratios(spans, clock) for clock in Span._fields},
    }


def _ratios(spans: list[dict[str, Span]], clock: str) -> dict[str, Any]:
    """Ratios of the goals by one clock, and their seconds."""
    seconds = {name: [getattr(times[name], clock) for times in spans] for name in spans[0]}

    def over(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]

    extra = zip(seconds["mesa"], seconds["recipe"], seconds["student_forward"], strict=True)
    found = {
        "recipe_over_bare": over("recipe", "bare"),
        "damp_over_recipe": over("damp", "recipe"),
        "mesa_over_recipe": over("mesa", "recipe"),
        "mesa_in_student_forwards": [(mesa - recipe) / forward for mesa, recipe, forward in extra],
    }
    return {
        "median": {name: round(statistics.median(values), 3) for name, values in found.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in found.items()},
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
    }


if __name__ == "__main__":
    import json

    print(json.dumps(run(), indent=1))
