"""Tables of names and offsets that are built once, kept in the cache folder, and read through memory maps.

A table of ten million entries costs no memory until it is looked at, then the pages that are looked at; all threads
and processes of a machine share those. Tables are written beside their place and renamed, so that a reader never
sees half of one and a crash leaves none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from agglo.sources.base import SourceError

_MAGIC = b"agglo-table-0001"
_PAGE = 1 << 20


def place(what: str, *key: Any) -> Path:
    """Where the table of a thing is kept: in ``$AGGLO_CACHE/indices``, by default below ``~/.cache/agglo``.

    Args:
        what: first part of the file's name, for people.
        key: what the table depends on, JSON-able.
    """
    base = os.environ.get("AGGLO_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "agglo"
    )
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return Path(base) / "indices" / f"{what}-{digest}"


class Table:
    """Names with one or more columns of whole numbers. Picklable: as its path where it is on disk, else as a whole.

    Args:
        text: the names, UTF-8, one after another.
        columns: whole numbers, each column as long as there are names; ``ends`` says where each name ends.
        facts: what the table was made from; JSON-able.
        path: the file it is mapped from.
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
            return _again, (self.path,)
        return Table, (self.text, self.columns, self.facts)


def _again(path: Path) -> Table:
    table = read(path)
    if table is None:
        raise SourceError(f"{path}: this index is gone or damaged; open its source again, which builds it anew")
    return table


class Writer:
    """Collects rows in order; the names go to a temporary file once they are many. To be closed, as a context manager.

    Args:
        columns: names of the columns beside the names' own.
    """

    def __init__(self, *columns: str) -> None:
        self._text = tempfile.SpooledTemporaryFile(max_size=32 * _PAGE)  # noqa: SIM115 (closed on exit)
        self._columns = {"ends": array("Q"), **{name: array("Q") for name in columns}}
        self._end = 0

    def __len__(self) -> int:
        return len(self._columns["ends"])

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._text.close()

    def add(self, name: str, **values: int) -> None:
        """One row."""
        encoded = name.encode("utf-8", "surrogateescape")
        self._text.write(encoded)
        self._end += len(encoded)
        self._columns["ends"].append(self._end)
        for column, value in values.items():
            self._columns[column].append(value)

    def finish(self, facts: dict[str, Any], path: Path | None) -> Table:
        """The table; on disk at ``path``, or in memory where that is None or cannot be written."""
        columns = {name: np.frombuffer(values, np.uint64) for name, values in self._columns.items() if values}
        columns = {name: columns.get(name, np.zeros(0, np.uint64)) for name in self._columns}
        text = self._text
        if path is not None:
            text.seek(0)
            with contextlib.suppress(OSError):  # a full disk or a read-only home: the table serves from memory
                _write(path, iter(lambda: text.read(_PAGE), b""), columns, facts)
                if (table := read(path)) is not None:
                    return table
        text.seek(0)
        return Table(np.frombuffer(text.read(), np.uint8), columns, facts)


def _write(path: Path, text: Iterable[bytes], columns: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Layout: columns, text, JSON, its length (8 bytes), magic. Columns first, so that they are aligned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
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
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def read(path: Path) -> Table | None:
    """The table in a file, mapped; None where there is none, or where it is damaged or of another version."""
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
