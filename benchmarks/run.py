"""Run the benchmarks: ``python benchmarks/run.py [name ...]``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

NAMES = (
    "startup", "inference", "loading", "loop", "allocator", "builds", "step_cost", "cache", "data",
    "imagenet", "dense", "evals", "open_vocabulary", "ablations", "featsharp", "sam3_student", "sam3_latency", "demo",
)  # fmt: skip


def main() -> None:
    """Run the named benchmarks, or all, and save each result."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as on the command line: loader and kernels share the cores
    sys.path.insert(0, str(Path(__file__).parent))
    import record

    names = sys.argv[1:] or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"no benchmark {', '.join(unknown)}; choose from: {', '.join(NAMES)}")
    for name in names:
        print(f"== {name}", flush=True)
        record.write(name, importlib.import_module(name).run())


if __name__ == "__main__":
    main()
