"""Two or more workers that take turns at the same work, so that load and clock rate fall on all of them alike."""

from __future__ import annotations

import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import record

ROUNDS, WARM = 12, 3
IMAGES = 96


def compare(work: str, arms: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Medians and ratios of ``work`` (``embed`` or ``step``): the last arm's speed over the first's.

    Args:
        work: what :func:`main` runs in each worker.
        arms: environment variables of each worker, by name, beside those of this process.
    """
    workers = {name: _start(work, dict(own)) for name, own in arms.items()}
    for worker in workers.values():
        _answer(worker)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    memory: dict[str, float] = {}
    for round_ in range(WARM + ROUNDS):
        for name in list(workers)[:: 1 if round_ % 2 else -1]:
            workers[name].stdin.write(f"{round_}\n")
            workers[name].stdin.flush()
            wall, memory[name] = map(float, _answer(workers[name]).split())
            if round_ >= WARM:
                seconds[name].append(wall)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    first, *_, last = arms
    ratios = [before / after for before, after in zip(seconds[first], seconds[last], strict=True)]
    return {
        "median_seconds": {name: round(statistics.median(each), 4) for name, each in seconds.items()},
        "images_per_second_ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(each, 3) for each in statistics.quantiles(ratios, n=4)],
        "peak_memory_ratio": round(memory[last] / memory[first], 3),
    }


def photographs() -> list[Path]:
    """The photographs that are embedded."""
    return sorted((record.SHARED / "data" / "imagenet_samples").glob("*"))[:IMAGES]


def _start(work: str, environment: dict[str, str]) -> Any:
    return subprocess.Popen(
        [sys.executable, __file__, work],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | environment,
    )


def _answer(worker: Any) -> str:
    """The next answer of a worker; other lines are skipped."""
    while line := worker.stdout.readline():
        if line.startswith("> "):
            return line[2:]
    sys.exit("a worker failed, see above")


def main(work: str) -> None:
    """A worker: one repeat per line of standard input."""
    if os.environ.get("KEEP_FREED_MEMORY"):
        from agglo.cli.process import keep_freed_memory

        if not keep_freed_memory():
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

    model, files = agglo.load("agglo-lite"), photographs()
    return lambda _: agglo.embed(files, model)


def _step() -> Callable[[int], object]:
    import torch

    from agglo import recipe

    # The room was called `train` until 2026-11-30.
    room = "agglo.training" if importlib.util.find_spec("agglo.training") else "agglo.train"
    loop, step = importlib.import_module(f"{room}.loop"), importlib.import_module(f"{room}.step")

    overrides = ["train.steps=1000", "targets.estimate_images=64", "train.head_steps=0", "data.workers=0"]
    folder = Path(tempfile.mkdtemp()) / "run"
    run = loop.prepare(recipe.load("quickstart", overrides), folder, torch.device("cpu"), resume=False)
    folder.mkdir()
    with loop.Progress(folder, 1, quiet=True) as progress:
        loop.start(run, progress, [])
    batches = [run.loader.batch(number) for number in range(6)]

    def once(round_: int) -> None:
        torch.manual_seed(round_)
        step.one_step(run, batches[round_ % 6], step.Stopwatch(run.device))

    return once


if __name__ == "__main__":
    main(sys.argv[1])
