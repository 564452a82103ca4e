"""The layers of docs/all-of-agglo.md, as pyproject.toml states them, hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_import_contracts_hold(repository):
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip('import-linter is not installed: pip install "agglo[dev]"')
    result = subprocess.run([lint, "--no-cache"], cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    assert "1 kept, 0 broken" in result.stdout
