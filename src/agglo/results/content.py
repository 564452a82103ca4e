"""Hash of files: their whole content where that is cheap; of larger sets names, sizes, times and samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from agglo.sources.base import Source

CHEAP_BYTES = 128 * 2**20
"""Files of at most this total size are hashed by content."""

SAMPLE = 16
"""Number of files of a larger set whose content is hashed too, at most :data:`_PIECE` bytes at three places each."""

_PIECE = 2**20


def feed_files(digest: Any, files: Sequence[Path]) -> None:
    """Add the sizes and the content of files to a hash.

    All content if the files take at most :data:`CHEAP_BYTES` together; else size and modification time of each, and
    pieces of :data:`SAMPLE` of them. A file that cannot be read counts as such.
    """
    facts = [_stat(file) for file in files]
    sizes = [-1 if each is None else each.st_size for each in facts]
    digest.update(repr(sizes).encode())
    if is_cheap(sizes):
        for file in files:
            digest.update(read_or_mark(file))
        return
    digest.update(repr([0 if each is None else each.st_mtime_ns for each in facts]).encode())
    for index in spread(len(files), SAMPLE):
        digest.update(_pieces(files[index], sizes[index]))


def data_files(source: Source) -> list[Path]:
    """The local files that hold the images or annotations of many images: archives, tables, annotation files."""
    found: Callable[[], Iterable[str | Path]] | None = getattr(source, "data_files", None)
    return [Path(file) for file in found()] if callable(found) else []


def is_cheap(sizes: Sequence[int]) -> bool:
    """Whether files of these sizes are hashed by content."""
    return sum(max(0, size) for size in sizes) <= CHEAP_BYTES


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` indices below ``count``, evenly spread."""
    return sorted({i * count // most for i in range(most)}) if count else []


def read_or_mark(file: Path) -> bytes:
    """Hash of a file's content, or a constant if it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return _digest(stream)
    except OSError:
        return b"unreadable"


def _digest(stream: Any) -> bytes:
    found = hashlib.sha256()
    while block := stream.read(_PIECE):
        found.update(block)
    return found.digest()


def _stat(file: Path) -> os.stat_result | None:
    try:
        return os.stat(file)
    except OSError:
        return None


def _pieces(file: Path, size: int) -> bytes:
    try:
        with open(file, "rb") as stream:
            parts = []
            for start in sorted({0, max(0, size // 2), max(0, size - _PIECE)}):
                stream.seek(start)
                parts.append(stream.read(_PIECE))
        return b"".join(parts)
    except OSError:
        return b"unreadable"
