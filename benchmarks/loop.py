"""Where the quickstart's training step spends its time: the share outside student and teacher forward and backward."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

INSIDE = ("teachers", "forward", "backward")


def run(steps: int = 30) -> dict[str, Any]:
    """A short quickstart run without head-only steps; the first third, while caches fill, is excluded."""
    from agglo import recipe
    from agglo.training.loop import train_model

    with tempfile.TemporaryDirectory() as folder:
        loaded = recipe.load(
            "quickstart",
            [f"train.steps={steps}", "train.log_every=10", "targets.estimate_images=64", "train.head_steps=0"],
        )
        train_model(loaded, Path(folder) / "run", quiet=True)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds: dict[str, float] = {}
    for line in lines[len(lines) // 3 :]:
        for phase, value in line["seconds"].items():
            if phase != "checkpoint":
                seconds[phase] = seconds.get(phase, 0.0) + value
    total = sum(seconds.values())
    outside = total - sum(seconds.get(phase, 0.0) for phase in INSIDE)
    return {
        "share_by_phase": {phase: round(value / total, 4) for phase, value in seconds.items()},
        "share_outside_student_and_teachers": round(outside / total, 4),
        "images_per_second": [round(line["images_per_second"], 1) for line in lines],
    }
