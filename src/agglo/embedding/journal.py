"""Rows that are computed once: in memory, or in an append-only file that survives a kill and a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agglo.sources.base import Source
from agglo.types import ConfigError, StorageError


class Rows:
    """Rows in memory, by index of the image.

    Args:
        source: the images.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._rows: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    def indices(self) -> list[int]:
        """Indices of the images that have a row, ascending."""
        return sorted(self._rows)

    def append(self, indices: Sequence[int], rows: np.ndarray) -> None:
        """Add the rows ``(B, W)`` float32 of a batch."""
        self._rows |= dict(zip(indices, rows, strict=True))

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Rows ``(N, W)`` float32 of some images."""
        return np.stack([self._rows[index] for index in indices])

    def close(self) -> None:
        """Release files."""


class Journal(Rows):
    """Rows in an append-only file: one JSON line of facts per batch, then the rows as float32.

    Memory holds one offset per image. The file is continued if it has the same facts; rows of files that changed since
    are computed again, and a last batch that was cut off is removed.

    Args:
        source: the images.
        path: of the file.
        facts: what the rows depend on (model, size, head); JSON values.
        overwrite: discard a file with other facts instead of raising.

    Raises:
        ConfigError: the file has other facts, which are named, or is not a journal.
        StorageError: it cannot be written.
    """

    def __init__(self, source: Source, path: Path, facts: Mapping[str, Any], *, overwrite: bool = False) -> None:
        super().__init__(source)
        self.path = path
        self._first = {"format": 2, **facts}
        self._where = np.full(len(source), -1, np.int64)
        self._width = 0
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.path.exists() else "w+b")
            try:
                self._open(overwrite)
            except BaseException:
                self._file.close()
                raise

    def __len__(self) -> int:
        return int((self._where >= 0).sum())

    def __contains__(self, index: int) -> bool:
        return bool(self._where[index] >= 0)

    def indices(self) -> list[int]:
        return np.flatnonzero(self._where >= 0).tolist()

    def append(self, indices: Sequence[int], rows: np.ndarray) -> None:
        body = np.ascontiguousarray(rows, np.float32).tobytes()
        facts = {
            "images": [(self.source.name(index), _stamp(self.source, index)) for index in indices],
            "width": rows.shape[1],
            "crc": zlib.crc32(body),
        }
        with self._writing():
            start = self._file.seek(0, os.SEEK_END)
            line = json.dumps(facts).encode() + b"\n"
            self._file.write(line + body)
            self._file.flush()
        self._width = rows.shape[1]
        self._where[indices] = start + len(line) + 4 * self._width * np.arange(len(indices))

    def read(self, indices: Sequence[int]) -> np.ndarray:
        found = np.empty((len(indices), self._width), np.float32)
        for row, index in enumerate(indices):
            self._file.seek(int(self._where[index]))
            found[row] = np.frombuffer(self._file.read(4 * self._width), np.float32)
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def _open(self, overwrite: bool) -> None:
        """Find the rows in the file, remove what was cut off, or begin it."""
        first = self._file.readline()
        found = None
        with contextlib.suppress(ValueError):
            found = json.loads(first)
        if first.endswith(b"\n") and found == self._first:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._scan()
            return
        if first.endswith(b"\n") and not overwrite:  # without a newline: killed while the first line was written
            raise ConfigError(f"{self.path} {_difference(found, self._first)}: use --overwrite to discard it")
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(self._first).encode() + b"\n")
        self._file.flush()

    def _scan(self) -> None:
        at = {self.source.name(index): index for index in range(len(self.source))}
        end = self._file.tell()
        try:
            while line := self._file.readline():
                facts = json.loads(line)
                start, width = self._file.tell(), int(facts["width"])
                if zlib.crc32(self._file.read(4 * width * len(facts["images"]))) != facts["crc"]:
                    break  # cut off by a kill or a full disk
                for row, (name, stamp) in enumerate(facts["images"]):
                    if name in at and stamp is not None and stamp == _stamp(self.source, at[name]):
                        self._where[at[name]] = start + 4 * width * row
                self._width, end = width, self._file.tell()
        finally:
            self._file.seek(end)
            self._file.truncate()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with storing(self.path):
            yield


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Raise StorageError for an OSError: the rows computed so far are kept."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}): free some space and run the same command "
            "again; finished rows are kept"
        ) from error


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        return "is not a file of unfinished embeddings"
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    return "holds rows of another run (" + ", ".join(f"{k} {found.get(k)}, now {wanted[k]}" for k in differing) + ")"


def _stamp(source: Source, index: int) -> list[int] | None:
    """Size and time of an image's file; None for an image that is not a file."""
    file: Callable[[int], Any] | None = getattr(source, "file", None)
    try:
        facts = os.stat(file(index)) if callable(file) else None
    except (OSError, TypeError):
        return None
    # The time of the last change counts too: a copy may keep size and modification time.
    return None if facts is None else [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
