"""One step of ``c_radio_v4_h`` on one GPU: the real sizes of student and teachers, random weights, low and high sizes.

``python benchmarks/training_gpu.py`` writes ``$OUT/training_gpu.json``, or ``results/training_gpu.json`` without
``$OUT``; ``--smoke`` runs the recipe's smoke size anywhere. For each size: images per second, peak memory, FLOP/s as a
share of the measured matmul peak (all matrix products, including teachers, EMA student and recomputation), time per
phase, and the most expensive kernels. Rendering of views, on the CPU, is not included. Results are written after every
size, so that an interrupted run keeps them.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from inference_gpu import peak
from torch.utils.flop_counter import FlopCounterMode

BATCHES = {256: 64, 432: 48, 512: 16, 1152: 4}
"""Batch sizes at two sizes of the low partition and two of the high one; halved until they fit."""

GOAL = 0.5
"""Target share of the matmul peak."""


def untrained_upsampler(folder: Path, factor: int, width: int, side: int) -> Path:
    """An untrained FeatSharp with the shapes of SigLIP2-g and statistics of noise."""
    from agglo.types import FeatureSpec
    from agglo.upsamplers.featsharp import FeatSharp

    made = FeatSharp(FeatureSpec(summary=width, spatial=width, stride=16, step=side), (side, side), factor=factor)
    made.normalizer.update(torch.randn(4, width, 24, 24))
    made.normalizer.freeze()
    return made.save(folder / "featsharp")


def recipe_for(folder: Path, sizes: list[int], smoke: bool) -> Any:
    """The recipe's last stage, with all teachers, on noise images."""
    import numpy as np
    from PIL import Image

    from agglo import recipe

    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        side = 128 if smoke else 1600
        coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(images / f"{number}.jpg", quality=95)
    changes = [
        f"data.sources=[{{kind: folder, path: '{images}'}}]", "data.workers=0", "stages=[]", "evals=[]",
        "train.head_steps=0", "losses.mesa.start=0", "losses.mesa.ramp=0", "targets.estimate_images=8",
    ]  # fmt: skip
    if not smoke:
        weights = untrained_upsampler(folder, 3, 1536, 384)
        changes += [f"teachers.{name}.weights=random" for name in ("siglip2-g", "dino_v3", "sam3")]
        changes += [
            f"teachers.siglip2-g.upsampler.weights={weights}",
            "partitions=[" + ", ".join(f"{{sizes: [{size}], batch: {BATCHES[size]}}}" for size in sizes) + "]",
        ]
    return recipe.load("c_radio_v4_h", changes, smoke=smoke)


def assemble(folder: Path, device: torch.device, sizes: list[int], smoke: bool) -> Any:
    """A run after target estimation, and one full-size step of each partition."""
    from agglo.training import loop

    run = loop.prepare(recipe_for(folder, sizes, smoke), folder / "run", device, resume=False)
    (folder / "run").mkdir()
    # Statistics of a few images: only the shapes matter here.
    run.objective.fit(_looks(run))
    run.ema.reset(run.model)
    return run


def _looks(run: Any) -> Iterator[Any]:
    from agglo.data.shifts import RenderedBatch

    seen: set[int] = set()
    step = 1 << 40
    while len(seen) < len(run.recipe.partitions):
        batch = run.loader.batch(step)
        step += 1
        if batch.partition in seen:
            continue
        seen.add(batch.partition)
        yield run.targets(_cut(batch, 4), RenderedBatch(batch.images[:4].to(run.device), batch.field))


def _cut(batch: Any, count: int) -> Any:
    return replace(batch, images=batch.images[:count], views=batch.views[:count], names=batch.names[:count])


def batch_of(run: Any, partition: int) -> Any:
    """The first batch of a partition, reused in every step."""
    from agglo.data.views import draw_resolution

    loader = run.loader
    drawn = (draw_resolution(loader.seed, step, loader.partitions).partition for step in itertools.count())
    step = next(step for step, found in enumerate(drawn) if found == partition)
    return run.loader.batch(step)


@contextmanager
def fitting(device: torch.device) -> Iterator[dict[str, bool]]:
    """Whether the block ran out of device memory."""
    answer = {"fits": True}
    try:
        yield answer
    except torch.OutOfMemoryError:
        answer["fits"] = False
    if device.type == "cuda" and not answer["fits"]:
        torch.cuda.empty_cache()


def measure(run: Any, batch: Any, rate: float, steps: int) -> dict[str, Any]:
    """Seconds, memory, FLOP/s and time per phase for one size; the batch is halved until it fits."""
    while True:
        with fitting(run.device) as answer:
            return {"batch": len(batch.images), "size": max(batch.size), **_measured(run, batch, rate, steps)}
        if not answer["fits"] and len(batch.images) == 1:
            return {"batch": 1, "size": max(batch.size), "fits": False}
        run.optimizer.zero_grad(set_to_none=True)
        batch = _cut(batch, len(batch.images) // 2)


def _measured(run: Any, batch: Any, rate: float, steps: int) -> dict[str, Any]:
    from agglo.training.step import Stopwatch

    cuda = run.device.type == "cuda"

    def step(watch: Stopwatch) -> Any:
        run.damp.set_step(batch.step)
        taken = _one(run, batch, watch)
        run.ema.update(run.model, batch.step)
        watch.lap("average")
        return taken

    with FlopCounterMode(display=False) as counter:
        step(Stopwatch(run.device))
    work = float(counter.get_total_flops())
    step(Stopwatch(run.device))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    took, phases = [], []
    for _ in range(steps):
        watch = Stopwatch(run.device)
        began = time.perf_counter()
        taken = step(watch)
        if not bool(taken.good):
            raise RuntimeError("a step was skipped, so its time is meaningless")
        took.append(time.perf_counter() - began)  # reading `good` synchronised the device
        phases.append(watch.take())
    seconds = statistics.median(took)
    share = {name: statistics.median(p[name] for p in phases) for name in phases[0]}
    return {
        "seconds": round(seconds, 4),
        "spread": [round(min(took), 4), round(max(took), 4)],
        "images_per_s": round(len(batch.images) / seconds, 2),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "tflop_per_step": round(work / 1e12, 3),
        "share_of_peak": round(work / seconds / rate, 4),
        "share_of_time": {name: round(value / sum(share.values()), 4) for name, value in share.items()},
        "kernels": _kernels(run, step, cuda),
    }


def _one(run: Any, batch: Any, watch: Any) -> Any:
    from agglo.training.step import one_step

    torch.manual_seed(batch.step)
    return one_step(run, batch, watch)


def _kernels(run: Any, step: Any, cuda: bool) -> list[dict[str, Any]]:
    """The most expensive kernels of one step, and their shares."""
    from torch.profiler import ProfilerActivity, profile

    from agglo.training.step import Stopwatch

    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as seen:
        step(Stopwatch(run.device))
        if cuda:
            torch.cuda.synchronize()
    spent = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in seen.key_averages()
    }
    total = sum(spent.values()) or 1.0
    first = sorted(spent, key=lambda name: -spent[name])[:15]
    return [{"kernel": name[:120], "share": round(spent[name] / total, 4)} for name in first]


def run(path: Path, smoke: bool = False) -> dict[str, Any]:
    """All sizes, smallest first; the file is written after each."""
    from agglo.files import versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not smoke:
        raise SystemExit("no GPU found; use --smoke for the recipe's smoke size on the CPU")
    result: dict[str, Any] = {"benchmark": "training_gpu", "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result["goal_share_of_peak"] = GOAL

    def keep(question: str, answer: Any) -> Any:
        result[question] = answer
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        return answer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = keep("peak", peak(device, dtype, (256,) if smoke else (4096, 8192, 16384)))["flop_per_s"]
    print(f"peak {rate / 1e12:.4g} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as home:
        run = assemble(Path(home), device, list(BATCHES), smoke)
        found: dict[str, Any] = {}
        for partition, entry in enumerate(run.recipe.partitions):
            row = measure(run, batch_of(run, partition), rate, 2 if smoke else 5)
            found[f"{entry.sizes[0]} px"] = row
            keep("steps", found)
            print({key: value for key, value in row.items() if key != "kernels"}, flush=True)
    return result


if __name__ == "__main__":
    record.on_gpu("training_gpu", __doc__, run)
