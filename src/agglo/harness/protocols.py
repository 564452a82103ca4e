"""What is to be measured: suites, lists of kinds, and the published protocols, as evals whose every key is known."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from agglo.config import NESTED, find, kinds, nearest, override, read_yaml, schema
from agglo.types import ConfigError

PREFERRED = "preferred"
"""As an eval's ``size``: the model's own preferred side."""

DATA = "AGGLO_DATA"
"""The environment variable that names the folder of data sets, where ``--data`` does not."""


SUITES: dict[str, tuple[dict[str, Any], ...]] = {
    "quick": ({"kind": "knn"}, {"kind": "zero_shot"}, {"kind": "segmentation"}, {"kind": "depth"}),
    "dense": ({"kind": "segmentation"}, {"kind": "depth"}, {"kind": "normals"}, {"kind": "correspondence"}),
    "demo": (
        {"kind": "knn"},
        {"kind": "zero_shot"},
        {"kind": "segmentation"},
        {"kind": "depth"},
        {"kind": "retrieval"},
        {"kind": "agreement"},
    ),
}
"""Named suites: ``quick`` needs no teacher and takes seconds; ``dense`` is about maps; ``demo`` is what the quickstart
reports. ``full`` is every kind that can run without being told where its data lie."""


def suites() -> list[str]:
    """The names of all suites."""
    return [*SUITES, "full"]


def suite(name: str) -> list[dict[str, Any]]:
    """The evals of a suite.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "full":
        return [{"kind": kind} for kind in kinds("evals", installed=False) if _complete(kind)]
    if name not in SUITES:
        raise ConfigError(f"no suite of evals {name!r}{nearest(name, suites())}")
    return [dict(entry) for entry in SUITES[name]]


def _complete(kind: str) -> bool:
    """Whether every key of an eval has a default, and one that names its data: an eval of an outside file has None."""
    fields = schema(find("evals", kind)).model_fields
    return not any(item.is_required() for item in fields.values()) and getattr(find("evals", kind), "bundled", True)


@dataclass(frozen=True, slots=True)
class Protocol:
    """A published way to measure.

    Args:
        name: ``nvidia``, ``siglino``, ``eupe`` or ``probe3d``.
        title: whose it is.
        source: where it is written.
        differs: what our evals do not do as the authors did.
        evals: as in a recipe, each with a ``name``.
    """

    name: str
    title: str
    source: str
    differs: tuple[str, ...]
    evals: tuple[Mapping[str, Any], ...]


@cache
def protocols() -> dict[str, Protocol]:
    """The published protocols by name."""
    path = Path(__file__).with_name("protocols.yaml")
    return {
        name: Protocol(name, each["title"], each["from"], tuple(each["differs"]), tuple(each["evals"]))
        for name, each in read_yaml(path.read_text(encoding="utf-8"), path.name).items()
    }


def protocol(name: str) -> Protocol:
    """The published protocol of a name.

    Raises:
        ConfigError: there is none; the message offers the nearest.
    """
    known = protocols()
    if name not in known:
        raise ConfigError(f"no protocol {name!r}{nearest(name, known)}")
    return known[name]


def plan(
    what: str,
    *,
    published: str | None = None,
    data: str | Path | None = None,
    sizes: Sequence[int] = (),
    changes: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """The evals to run, in order, each with its ``name``.

    Args:
        what: a suite, or kinds with commas between them; of a published protocol the names of those evals of it that
            are wanted, or nothing for all.
        published: a published protocol, instead of a suite.
        data: the folder of data sets: a source without a ``path`` lies in its sub-folder of that kind.
        sizes: run each eval that has a ``size`` at all of these; its results are called ``knn@224``.
        changes: ``name.key=value``; to an eval by its name.

    Raises:
        ConfigError: an unknown name, key or suite.
    """
    named = _of_protocol(published, what) if published else _of_suite(what)
    names = list(named)
    for change in changes:
        if change.partition("=")[0].partition(".")[0] not in named:
            raise ConfigError(f"{change!r}: no eval of that name is to be run; there are: {', '.join(names)}")
    changed = override(named, changes, keep=("kind", "name"))
    entries = [{**changed[name], "name": name} for name in names]
    root = data if data is not None else os.environ.get(DATA)
    entries = [_placed(entry, None if root is None else Path(root)) for entry in entries]
    return [each for entry in entries for each in _sized(entry, sizes)]


def _of_suite(what: str) -> dict[str, Any]:
    known = kinds("evals")
    entries = suite(what) if what in suites() else [{"kind": kind.strip()} for kind in what.split(",")]
    for entry in entries:
        if entry["kind"] not in known:
            raise ConfigError(f"no eval or suite {entry['kind']!r}{nearest(entry['kind'], [*known, *suites()])}")
    return {str(entry.get("name", entry["kind"])): entry for entry in entries}


def _of_protocol(published: str, what: str) -> dict[str, Any]:
    every = {str(entry["name"]): dict(entry) for entry in protocol(published).evals}
    wanted = [name.strip() for name in what.split(",") if name.strip()]
    for name in wanted:
        if name not in every:
            raise ConfigError(f"protocol {published} has no eval {name!r}{nearest(name, every)}")
    return {name: every[name] for name in wanted or every}


def _placed(entry: Mapping[str, Any], root: Path | None) -> dict[str, Any]:
    """An eval whose sources have their place: those that need a ``path`` and have none lie below ``root``."""

    def place(source: Any) -> Any:
        if not isinstance(source, Mapping) or "path" in source or "kind" not in source:
            return source
        field = schema(find("sources", str(source["kind"]))).model_fields.get("path")
        if field is None or not field.is_required():
            return dict(source)
        if root is None:
            raise ConfigError(
                f"{entry['name']} reads {source['kind']}: name the folder that holds it with --data DIR (or {DATA}), "
                f"where it lies as DIR/{source['kind']}"
            )
        return {**source, "path": str(root / str(source["kind"]))}

    placed = dict(entry)
    for key, value in entry.items():
        if NESTED.get(key) == "sources":
            placed[key] = [place(each) for each in value] if isinstance(value, list) else place(value)
    return placed


def _sized(entry: dict[str, Any], sizes: Sequence[int]) -> list[dict[str, Any]]:
    if not sizes or "size" not in schema(find("evals", str(entry["kind"]))).model_fields:
        return [entry]
    return [{**entry, "size": size, "name": f"{entry['name']}@{size}"} for size in sizes]


def resolved(entry: Mapping[str, Any], model: object) -> dict[str, Any]:
    """An eval's options for one model: its preferred side where they say so, and no ``name``."""
    options = {key: value for key, value in entry.items() if key != "name"}
    if options.get("size") == PREFERRED:
        options["size"] = int(getattr(model, "preferred_size", None) or getattr(model, "native", None) or 224)
    return options
