"""Records on disk: append-only shards that survive a kill at any moment and can be read while they grow.

A shard is a sequence of records, each a 32-byte header and its payload. The header holds a CRC over itself and the
payload, so a record is whole or it is not there: what a kill left half-written at the end of the last shard is cut off
when writing goes on, and a reader never counts it. A shard that is full is flushed to the disk and gets an index beside
it, so that opening a cache reads no payload; shards without an index are walked from header to header.

Nothing in a shard refers to another file. A damaged shard may be deleted: its records are then missing, and are
written again by the run that finds them so.
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

from agglo.types import AssetError

MAGIC = b"AGF1"
HEADER = struct.Struct("<4sIQQIHH")
"""Magic; CRC-32 of all that follows; key; bytes of payload; CRC-32 of the canvas's pixels; grid of the map."""

SHARD_BYTES = 2 << 30
"""A shard that has reached this size is closed and the next begun."""

_CHUNK = 1 << 24
_UNCHECKED = 8
"""Bytes of the header that its CRC does not cover: magic and CRC."""
_INDEX = np.dtype([("key", "<u8"), ("offset", "<u8"), ("bytes", "<u8")])


def key_of(name: str, crop: int, size: tuple[int, int]) -> int:
    """The 64-bit key of an entry: an image's name, which of its fixed crops, and the ``(H, W)`` the student sees."""
    text = f"{name}\0{crop}\0{size[0]}x{size[1]}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies: the shard's number, the offset of its header and the length of its payload in bytes."""

    shard: int
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """A record's header.

    Args:
        key: of the entry.
        canvas: CRC-32 of the pixels that the teacher looked at.
        grid: ``(h, w)`` of the map; (0, 0) where the teacher has none.
    """

    key: int
    canvas: int
    grid: tuple[int, int]


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"{number:06d}.shard"


def index_file(folder: Path, number: int) -> Path:
    """The file of a full shard's index."""
    return folder / f"{number:06d}.index"


def shard_numbers(folder: Path) -> list[int]:
    """The shards in a folder, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.shard") if path.stem.isdigit())


def walk(file: int, start: int = 0, *, verify: bool) -> Iterator[tuple[int, Record, int, bool]]:
    """The records of a shard from an offset on: ``(offset, header, bytes of payload, whole)``.

    Ends at the first place where no record is, or where the file ends before the record does.

    Args:
        file: descriptor of the shard.
        start: where a record begins.
        verify: read the payloads too; ``whole`` says whether the CRC holds, and is True where it was not asked for.
    """
    offset, end = start, os.fstat(file).st_size
    while offset + HEADER.size <= end:
        header = os.pread(file, HEADER.size, offset)
        magic, crc, key, length, canvas, height, width = HEADER.unpack(header)
        if magic != MAGIC or offset + HEADER.size + length > end:
            return
        whole = not verify or _crc_of(file, header, offset, length) == crc
        yield offset, Record(key, canvas, (height, width)), length, whole
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


class Shelf:
    """One teacher's records, for reading; safe in several threads, and while another process appends.

    Args:
        folder: holds the shards; may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[int, Place] = {}
        self._files: dict[int, int] = {}
        self._walked: dict[int, int] = {}
        self.refresh()

    def __contains__(self, key: int) -> bool:
        return key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def refresh(self) -> None:
        """Find the records that were appended since."""
        for number in shard_numbers(self.folder):
            if self._walked.get(number) == -1:
                continue
            known = _read_index(self.folder, number)
            if known is not None:
                self.places.update(
                    (int(key), Place(number, int(offset), int(length))) for key, offset, length in known.tolist()
                )
                self._walked[number] = -1
                continue
            for offset, record, length, _ in walk(self._file(number), self._walked.get(number, 0), verify=False):
                self.places[record.key] = Place(number, offset, length)
                self._walked[number] = offset + HEADER.size + length

    def read(self, key: int, into: memoryview) -> Record:
        """Read a payload into a buffer of its exact length.

        Raises:
            KeyError: there is no such record.
            AssetError: it is damaged, or of another length; names the shard and the next move.
        """
        place = self.places[key]
        header, file = bytearray(HEADER.size), self._file(place.shard)
        if place.bytes != into.nbytes:
            raise self._damaged(place, f"holds {place.bytes} bytes where {into.nbytes} belong")
        got = os.preadv(file, [header, into], place.offset)
        if got != HEADER.size + place.bytes:  # a read may return less than was asked for, and of a cut file must
            got = _read_rest(file, place.offset, header, into)
        magic, crc, found, _, canvas, height, width = HEADER.unpack(header)
        whole = got == HEADER.size + place.bytes and magic == MAGIC and found == key
        if not whole or zlib.crc32(into, zlib.crc32(header[_UNCHECKED:])) != crc:
            raise self._damaged(place, "is not what was written")
        return Record(key, canvas, (height, width))

    def _damaged(self, place: Place, what: str) -> AssetError:
        return AssetError(
            f"{shard_file(self.folder, place.shard)}: the record at byte {place.offset} {what}; delete that file and "
            "run the same `agglo cache` again: only what was in it is computed anew"
        )

    def _file(self, number: int) -> int:
        if number not in self._files:
            opened = os.open(shard_file(self.folder, number), os.O_RDONLY)
            if self._files.setdefault(number, opened) != opened:
                os.close(opened)  # another thread was faster
        return self._files[number]


def _read_rest(file: int, offset: int, header: bytearray, body: memoryview) -> int:
    """Read header and body piece by piece; how many bytes there were."""
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
    """The index of a full shard; None where there is none, or it does not fit its shard."""
    try:
        data = index_file(folder, number).read_bytes()
        size = os.stat(shard_file(folder, number)).st_size
    except OSError:
        return None
    body, end = data[:-12], data[-12:]
    if len(end) < 12 or len(body) % _INDEX.itemsize or struct.unpack("<QI", end) != (size, zlib.crc32(body)):
        return None
    return np.frombuffer(body, _INDEX)


class Pen:
    """One teacher's records, for writing: goes on where the last process stopped, however it ended.

    Args:
        folder: of the shards; made if need be.
        shard_bytes: size at which a shard is closed.

    Attributes:
        lost: bytes of a half-written record that were cut off.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes, self.lost = folder, shard_bytes, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.keys: set[int] = set()
        self._file = -1
        self._entries: list[tuple[int, int, int]] = []
        for path in folder.glob("*.partial"):
            path.unlink()
        numbers = shard_numbers(folder)
        for number in numbers:
            self._adopt(number, last=number == numbers[-1])

    def __contains__(self, key: int) -> bool:
        return key in self.keys

    def append(self, record: Record, parts: Sequence[Any]) -> None:
        """Add a record, whole or not at all.

        Args:
            parts: the payload, as buffers of bytes.

        Raises:
            OSError: the disk is full, or the like; what was there before is as it was.
        """
        length = sum(memoryview(part).nbytes for part in parts)
        fields = struct.pack("<QQIHH", record.key, length, record.canvas, *record.grid)
        crc = zlib.crc32(fields)
        for part in parts:
            crc = zlib.crc32(part, crc)
        if self._file < 0:
            self._begin()
        try:
            _write_all(self._file, b"".join([MAGIC, struct.pack("<I", crc), fields, *map(bytes, parts)]), self._end)
        except BaseException:
            self._cut()
            raise
        self._entries.append((record.key, self._end, length))
        self.keys.add(record.key)
        self._end += HEADER.size + length
        if self._end >= self.shard_bytes:
            self._seal()

    def finish(self) -> None:
        """All is written: flush to the disk and close the last shard too."""
        if self._file >= 0:
            self._seal()

    def close(self) -> None:
        """Stop for now: flush to the disk; the last shard is gone on with."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1

    def _cut(self) -> None:
        os.ftruncate(self._file, self._end)

    def _adopt(self, number: int, *, last: bool) -> None:
        """Take in a shard of an earlier process."""
        known = _read_index(self.folder, number)
        if known is not None:
            self.keys.update(known["key"].tolist())
            return
        file, end = os.open(shard_file(self.folder, number), os.O_RDWR), 0
        entries = []
        for offset, record, length, whole in walk(file, verify=True):
            if not whole:
                break
            entries.append((record.key, offset, length))
            end = offset + HEADER.size + length
        self.lost += os.fstat(file).st_size - end
        self.keys.update(key for key, _, _ in entries)
        self._number, self._file, self._entries, self._end = number, file, entries, end
        self._cut()
        if not last or end >= self.shard_bytes:  # killed between closing a shard and writing its index
            self._seal()

    def _begin(self) -> None:
        number = (shard_numbers(self.folder) or [-1])[-1] + 1
        index_file(self.folder, number).unlink(missing_ok=True)  # of a shard that somebody deleted
        self._file = os.open(shard_file(self.folder, number), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._number, self._entries, self._end = number, [], 0

    def _seal(self) -> None:
        """Flush a full shard to the disk and write its index."""
        os.fsync(self._file)
        body = np.array(self._entries, dtype=_INDEX).tobytes()
        partial = index_file(self.folder, self._number).with_suffix(".partial")
        partial.write_bytes(body + struct.pack("<QI", self._end, zlib.crc32(body)))
        partial.replace(index_file(self.folder, self._number))
        os.close(self._file)
        self._file = -1


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


@dataclass(frozen=True, slots=True)
class Damage:
    """A shard that is not as it was written: which file, from which byte on, and how many records it still holds."""

    file: Path
    offset: int
    whole: int


def inspect(folder: Path) -> tuple[int, list[Damage]]:
    """Read every record of a folder and check its CRC: how many are whole, and which shards are damaged.

    A half-written record at the end of the last shard is no damage: a kill leaves one, and writing goes on over it.
    """
    whole, damages = 0, []
    numbers = shard_numbers(folder)
    for number in numbers:
        path = shard_file(folder, number)
        file, end, found, bad = os.open(path, os.O_RDONLY), 0, 0, None
        try:
            for offset, _, length, intact in walk(file, verify=True):
                if not intact and bad is None:
                    bad = offset
                found += intact
                end = offset + HEADER.size + length
            size, begins = os.fstat(file).st_size, os.pread(file, len(MAGIC), end)
        finally:
            os.close(file)
        indexed = index_file(folder, number).is_file()
        # A kill leaves a header whose payload is not all there, or less than a header, and only in the last shard.
        torn = end + HEADER.size > size or begins == MAGIC
        if bad is None and end < size and (indexed or number != numbers[-1] or not torn):
            bad = end
        if bad is None and indexed and _read_index(folder, number) is None:
            bad = end  # shorter than its index says
        if bad is not None:
            damages.append(Damage(path, bad, found))
        whole += found
    return whole, damages
