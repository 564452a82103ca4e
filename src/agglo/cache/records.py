"""Records on disk: append-only shards that survive a kill at any moment and can be read while they grow.

A shard is a sequence of records, each a 32-byte header and a payload. The header has a CRC of itself and the payload: a
partial record at the end of the last shard is never read, and is truncated when writing resumes. A full shard is
flushed to disk and gets an index file, so opening a cache reads no payload; shards without an index are scanned header
by header.

Shards are independent of each other: a damaged one may be deleted, and the next run of `agglo cache` writes its records
again.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agglo.files import write_bytes
from agglo.types import AssetError

MAGIC = b"AGF1"
HEADER = struct.Struct("<4sIQQIHH")
"""Magic; CRC-32 of all that follows; key; payload bytes; CRC-32 of the crop's pixels; grid of the map."""

SHARD_BYTES = 2 << 30
"""Size in bytes at which a shard is closed."""

_CHUNK = 1 << 24
_UNCHECKED = 8
"""Leading bytes of the header that its CRC does not cover: magic and CRC."""
_INDEX = np.dtype([("key", "<u8"), ("offset", "<u8"), ("bytes", "<u8")])


def key_of(name: str, crop: int, size: tuple[int, int]) -> int:
    """The 64-bit key of a record: image name, crop number, and the ``(H, W)`` of the student's view."""
    text = f"{name}\0{crop}\0{size[0]}x{size[1]}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Location:
    """A record on disk: the shard's number, the offset of its header and the length of its payload, in bytes."""

    shard: int
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record's header.

    Args:
        key: see :func:`key_of`.
        checksum: CRC-32 of the crop's pixels.
        grid: ``(h, w)`` of the map; (0, 0) if the teacher has none.
    """

    key: int
    checksum: int
    grid: tuple[int, int]


def shard_file(folder: Path, number: int) -> Path:
    """The path of a shard."""
    return folder / f"{number:06d}.shard"


def index_file(folder: Path, number: int) -> Path:
    """The path of a shard's index."""
    return folder / f"{number:06d}.index"


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the shards in a folder, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.shard") if path.stem.isdigit())


def scan(file: int, start: int = 0, *, verify: bool) -> Iterator[tuple[int, Record, int, bool]]:
    """The records of a shard: ``(offset, header, payload bytes, intact)``, up to the first incomplete one.

    Args:
        file: descriptor of the shard.
        start: offset of the first record.
        verify: also read the payloads; ``intact`` is whether the CRC matches, and always True without ``verify``.
    """
    offset, end = start, os.fstat(file).st_size
    while offset + HEADER.size <= end:
        header = os.pread(file, HEADER.size, offset)
        magic, crc, key, length, checksum, height, width = HEADER.unpack(header)
        if magic != MAGIC or offset + HEADER.size + length > end:
            return
        intact = not verify or _crc_of(file, header, offset, length) == crc
        yield offset, Record(key, checksum, (height, width)), length, intact
        offset += HEADER.size + length


def _crc_of(file: int, header: bytes, offset: int, length: int) -> int:
    crc, position, end = zlib.crc32(header[_UNCHECKED:]), offset + HEADER.size, offset + HEADER.size + length
    while position < end:
        chunk = os.pread(file, min(_CHUNK, end - position), position)
        if not chunk:
            return ~crc
        crc = zlib.crc32(chunk, crc)
        position += len(chunk)
    return crc


class ShardReader:
    """Reads one teacher's records; thread-safe, also while another process appends.

    Args:
        folder: of the shards; need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.locations: dict[int, Location] = {}
        self._files: dict[int, int] = {}
        self._scanned: dict[int, int] = {}
        self.refresh()

    def __contains__(self, key: int) -> bool:
        return key in self.locations

    def __len__(self) -> int:
        return len(self.locations)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def refresh(self) -> None:
        """Add the records that were appended since the last call."""
        for number in shard_numbers(self.folder):
            if self._scanned.get(number) == -1:
                continue
            known = _read_index(self.folder, number)
            if known is not None:
                self.locations.update(
                    (int(key), Location(number, int(offset), int(length))) for key, offset, length in known.tolist()
                )
                self._scanned[number] = -1
                continue
            for offset, record, length, _ in scan(self._file(number), self._scanned.get(number, 0), verify=False):
                self.locations[record.key] = Location(number, offset, length)
                self._scanned[number] = offset + HEADER.size + length

    def read(self, key: int, into: memoryview) -> Record:
        """Read a payload into a buffer of its exact length.

        Raises:
            KeyError: no such record.
            AssetError: damaged, or of another length; names the shard to delete.
        """
        location = self.locations[key]
        header, file = bytearray(HEADER.size), self._file(location.shard)
        if location.bytes != into.nbytes:
            raise self._damaged(location, f"has {location.bytes} bytes instead of {into.nbytes}")
        got = os.preadv(file, [header, into], location.offset)
        if got != HEADER.size + location.bytes:  # a read may return less than requested; of a truncated file it must
            got = _read_rest(file, location.offset, header, into)
        magic, crc, found, _, checksum, height, width = HEADER.unpack(header)
        intact = got == HEADER.size + location.bytes and magic == MAGIC and found == key
        if not intact or zlib.crc32(into, zlib.crc32(header[_UNCHECKED:])) != crc:
            raise self._damaged(location, "is damaged")
        return Record(key, checksum, (height, width))

    def _damaged(self, location: Location, what: str) -> AssetError:
        return AssetError(
            f"{shard_file(self.folder, location.shard)}: the record at byte {location.offset} {what}; delete that file "
            "and run the same `agglo cache` again: only its records are recomputed"
        )

    def _file(self, number: int) -> int:
        if number not in self._files:
            opened = os.open(shard_file(self.folder, number), os.O_RDONLY)
            if self._files.setdefault(number, opened) != opened:
                os.close(opened)  # another thread opened it first
        return self._files[number]


def _read_rest(file: int, offset: int, header: bytearray, body: memoryview) -> int:
    """Read header and body piece by piece; returns the number of bytes read."""
    got = 0
    for target in (memoryview(header), body):
        filled = 0
        while filled < len(target):
            count = os.preadv(file, [target[filled:]], offset + got)
            if not count:
                return got
            filled += count
            got += count
    return got


def _read_index(folder: Path, number: int) -> np.ndarray | None:
    """The index of a full shard; None if missing, or inconsistent with its shard."""
    try:
        data = index_file(folder, number).read_bytes()
        size = os.stat(shard_file(folder, number)).st_size
    except OSError:
        return None
    body, end = data[:-12], data[-12:]
    if len(end) < 12 or len(body) % _INDEX.itemsize or struct.unpack("<QI", end) != (size, zlib.crc32(body)):
        return None
    return np.frombuffer(body, _INDEX)


class ShardWriter:
    """Appends one teacher's records; resumes where the last process stopped, however it ended.

    Args:
        folder: of the shards; created if missing.
        shard_bytes: size at which a shard is closed.

    Attributes:
        lost: bytes of partial records that were truncated.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes, self.lost = folder, shard_bytes, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.keys: set[int] = set()
        self._file = -1
        self._entries: list[tuple[int, int, int]] = []
        for path in [*folder.glob("*.partial"), *folder.glob(".*.partial*")]:
            path.unlink()
        numbers = shard_numbers(folder)
        for number in numbers:
            self._adopt(number, last=number == numbers[-1])

    def __contains__(self, key: int) -> bool:
        return key in self.keys

    def append(self, record: Record, parts: Sequence[Any]) -> None:
        """Append a record, completely or not at all.

        Args:
            parts: the payload, as buffers of bytes.

        Raises:
            OSError: the disk is full, or similar; earlier records are intact.
        """
        length = sum(memoryview(part).nbytes for part in parts)
        fields = struct.pack("<QQIHH", record.key, length, record.checksum, *record.grid)
        crc = zlib.crc32(fields)
        for part in parts:
            crc = zlib.crc32(part, crc)
        if self._file < 0:
            self._begin()
        try:
            _write_all(self._file, b"".join([MAGIC, struct.pack("<I", crc), fields, *map(bytes, parts)]), self._end)
        except BaseException:
            self._truncate()
            raise
        self._entries.append((record.key, self._end, length))
        self.keys.add(record.key)
        self._end += HEADER.size + length
        if self._end >= self.shard_bytes:
            self._seal()

    def finish(self) -> None:
        """Flush to disk and close the last shard."""
        if self._file >= 0:
            self._seal()

    def close(self) -> None:
        """Flush to disk; a later writer appends to the last shard."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def _truncate(self) -> None:
        os.ftruncate(self._file, self._end)

    def _adopt(self, number: int, *, last: bool) -> None:
        """Load the keys of a shard of an earlier process, and truncate a partial record."""
        known = _read_index(self.folder, number)
        if known is not None:
            self.keys.update(known["key"].tolist())
            return
        file, end = os.open(shard_file(self.folder, number), os.O_RDWR), 0
        entries = []
        for offset, record, length, intact in scan(file, verify=True):
            if not intact:
                break
            entries.append((record.key, offset, length))
            end = offset + HEADER.size + length
        self.lost += os.fstat(file).st_size - end
        self.keys.update(key for key, _, _ in entries)
        self._number, self._file, self._entries, self._end = number, file, entries, end
        self._truncate()
        if not last or end >= self.shard_bytes:  # killed between closing a shard and writing its index
            self._seal()

    def _begin(self) -> None:
        number = (shard_numbers(self.folder) or [-1])[-1] + 1
        index_file(self.folder, number).unlink(missing_ok=True)  # of a deleted shard
        self._file = os.open(shard_file(self.folder, number), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._number, self._entries, self._end = number, [], 0

    def _seal(self) -> None:
        """Flush a full shard to disk and write its index."""
        os.fsync(self._file)
        body = np.array(self._entries, dtype=_INDEX).tobytes()
        write_bytes(index_file(self.folder, self._number), body + struct.pack("<QI", self._end, zlib.crc32(body)))
        os.close(self._file)
        self._file = -1


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged shard: its file, the offset of the first damaged record, and the number of intact records."""

    file: Path
    offset: int
    intact: int


def inspect(folder: Path) -> tuple[int, list[Damage]]:
    """Verify the CRC of every record in a folder: the number of intact records, and the damaged shards.

    A partial record at the end of the last shard is what a kill leaves, and not damage.
    """
    count, damages = 0, []
    numbers = shard_numbers(folder)
    for number in numbers:
        path = shard_file(folder, number)
        file, end, found, bad = os.open(path, os.O_RDONLY), 0, 0, None
        try:
            for offset, _, length, intact in scan(file, verify=True):
                if not intact and bad is None:
                    bad = offset
                found += intact
                end = offset + HEADER.size + length
            size, begins = os.fstat(file).st_size, os.pread(file, len(MAGIC), end)
        finally:
            os.close(file)
        indexed = index_file(folder, number).is_file()
        # A kill leaves a header with an incomplete payload, or part of a header, at the end of the last shard only.
        torn = end + HEADER.size > size or begins == MAGIC
        if bad is None and end < size and (indexed or number != numbers[-1] or not torn):
            bad = end
        if bad is None and indexed and _read_index(folder, number) is None:
            bad = end  # shorter than its index states
        if bad is not None:
            damages.append(Damage(path, bad, found))
        count += found
    return count, damages
