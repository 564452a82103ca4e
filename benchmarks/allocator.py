"""Inference and training with and without the command line's memory settings (``agglo.cli.process``), in turns."""

from __future__ import annotations

from typing import Any

import record
import turns


def run() -> dict[str, Any]:
    """Ratios of images per second and of peak memory: one process with and one without the settings."""
    if not turns.photographs():
        return {"skipped": f"no photographs in {record.SHARED}/data/imagenet_samples"}
    arms = {"plain": {}, "kept": {"KEEP_FREED_MEMORY": "1"}}
    return {work: turns.compare(work, arms) for work in ("embed", "step")}
