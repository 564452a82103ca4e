"""Metadata and location of results."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHARED = Path(os.environ.get("AGGLO_SHARED", Path(__file__).parents[2] / "shared"))


def write(name: str, result: dict[str, Any]) -> None:
    """Print a result and save it as ``results/<name>.json`` with versions and hardware."""
    from agglo.files import versions

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


def fill(page: Path, name: str, text: str) -> None:
    """Replace what lies between ``<!-- name -->`` and ``<!-- /name -->`` on a page."""
    before, opened, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    _, closed, after = rest.partition(f"<!-- /{name} -->")
    if not (opened and closed):
        raise SystemExit(f"{page} has no <!-- {name} --> and <!-- /{name} -->")
    page.write_text(f"{before}{opened}\n{text}\n{closed}{after}", encoding="utf-8")


def on_gpu(name: str, about: str | None, run: Callable[[Path, bool], object]) -> None:
    """Command line of a standalone GPU benchmark: ``--smoke`` for toy models, ``--out`` for the file.

    Calls ``run`` with the JSON file to write and whether it is a trial. Default file: ``$OUT/<name>.json`` or
    ``results/<name>.json``; for a trial ``runs/<name>_smoke.json``.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--smoke", action="store_true", help="toy models on any device; writes nothing to results/")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    folder = Path(os.environ["OUT"]) if "OUT" in os.environ else RESULTS
    target = given.out or (Path("runs") / f"{name}_smoke.json" if given.smoke else folder / f"{name}.json")
    run(target, given.smoke)
    print(f"wrote {target}")
