"""What to measure: suites, lists of kinds and published protocols, as a list of evals with their options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from agglo.config import NESTED, find, kinds, nearest, override, read_yaml, schema
from agglo.types import ConfigError

PREFERRED = "preferred"
"""``size`` of an eval: the model's preferred side."""

SWEPT = "swept"
"""Marks an eval of a sweep over sizes (:func:`plan`): its name ends in its size."""

DATA = "AGGLO_DATA"
"""Environment variable with the folder of data sets; ``--data`` takes precedence."""


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
"""``quick`` needs no teacher; ``dense`` measures maps; ``demo`` is measured by the quickstart. :func:`suite` adds
``full``: every kind that runs on its defaults."""


def suites() -> list[str]:
    """The names of all suites."""
    return [*SUITES, "full"]


def suite(name: str) -> list[dict[str, Any]]:
    """The evals of a suite.

    Raises:
        ConfigError: no suite has that name.
    """
    if name == "full":
        return [{"kind": kind} for kind in kinds("evals", installed=False) if _complete(kind)]
    if name not in SUITES:
        raise ConfigError(f"no suite of evals {name!r}{nearest(name, suites())}")
    return [dict(entry) for entry in SUITES[name]]


def _complete(kind: str) -> bool:
    """Whether an eval runs on its defaults, without outside files."""
    fields = schema(find("evals", kind)).model_fields
    return not any(item.is_required() for item in fields.values()) and getattr(find("evals", kind), "bundled", True)


@dataclass(frozen=True, slots=True)
class Protocol:
    """A published evaluation protocol.

    Args:
        source: the paper or code.
        differs: differences from the authors' procedure.
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
        ConfigError: no protocol has that name.
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
        what: a suite, or kinds separated by commas; with ``published``, names of its evals, empty for all.
        published: a published protocol instead of a suite.
        data: the folder of data sets; a source without a ``path`` is read from ``data/<kind>``.
        sizes: run each eval that has a ``size`` at all of these; its results are named ``knn@224``.
        changes: ``name.key=value``, by the name of an eval.

    Raises:
        ConfigError: an unknown name, key or suite.
    """
    named = _of_protocol(published, what) if published else _of_suite(what)
    names = list(named)
    for change in changes:
        if change.partition("=")[0].partition(".")[0] not in named:
            raise ConfigError(f"{change!r}: no eval of that name is selected; selected: {', '.join(names)}")
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
    """The eval with a ``path`` below ``root`` for each source that needs one and has none."""

    def place(source: Any) -> Any:
        if not isinstance(source, Mapping) or "path" in source or "kind" not in source:
            return source
        field = schema(find("sources", str(source["kind"]))).model_fields.get("path")
        if field is None or not field.is_required():
            return dict(source)
        if root is None:
            raise ConfigError(
                f"{entry['name']} reads {source['kind']}: give the folder of data sets with --data DIR (or {DATA}); "
                f"it is read from DIR/{source['kind']}"
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
    return [{**entry, "size": size, "name": f"{entry['name']}@{size}", SWEPT: True} for size in dict.fromkeys(sizes)]


def snapped(entries: Iterable[Mapping[str, Any]], snap: Callable[[int], int]) -> tuple[list[dict[str, Any]], list[str]]:
    """The evals of a sweep over sizes, at the sides that the model takes; equal ones once.

    Args:
        entries: from :func:`plan`; those without a sweep are returned unchanged.
        snap: the side that the model takes instead of another.

    Returns:
        The evals, and a note for each name that was replaced.
    """
    found: list[dict[str, Any]] = []
    notes = []
    for entry in entries:
        own = {key: value for key, value in entry.items() if key != SWEPT}
        if SWEPT in entry and own.get("aspect") != "keep" and (side := snap(own["size"])) != own["size"]:
            name = f"{own['name'].removesuffix(str(own['size']))}{side}"
            notes.append(f"{own['name']} is {name}: the model takes {side} px instead of {own['size']}")
            own |= {"size": side, "name": name}
        if SWEPT not in entry or own not in found:
            found.append(own)
    return found, notes


def resolved(entry: Mapping[str, Any], model: object) -> dict[str, Any]:
    """An eval's options for one model: ``preferred`` becomes its preferred side; ``name`` is removed."""
    options = {key: value for key, value in entry.items() if key not in ("name", SWEPT)}
    if options.get("size") == PREFERRED:
        options["size"] = int(getattr(model, "preferred_size", None) or getattr(model, "native", None) or 224)
    return options
