"""Files, functions and the top of the package stay within their budgets."""

from __future__ import annotations

import ast

from support import source

FILE_LINES = 600
FUNCTION_LINES = 60
DEPTH = 2
DEEPER = {"integrations": 3}
"""A room with a folder for each application."""
TOP_FILES = 12
TOP_FOLDERS = 29
BANNED = {"utils", "util", "common", "helpers", "helper", "core", "misc"}

LONGER: dict[str, str] = {}
"""``file::function`` that may be longer than FUNCTION_LINES, and why."""


def functions(tree: ast.AST):
    """Every function with its length in lines without the docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            end = node.end_lineno or node.lineno
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            doc = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
            yield node.name, end - node.lineno + 1 - doc


def test_the_top_of_the_package_is_small():
    top = [p for p in source.ROOT.iterdir() if p.suffix == ".py"]
    rooms = [p for p in source.ROOT.iterdir() if p.is_dir() and p.name not in ("recipes", "assets", "__pycache__")]
    assert len(top) <= TOP_FILES, sorted(p.name for p in top)
    assert len(rooms) <= TOP_FOLDERS, sorted(p.name for p in rooms)


def test_the_package_is_scanned():
    names = {source.name(path) for path in source.files()}
    assert {"__init__.py", "types.py", "config.py", "training/loop.py"} <= names


def test_files_are_short():
    lengths = {source.name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source.files()}
    long = {name: lines for name, lines in lengths.items() if lines > FILE_LINES}
    assert not long, f"more than {FILE_LINES} lines; split by topic: {long}"


def test_functions_are_short():
    long = {
        f"{source.name(path)}::{name}": lines
        for path in source.files()
        for name, lines in functions(source.tree(path))
        if lines > FUNCTION_LINES and f"{source.name(path)}::{name}" not in LONGER
    }
    assert not long, f"longer than {FUNCTION_LINES} lines without docstring: {long}"


def test_no_length_allowance_is_unused():
    known = {f"{source.name(p)}::{name}" for p in source.files() for name, _ in functions(source.tree(p))}
    assert set(LONGER) <= known


def test_tree_is_flat_and_named():
    paths = [path.relative_to(source.ROOT) for path in source.files()]
    deep = [str(path) for path in paths if len(path.parts) > DEEPER.get(path.parts[0], DEPTH)]
    assert not deep, f"deeper than {DEPTH}: {deep}"
    vague = [str(path) for path in paths if {part.removesuffix(".py").strip("_") for part in path.parts} & BANNED]
    assert not vague, f"name these by their topic: {vague}"
