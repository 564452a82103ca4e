"""The tests themselves: shared fixtures live in tests/support, markers are declared."""

from __future__ import annotations

import ast
import re

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


def slow_markers() -> list[str]:
    """The markers that ``make check`` leaves out."""
    found = re.search(r"^SLOW := (.*)$", (source.REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M)
    assert found
    return found.group(1).split(" or ")


def test_make_check_leaves_out_exactly_the_declared_markers(repository):
    settings = (repository / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^markers = \[\n(.*?)^\]", settings, re.M | re.S)
    assert declared
    assert slow_markers() == re.findall(r'^  "(\w+): ', declared.group(1), re.M)


def test_every_declared_marker_is_used():
    texts = "".join(path.read_text(encoding="utf-8") for path in source.scripts("tests"))
    assert [name for name in slow_markers() if f"pytest.mark.{name}" not in texts] == []


def test_ci_runs_the_targets_of_the_makefile(repository):
    """One list of commands: CI and a contributor run the same ones."""
    script = (repository / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"make --no-print-directory ([\w-]+)$", script, re.M) == [
        "setup",
        "lint",
        "test",
        "test-fiftyone",
    ]
    assert not re.search(r"ruff|lint-imports|pyright|pytest", script)
