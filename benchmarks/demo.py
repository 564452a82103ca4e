"""The demo as a user runs it after installation: wall time, memory, and gain from training.

The quickstart is trained, measured and reported in a fresh folder; the gains are read from its results.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agglo.results.records import read


def run() -> dict[str, Any]:
    """Minutes, peak memory, and trained against untrained student on every metric."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "quickstart"
        began = time.perf_counter()
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        subprocess.run(
            [sys.executable, "-m", "agglo.cli.main", "train", "quickstart", "--out", str(folder)],
            check=True,
            env=environment,
        )
        minutes = (time.perf_counter() - began) / 60
        results = read(folder)
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        report = (folder / "report.html").stat().st_size
    models: dict[str, dict[str, Any]] = {}
    for result in results:
        models.setdefault(result.model["name"], {})[result.name] = dict(result.metrics)
    better: dict[str, Any] = {}
    for result in results:
        if result.model["role"] != "student":
            continue
        for metric, after in result.metrics.items():
            before = models["untrained"][result.name][metric]
            gain = before - after if metric in result.lower_is_better else after - before
            better[f"{result.name}/{metric}"] = {
                "before": round(before, 4),
                "after": round(after, 4),
                "gain": round(gain, 4),
            }
    return {
        "minutes": round(minutes, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        "training_minutes": round(metrics[-1]["elapsed"] / 60, 2),
        "report_mb": round(report / 1e6, 2),
        "metrics": better,
        "teachers": {name: values for name, values in models.items() if name not in ("student", "untrained")},
    }
