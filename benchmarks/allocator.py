"""Inference and training with and without the command line's memory settings (``agglo.cli.process``), in turns."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record

ROUNDS, WARM = 12, 3
IMAGES = 96


def run() -> dict[str, Any]:
    """Ratios of images per second and of peak memory: one process with and one without the settings, taking turns."""
    photographs = sorted((record.SHARED / "data" / "imagenet_samples").glob("*"))[:IMAGES]
    if not photographs:
        return {"skipped": f"no photographs in {record.SHARED}/data/imagenet_samples"}
    return {work: _compare(work) for work in ("embed", "step")}


def _compare(work: str) -> dict[str, Any]:
    workers = {name: _start(work, name) for name in ("plain", "kept")}
    for worker in workers.values():
        _answer(worker)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    memory: dict[str, float] = {}
    for round_ in range(WARM + ROUNDS):
        for name in sorted(workers, reverse=round_ % 2 == 0):
            workers[name].stdin.write(f"{round_}\n")
            workers[name].stdin.flush()
            wall, memory[name] = map(float, _answer(workers[name]).split())
            if round_ >= WARM:
                seconds[name].append(wall)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    ratios = [plain / kept for plain, kept in zip(seconds["plain"], seconds["kept"], strict=True)]
    return {
        "median_seconds": {name: round(statistics.median(each), 4) for name, each in seconds.items()},
        "images_per_second_ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(each, 3) for each in statistics.quantiles(ratios, n=4)],
        "peak_memory_ratio": round(memory["kept"] / memory["plain"], 3),
    }


def _start(work: str, name: str) -> Any:
    return subprocess.Popen(
        [sys.executable, __file__, work, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _answer(worker: Any) -> str:
    """The next answer of a worker; other lines are skipped."""
    while line := worker.stdout.readline():
        if line.startswith("> "):
            return line[2:]
    sys.exit("a worker failed, see above")


def _worker(work: str, name: str) -> None:
    from agglo.cli.process import keep_freed_memory

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if name == "kept" and not keep_freed_memory():
        sys.exit("the C library is not glibc, or the environment configures malloc")
    once = {"embed": _embed, "step": _step}[work]()
    print("> ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        once(int(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"> {time.perf_counter() - start} {peak}", flush=True)


def _embed() -> Callable[[int], object]:
    import agglo

    model = agglo.load("agglo-lite")
    photographs = sorted((record.SHARED / "data" / "imagenet_samples").glob("*"))[:IMAGES]
    return lambda _: agglo.embed(photographs, model)


def _step() -> Callable[[int], object]:
    import torch

    from agglo import recipe
    from agglo.training import loop
    from agglo.training.step import Stopwatch, one_step

    overrides = ["train.steps=1000", "targets.estimate_images=64", "train.head_steps=0", "data.workers=0"]
    folder = Path(tempfile.mkdtemp()) / "run"
    run = loop.prepare(recipe.load("quickstart", overrides), folder, torch.device("cpu"), resume=False)
    folder.mkdir()
    with loop.Progress(folder, 1, quiet=True) as progress:
        loop.start(run, progress, [])
    batches = [run.loader.batch(step) for step in range(6)]
    return lambda round_: one_step(run, batches[round_ % 6], Stopwatch(run.device))


if __name__ == "__main__":
    _worker(*sys.argv[1:])
