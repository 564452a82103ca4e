"""One way to do each thing: files are replaced by agglo.files, state is passed as arguments."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from support import source

REPLACES: dict[str, str] = {
    "files.py": "the implementation",
    "training/checkpoint.py": "a checkpoint is a folder, renamed when it is complete",
}
"""Files that may rename or replace a file, and why :func:`agglo.files.replacing` does not fit."""


def replacements(path: Path) -> list[int]:
    """Lines that rename a file: ``os.replace``, ``os.rename``, ``shutil.move`` or a path's own methods.

    ``str.replace`` has two arguments, ``dataclasses.replace`` and ``datetime.replace`` have keywords.
    """
    lines = []
    for node in ast.walk(source.tree(path)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        single = len(node.args) == 1 and not node.keywords
        method = single and (
            node.func.attr == "replace" or re.search(r"(path|file|folder|partial)\w*\.rename$", called)
        )
        if called in ("os.replace", "os.rename", "os.renames", "shutil.move") or method:
            lines.append(node.lineno)
    return lines


def test_files_are_replaced_in_one_place():
    found = [f"{source.name(p)}:{line}" for p in source.files() for line in replacements(p)]
    extra = [place for place in found if place.split(":")[0] not in REPLACES]
    assert not extra, "use agglo.files (replacing, write_text, write_json):\n" + "\n".join(extra)
    assert {place.split(":")[0] for place in found} >= set(REPLACES), "an allowance that is not needed"


def hidden_channels(path: Path) -> list[str]:
    """ContextVars, and classes derived from a built-in mapping."""
    found = []
    for node in ast.walk(source.tree(path)):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
            if bases & {"dict", "UserDict", "OrderedDict", "defaultdict", "ChainMap", "Counter"}:
                found.append(f"{source.name(path)}:{node.lineno}: class {node.name}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split("[")[0].split(".")[-1] == "ContextVar":
            found.append(f"{source.name(path)}:{node.lineno}: ContextVar")
    return found


MODULE_BUFFERS = {
    "checkpoints/radio.py": "sets buffers of a module by name",
    "model/artefact.py": "sets buffers of a module by name",
    "weights/reading.py": "sets parameters and buffers of a module by name",
}
"""Files that set attributes of other objects by name, and why."""


def set_attributes(path: Path) -> list[int]:
    """Lines that call ``setattr`` on another object than ``self``."""
    calls = (node for node in ast.walk(source.tree(path)) if isinstance(node, ast.Call))
    return [
        call.lineno for call in calls if ast.unparse(call.func) == "setattr" and ast.unparse(call.args[0]) != "self"
    ]


def test_no_attributes_of_other_objects_are_replaced():
    found = {source.name(path): set_attributes(path) for path in source.files()}
    files = {name for name, lines in found.items() if lines}
    assert files == set(MODULE_BUFFERS), "pass a function to what calls it, instead of replacing a method"


def test_no_hidden_channels():
    found = [line for path in source.files() for line in hidden_channels(path)]
    assert not found, "pass a plain argument:\n" + "\n".join(found)


def test_the_searches_find_each_form(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "REPOSITORY", tmp_path)
    file = tmp_path / "odd.py"
    file.write_text(
        "import os, shutil\nfrom contextvars import ContextVar\nfrom dataclasses import replace\n"
        "part.replace(path)\nos.replace(a, b)\nshutil.move(a, b)\nfolder.rename(b)\n"
        "text.replace('a', 'b')\nreplace(x, y=1)\nwhen.replace(tzinfo=None)\n"
        "class Store(dict[str, int]): ...\nclass Plain(TypedDict): ...\nx: ContextVar[int] = ContextVar('x')\n"
        "setattr(self, name, 1)\nsetattr(other, 'read', f)\n"
    )
    assert set_attributes(file) == [15]
    assert replacements(file) == [4, 5, 6, 7]
    assert [line.split(": ")[1] for line in hidden_channels(file)] == ["class Store", "ContextVar"]
