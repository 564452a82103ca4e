"""This build and an earlier one in turns, each with the command line's settings: ``COMMIT=184851b run.py builds``."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import record
import turns

ROOT = Path(__file__).parents[1]
COMMIT = "184851b"
"""The build of 2026-11-28: before freed memory was kept and BatchNorm fused."""


def run() -> dict[str, Any]:
    """Ratios of images per second and of peak memory of inference and of a training step."""
    if not turns.photographs():
        return {"skipped": f"no photographs in {record.SHARED}/data/imagenet_samples"}
    commit = os.environ.get("COMMIT", COMMIT)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "build"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, commit], check=True)
        try:
            arms = {
                "earlier": {"PYTHONPATH": str(tree / "src")},
                "this": {"PYTHONPATH": str(ROOT / "src"), "KEEP_FREED_MEMORY": "1"},
            }
            return {"commit": commit} | {work: turns.compare(work, arms) for work in ("embed", "step")}
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
