"""What every result carries, and where it goes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHARED = Path(os.environ.get("AGGLO_SHARED", Path(__file__).parents[2] / "shared"))


def write(name: str, result: dict[str, Any]) -> None:
    """Print a result and keep it as ``results/<name>.json``, with what is needed to read it later."""
    from agglo.train.folder import versions

    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "versions": versions(),
        "result": result,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(result, indent=2))
