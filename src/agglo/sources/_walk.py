"""Listing a folder of any size, once.

Names are written in the sorted order of their paths while the tree is walked, so nothing but one folder's own names
is ever held: within a folder, files sort by their names and sub-folders by their names with a ``/`` behind.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agglo.sources._index import Table, Writer, place, read
from agglo.sources._progress import Tally

_log = logging.getLogger(__name__)

KEPT_FROM = 50_000
"""Folders with so many images have their names kept on disk; listing fewer takes no time worth saving."""

_COARSE = 2_000_000_000
"""Nanoseconds below which two changes may carry the same modification time, on the coarsest file systems."""


@dataclass
class Seen:
    """What a walk met.

    Args:
        images: how many, of any share.
        others: other files by ending.
        folders: how many sub-folders.
        stamps: each folder walked, with its modification time before it was listed.
    """

    images: int = 0
    others: Counter[str] = field(default_factory=Counter)
    folders: int = 0
    stamps: list[tuple[str, int]] = field(default_factory=list)


def listing(root: Path, recursive: bool, wanted: set[str], share: tuple[float, float]) -> tuple[Table, Seen | None]:
    """The names of a folder's images, relative to it, with ``/``, sorted; from the cache where that still holds.

    Returns:
        The names, and what the walk met; None instead where no walk was needed.
    """
    kept = place("folder", os.path.realpath(root), recursive, sorted(wanted), list(share))
    table = read(kept)
    if table is not None and _unchanged(root, table):
        return table, None
    began = time.time_ns()
    seen, tally = Seen(), Tally(f"listing {root}", "images")
    with Writer() as writer:
        for name in _walk(root, recursive, wanted, seen):
            tally.add()
            if share == (0.0, 1.0) or share[0] <= _hash(name) < share[1]:
                writer.add(name)
        tally.done()
        facts = {"images": seen.images, "began": began, "stamps": seen.stamps}
        return writer.finish(facts, kept if seen.images >= KEPT_FROM else None), seen


def _unchanged(root: Path, table: Table) -> bool:
    """Whether every folder is as it was when its names were listed, and was old enough then to be sure."""
    newest = table.facts["began"] - _COARSE
    for name, stamp in table.facts["stamps"]:
        try:
            if stamp > newest or os.stat(os.path.join(root, name)).st_mtime_ns != stamp:
                return False
        except OSError:
            return False
    return True


def _walk(root: Path, recursive: bool, wanted: set[str], seen: Seen) -> Iterator[str]:
    visited: set[tuple[int, int]] = set()  # links may form loops, or reach one folder twice
    stack: list[tuple[str, Iterator[str]]] = [("", iter(_entries(root, "", visited, wanted, seen)))]
    while stack:
        prefix, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
        elif entry.endswith("/"):
            if recursive:
                stack.append((prefix + entry, iter(_entries(root, prefix + entry, visited, wanted, seen))))
        else:
            seen.images += 1
            yield prefix + entry


def _entries(root: Path, prefix: str, visited: set[tuple[int, int]], wanted: set[str], seen: Seen) -> list[str]:
    """A folder's images, and its sub-folders with ``/`` behind, sorted so that whole paths come out sorted."""
    here = os.path.join(root, prefix)
    try:
        facts = os.stat(here)
        if (facts.st_dev, facts.st_ino) in visited:
            return []
        visited.add((facts.st_dev, facts.st_ino))
        seen.stamps.append((prefix, facts.st_mtime_ns))
        names: list[str] = []
        with os.scandir(here) as entries:
            for entry in entries:
                ending = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    seen.folders += 1
                    names.append(entry.name + "/")
                elif ending in wanted:
                    names.append(entry.name)
                else:
                    seen.others[ending or "no ending"] += 1
    except OSError as error:
        _log.warning("left out %s: it cannot be listed (%s)", here, error.strerror or error)
        return []
    return sorted(names)


def _hash(name: str) -> float:
    """A name as a number in [0, 1), the same everywhere and for ever."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
