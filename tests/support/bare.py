"""Run Python as if no optional package were installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest

BLOCK = """
import json, sys
from importlib.machinery import PathFinder

class InstalledFinder:
    '''The path finder, blind to optional packages: importing one fails as if it were absent, find_spec gives None.'''

    blocked = frozenset(json.loads(sys.argv.pop(1)))
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition('.')[0] in cls.blocked else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = InstalledFinder
"""


def required(package: str) -> set[str]:
    """The distributions that ``pip install package`` brings, without extras; names in lower case with hyphens."""
    markers = pytest.importorskip("packaging.requirements")
    found: set[str] = set()
    queue = [package]
    while queue:
        name = queue.pop().lower().replace("_", "-").replace(".", "-")
        if name in found:
            continue
        found.add(name)
        try:
            stated = [markers.Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # a dependency for another platform
            continue
        queue += [each.name for each in stated if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


@cache
def optional_modules() -> frozenset[str]:
    """The installed top-level modules that a plain ``pip install agglo`` would not bring."""
    try:
        requires("agglo")
    except PackageNotFoundError:
        pytest.skip("agglo is not installed, so its requirements are not known: pip install -e .")
    kept = required("agglo") | {"setuptools", "pip"}
    return frozenset(
        module
        for module, owners in packages_distributions().items()
        if module.isidentifier() and not {owner.lower().replace("_", "-").replace(".", "-") for owner in owners} & kept
    )


def run_bare(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter that finds only what ``pip install agglo`` brings."""
    command = [sys.executable, "-c", BLOCK + code, json.dumps(sorted(optional_modules())), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )
