"""Where the images of a tar file lie: an index that is built once and then gives each of them by one read."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

from agglo.sources._index import Writer

_BLOCK = 512
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
}


class ShardError(Exception):
    """A file that is no shard. The message is a phrase that follows its name."""


@dataclass
class Survey:
    """What an archive holds.

    Args:
        images: how many whole ones.
        others: other members by ending.
        damage: what is wrong with it, as a phrase; empty where nothing is.
    """

    images: int = 0
    others: Counter[str] = field(default_factory=Counter)
    damage: str = ""


def ending(member: str) -> str:
    """What follows the first dot of a member's file name, in lower case: a sample's part, as WebDataset defines it."""
    return member.rpartition("/")[2].partition(".")[2].lower()


def survey(file: BinaryIO, size: int, wanted: frozenset[str], writer: Writer) -> Survey:
    """Write a row ``(name, offset, size)`` for each whole image of an archive.

    Args:
        file: seekable, at its start.
        size: of the file, in bytes.
        wanted: endings of images, lower case, without the dot.
        writer: of columns ``offset`` and ``size``.

    Raises:
        ShardError: no tar file, or a compressed one.
    """
    _check_head(file.read(_BLOCK), size)
    file.seek(0)
    found, end, cut = Survey(), 0, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while not cut and (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] (else it would remember millions)
                end = archive.offset
                if not member.isfile():
                    continue
                cut = max(0, member.offset_data + member.size - size)
                if ending(member.name) not in wanted:
                    found.others[ending(member.name) or "no ending"] += 1
                elif not cut:
                    found.images += 1
                    writer.add(member.name, offset=member.offset_data, size=member.size)
    except (tarfile.TarError, EOFError) as error:
        if not end:
            raise ShardError(f"is not a tar file ({error})") from error
    if not cut:
        found.damage = _ending_damage(file, end, size)
    else:
        found.damage = f"is truncated: its last member lacks {cut} bytes"
    return found


def _check_head(head: bytes, size: int) -> None:
    if size == 0:
        raise ShardError("is empty (0 bytes)")
    for magic, (name, tool) in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(f"is compressed with {name}, so no image can be read by itself; {tool} it once")
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined] (an archive of no members)
        return
    except tarfile.HeaderError:
        raise ShardError(f"is not a tar file ({size} bytes, beginning with {head[:8]!r})") from None


def _ending_damage(file: BinaryIO, end: int, size: int) -> str:
    """What is wrong behind the last member that could be read: a whole archive goes on with a block of zeros."""
    if end + _BLOCK > size:
        return f"is truncated: it ends without its end mark after {size} bytes"
    file.seek(end, os.SEEK_SET)
    if file.read(_BLOCK).strip(b"\0"):
        return f"is damaged: what stands at byte {end} is no member, and what follows cannot be found"
    return ""
