"""The claims of the C-RADIOv4 recipe, each with and without its ingredient, over several seeds, on two cores.

``python benchmarks/run.py ablations`` trains small ViTs on `scenes` and photographs with offline teachers and writes
``results/ablations.json``, ``docs/ablations.md`` and one figure per claim. Resumable: measurements with the same
settings are reused. ``CLAIMS=fixed_pattern,scales`` runs some of the claims and keeps the published numbers of the
others; ``SEEDS=1 STEPS=3`` is a trial; ``AGAIN=1`` discards earlier measurements; ``WIDTH=768 STEPS=5000`` suits a GPU.
``python benchmarks/ablations.py`` re-evaluates the published numbers and writes the page.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from claims.balance import Cones, Scales
from claims.base import STEPS, WIDTH, Claim
from claims.page import write
from claims.pattern import FixedPattern, SeMesa
from claims.robustness import Damp
from claims.sizes import Cpe, Resolutions, Windows
from claims.tried import NOTES
from claims.whole import Whole

SEEDS = int(os.environ.get("SEEDS", "3"))
CLAIMS: dict[str, Claim] = {
    "fixed_pattern": FixedPattern(),
    "se_mesa": SeMesa(),
    "cones": Cones(),
    "scales": Scales(),
    "resolutions": Resolutions(),
    "damp": Damp(),
    "cpe": Cpe(),
    "windows": Windows(),
    "whole_recipe": Whole(),
}
PUBLISHED = Path(__file__).parent / "results" / "ablations.json"
KEPT = Path(os.environ.get("ABLATIONS", Path(__file__).parents[1] / "runs" / "ablations.json"))
"""Results of every arm and seed so far; the published numbers are computed from it."""


def measured(name: str, arm: str, seed: int, known: dict[str, Any]) -> dict[str, float]:
    """Metrics of an arm for one seed, from earlier results or a new run."""
    key = f"{name} | {arm} | seed {seed} | {STEPS} steps | width {WIDTH}"
    if key not in known:
        began = time.perf_counter()
        numbers = CLAIMS[name].measure(arm, seed)
        known[key] = {"numbers": numbers, "minutes": round((time.perf_counter() - began) / 60, 2)}
        KEPT.parent.mkdir(exist_ok=True)
        half = KEPT.with_suffix(".part")
        half.write_text(json.dumps(known, indent=1), encoding="utf-8")
        half.replace(KEPT)
        print(f"{key}: {known[key]}", flush=True)
    return known[key]["numbers"]


def summarise(name: str, drawn: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Mean, spread (maximum - minimum) and per-seed values of each metric, the verdict, and notes."""
    arms = {
        arm: {
            metric: {
                "mean": round(statistics.mean(d[metric] for d in seeds), 5),
                "spread": round(max(d[metric] for d in seeds) - min(d[metric] for d in seeds), 5),
                "seeds": [round(d[metric], 5) for d in seeds],
            }
            for metric in seeds[0]
        }
        for arm, seeds in drawn.items()
    }
    return judged(name, arms)


def judged(name: str, arms: dict[str, Any]) -> dict[str, Any]:
    """Result entry of a claim."""
    holds, verdict = CLAIMS[name].judge(arms)
    return {"holds": holds, "verdict": verdict, "note": NOTES.get(name), "arms": arms}


def run() -> dict[str, Any]:
    """Run every claim over every seed, and write the page after each claim."""
    fresh = bool(os.environ.get("AGAIN")) or not KEPT.is_file()
    known: dict[str, Any] = {} if fresh else json.loads(KEPT.read_text(encoding="utf-8"))
    chosen = os.environ.get("CLAIMS", ",".join(CLAIMS)).split(",")
    result: dict[str, Any] = {"seeds": SEEDS, "steps": STEPS, "width": WIDTH, "claims": {}}
    if "CLAIMS" in os.environ and PUBLISHED.is_file():
        before = json.loads(PUBLISHED.read_text(encoding="utf-8"))["result"]
        if all(before[key] == result[key] for key in ("seeds", "steps", "width")):
            result["claims"] = {name: before["claims"][name] for name in CLAIMS if name in before["claims"]}
    for name in chosen:
        claim = CLAIMS[name]
        drawn = {arm: [measured(name, arm, seed, known) for seed in range(SEEDS)] for arm in claim.arms}
        result["claims"][name] = summarise(name, drawn)
        print(name, result["claims"][name]["verdict"], flush=True)
        if not os.environ.get("TRIAL"):
            write(result, CLAIMS)
    return result


def page() -> None:
    """Re-evaluate the published numbers and write page and figures, without training."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    result = published["result"]
    for name, entry in result["claims"].items():
        arms = dict(zip(CLAIMS[name].arms, entry["arms"].values(), strict=True))  # under their current names
        result["claims"][name] = judged(name, arms)
    PUBLISHED.write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")
    write(result, CLAIMS)


if __name__ == "__main__":
    page()
