"""Imports follow the layers in pyproject.toml, respect underscores and form no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from support import source


def test_import_contracts_hold(repository):
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip('import-linter is not installed: pip install "agglo[dev]"')
    result = subprocess.run([lint, "--no-cache"], cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    assert "1 kept, 0 broken" in result.stdout


def is_private(word: str | None) -> bool:
    return word is not None and word.startswith("_") and not word.endswith("__")


def room(path: Path) -> str:
    """``training`` for files of that folder, ``recipe`` for the module at the top, none outside the package."""
    return path.relative_to(source.ROOT).with_suffix("").parts[0] if path.is_relative_to(source.ROOT) else ""


def private_uses(path: Path) -> list[str]:
    """Underscore modules and underscore names of other rooms that a file uses."""
    found, bound = [], set()
    for each in source.internal_imports(path):
        parts = each.module.split(".")[1:]
        if parts[:1] == [room(path)]:
            continue
        if any(map(is_private, (*parts, each.name))):
            found.append(
                f"{source.name(path)}:{each.line}: {each.module if each.name is None else f'{each.module}.{each.name}'}"
            )
        if each.name is None:
            bound.add(each.alias)
    return found + [
        f"{source.name(path)}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(source.tree(path))
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in bound
    ]


def test_underscores_stay_in_their_room():
    found = [line for path in (*source.files(), *source.scripts("benchmarks")) for line in private_uses(path)]
    assert not found, "give the shared part a public home lower in the layers:\n" + "\n".join(found)


def test_private_uses_are_found(tmp_path, monkeypatch):
    file = tmp_path / "odd.py"
    file.write_text(
        "from agglo.nn import _x\nfrom agglo.nn.linalg import _root\nimport agglo.nn.linalg as algebra\n"
        "from agglo import dist\n\ndef f():\n    return algebra._root, dist._rank, dist.__name__\n"
    )
    source.REPOSITORY, before = tmp_path, source.REPOSITORY
    try:
        found = private_uses(file)
    finally:
        source.REPOSITORY = before
    assert [line.split(": ")[-1] for line in found] == [
        "agglo.nn._x",
        "agglo.nn.linalg._root",
        "algebra._root",
        "dist._rank",
    ]


def test_no_circle_between_modules():
    """Imports in functions and under TYPE_CHECKING count; ``agglo/__init__.py``, a list of lazy names, does not."""
    graph = {
        module: {each.module for each in source.internal_imports(path)} - {"agglo"}
        for module, path in source.modules().items()
        if module != "agglo"
    }
    found = source.circles(graph)
    assert not found, "pass plain arguments, or define a Protocol in the lower module:\n" + "\n".join(
        " <-> ".join(group) for group in found
    )


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}, "f": {"a"}}
    assert sorted(source.circles(graph)) == [["a", "b", "c"], ["e"]]
    assert source.circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
