"""The Python files of the repository, parsed once, and their imports: what the house tests read."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = REPOSITORY / "src" / "agglo"


@cache
def files() -> tuple[Path, ...]:
    """Every Python file of the package."""
    return tuple(sorted(ROOT.rglob("*.py")))


@cache
def scripts(folder: str) -> tuple[Path, ...]:
    """Every Python file in ``benchmarks`` or ``tests``."""
    return tuple(sorted((REPOSITORY / folder).rglob("*.py")))


def name(path: Path) -> str:
    """``training/loop.py`` for a file of the package; else the path in the repository."""
    return path.relative_to(ROOT if path.is_relative_to(ROOT) else REPOSITORY).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    """The file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def modules() -> dict[str, Path]:
    """``agglo.training.loop`` → its file, for every module of the package."""
    return {module_name(path): path for path in files()}


def module_name(path: Path) -> str:
    return ".".join(["agglo", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


@dataclass(frozen=True)
class Import:
    """An import from the package: of a module (``name`` is None), or of a name in it.

    ``alias`` is the expression by which the importing file refers to it.
    """

    module: str
    name: str | None
    alias: str
    line: int


def internal_imports(path: Path) -> Iterator[Import]:
    """Imports from the package, those in functions and under TYPE_CHECKING included."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "agglo":
                    yield Import(alias.name, None, alias.asname or alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "agglo":
            for alias in node.names:
                submodule, local = f"{node.module}.{alias.name}", alias.asname or alias.name
                if submodule in modules():
                    yield Import(submodule, None, local, node.lineno)
                else:
                    yield Import(str(node.module), alias.name, local, node.lineno)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components), each sorted."""
    sys.setrecursionlimit(10_000)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for child in graph.get(node, ()):
            if child not in index:
                visit(child)
                low[node] = min(low[node], low[child])
            elif child in stack:
                low[node] = min(low[node], index[child])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in graph.get(node, ()):
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found
