"""The public namespace is small, lazy and complete; importing it is cheap."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import agglo

PUBLIC = {
    "FeatureSpec",
    "Features",
    "Model",
    "Output",
    "Recipe",
    "View",
    "__version__",
    "create",
    "describe",
    "train",
    "embed",
    "evaluate",
    "export",
    "list_models",
    "load",
    "push",
    "segment",
}
"""Adding or removing a name needs an entry in CHANGELOG.md."""


def fresh(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_public_names_are_unchanged():
    assert set(agglo.__all__) == PUBLIC
    assert len(agglo.__all__) == len(set(agglo.__all__)) <= 18
    assert set(dir(agglo)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_found_at_its_home(name):
    value = getattr(agglo, name)
    if name != "__version__":
        home = importlib.import_module(agglo._HOME[name])
        assert value is getattr(home, name)
        assert value.__module__ == home.__name__
        assert value.__doc__


def test_type_checkers_see_the_same_names():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(agglo))
    imported = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: imported.get(name) for name in agglo._HOME} == agglo._HOME


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match=r"'laod'.*load"):
        agglo.laod  # noqa: B018


def test_names_of_earlier_versions_are_found():
    from agglo.model import Model

    assert Model is agglo.Model
    assert agglo.distill is agglo.train
    assert "distill" not in dir(agglo)


@pytest.mark.processes
def test_importing_a_subpackage_does_not_hide_a_public_name():
    """Importing ``agglo.training`` binds that name on the package: no public name may be the name of a module."""
    code = "import agglo.training.run, agglo.evals, agglo; print(callable(agglo.train), callable(agglo.evaluate))"
    result = fresh(code)
    assert result.stdout.split() == ["True", "True"], result.stderr


HEAVY = ("torch", "timm", "transformers", "torchvision", "sklearn", "skimage", "pyarrow", "scipy")


def loaded_after(code: str) -> set[str]:
    result = fresh(
        f"import sys, json\n{code}\nprint('LOADED' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.rsplit("LOADED", 1)[1]))


@pytest.mark.processes
def test_import_agglo_loads_nothing_heavy():
    assert loaded_after("import agglo") == set()
    assert loaded_after("import torch") >= {"torch"}  # the probe itself can see it


HELP = """
sys.argv = ['agglo', '--help']
from agglo.cli.main import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""


@pytest.mark.processes
def test_help_loads_nothing_heavy():
    assert loaded_after(HELP) == set()
