"""The tests themselves: shared fixtures live in tests/support, markers are declared."""

from __future__ import annotations

import ast

from support import source


def test_no_test_file_imports_another():
    stems = {path.stem for path in source.scripts("tests") if path.parent.name != "support"}
    found = []
    for path in source.scripts("tests"):
        for node in ast.walk(source.tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{source.name(path)}:{node.lineno}: {each}" for each in names if each.split(".")[0] in stems]
    assert not found, "put what several test files use into tests/support:\n" + "\n".join(found)


def test_support_stays_small():
    for path in source.scripts("tests"):
        if path.parent.name == "support":
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, source.name(path)
