"""Seconds of ``import agglo`` and ``agglo --help``, against a bare interpreter; torch must not be imported."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import agglo": ["-c", "import agglo"],
    "agglo --help": ["-m", "agglo.cli.main", "--help"],
    "import torch": ["-c", "import torch"],
}


def run(repeats: int = 7) -> dict[str, Any]:
    """Interleaved repeats of each command; medians and spreads in seconds."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for arguments in COMMANDS.values():  # warm the file cache
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times[name].append(time.perf_counter() - began)
    return {
        name: {
            "median_s": round(statistics.median(all_), 3),
            "min_s": round(min(all_), 3),
            "max_s": round(max(all_), 3),
        }
        for name, all_ in times.items()
    }
