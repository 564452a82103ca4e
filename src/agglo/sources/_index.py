"""Tables of names and offsets: built once, kept in the cache folder, read through memory maps.

A mapped table of ten million entries uses memory only for the pages that are read, shared by all threads and
processes of a machine. Tables are written atomically, so that readers never see a partial one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from agglo.files import replacing
from agglo.sources.base import SourceError

_log = logging.getLogger(__name__)
_MAGIC = b"agglo-table-0001"
_PAGE = 1 << 20


def index_path(what: str, *key: Any) -> Path:
    """Path of a table in ``$AGGLO_CACHE/indices``, by default below ``~/.cache/agglo``.

    Args:
        what: readable prefix of the file name.
        key: everything the table depends on; JSON-serialisable.
    """
    base = os.environ.get("AGGLO_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "agglo"
    )
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return Path(base) / "indices" / f"{what}-{digest}"


class Table:
    """Names with one or more integer columns. Pickles as its path if it is on disk, else by value.

    Args:
        text: the concatenated names, UTF-8.
        columns: integer columns, one entry per name; ``ends`` holds the end offset of each name in ``text``.
        facts: what the table was built from; JSON-serialisable.
        path: the mapped file, if any.
    """

    def __init__(
        self, text: np.ndarray, columns: dict[str, np.ndarray], facts: dict[str, Any], path: Path | None = None
    ) -> None:
        self.text, self.columns, self.facts, self.path = text, columns, facts, path

    def __len__(self) -> int:
        return len(self.columns["ends"])

    def name(self, row: int) -> str:
        """The name in a row."""
        ends = self.columns["ends"]
        if row < 0:
            row += len(ends)
        start = int(ends[row - 1]) if row else 0
        return self.text[start : int(ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return open_table, (self.path,)
        return Table, (self.text, self.columns, self.facts)


def open_table(path: Path) -> Table:
    """The table in a file that must exist.

    Raises:
        SourceError: it is absent or damaged.
    """
    table = read(path)
    if table is None:
        raise SourceError(f"{path}: this index is missing or damaged; open the source again to rebuild it")
    return table


class TableWriter:
    """Collects rows in order and spools the names to a temporary file once they are many. A context manager.

    Args:
        columns: names of the integer columns.
    """

    def __init__(self, *columns: str) -> None:
        self._text = tempfile.SpooledTemporaryFile(max_size=32 * _PAGE)  # noqa: SIM115 (closed on exit)
        self._columns = {"ends": array("Q"), **{name: array("Q") for name in columns}}
        self._end = 0

    def __len__(self) -> int:
        return len(self._columns["ends"])

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._text.close()

    def add(self, name: str, **values: int) -> None:
        """Append one row."""
        encoded = name.encode("utf-8", "surrogateescape")
        self._text.write(encoded)
        self._end += len(encoded)
        self._columns["ends"].append(self._end)
        for column, value in values.items():
            self._columns[column].append(value)

    def finish(self, facts: dict[str, Any], path: Path | None) -> Table:
        """The table, on disk at ``path``, or in memory if that is None or not writable."""
        columns = {name: np.frombuffer(values, np.uint64) for name, values in self._columns.items() if values}
        columns = {name: columns.get(name, np.zeros(0, np.uint64)) for name in self._columns}
        text = self._text
        if path is not None:
            text.seek(0)
            with contextlib.suppress(OSError):  # a full disk or a read-only home: fall back to memory
                _write(path, iter(lambda: text.read(_PAGE), b""), columns, facts)
                if (table := read(path)) is not None:
                    return table
        text.seek(0)
        return Table(np.frombuffer(text.read(), np.uint8), columns, facts)


def _write(path: Path, text: Iterable[bytes], columns: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Layout: columns, text, JSON, its length (8 bytes), magic. Columns come first, so that they are aligned."""
    with replacing(path) as partial, partial.open("wb") as file:
        for values in columns.values():
            file.write(values.astype("<u8", copy=False).data)
        start = file.tell()
        for piece in text:
            file.write(piece)
        tail = {"names": list(columns), "rows": len(columns["ends"]), "text": [start, file.tell()], "facts": facts}
        encoded = json.dumps(tail).encode()
        file.write(encoded + len(encoded).to_bytes(8, "little") + _MAGIC)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Table | None:
    """The memory-mapped table in a file; None if it is absent, damaged or of another version."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 24))
            ending = file.read(24)
            if len(ending) < 24 or ending[8:] != _MAGIC:
                return None
            length = int.from_bytes(ending[:8], "little")
            file.seek(size - 24 - length)
            tail = json.loads(file.read(length))
        rows, (start, end) = tail["rows"], tail["text"]
        if start != 8 * rows * len(tail["names"]) or end != size - 24 - length:
            return None
        mapped = np.memmap(path, np.uint8, "r") if end else np.zeros(0, np.uint8)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    columns = {
        name: np.asarray(mapped[8 * rows * k : 8 * rows * (k + 1)]).view("<u8") for k, name in enumerate(tail["names"])
    }
    return Table(np.asarray(mapped[start:end]), columns, tail["facts"], path)


class ProgressCounter:
    """Counts, and shows the count every few seconds: on a terminal in one line that is overwritten, else in the log.

    Args:
        what: the text before the count, e.g. ``"indexing photos"``.
        unit: what is counted.
        total: the expected count, if known.
        every: seconds between two updates.
    """

    def __init__(self, what: str, unit: str, total: int | None = None, every: float = 3.0) -> None:
        self.count = 0
        self._what, self._unit, self._total, self._every = what, unit, total, every
        self._due = time.monotonic() + every
        self._shown = False

    def add(self, count: int = 1) -> None:
        """Count more units."""
        self.count += count
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every
            self._show()

    def done(self) -> None:
        """Show the final count, if any was shown before."""
        if self._shown:
            self._show()
            if sys.stderr.isatty():
                sys.stderr.write("\n")

    def _show(self) -> None:
        self._shown = True
        of = f" of {self._total:,}" if self._total is not None else ""
        line = f"{self._what}: {self.count:,}{of} {self._unit}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{line}")
            sys.stderr.flush()
        else:
            _log.info(line)
