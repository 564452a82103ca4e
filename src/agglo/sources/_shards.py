"""Shards: local tar files, or remote ones on a web server or in an object store, each with an index of its images."""

from __future__ import annotations

import glob
import logging
import os
import posixpath
import re
import shutil
import stat
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from agglo.extras import install_command, require
from agglo.files import printable, replacing
from agglo.sources._index import Table, TableWriter, index_path, read
from agglo.sources._paths import braces, expanded
from agglo.sources.base import SourceError
from agglo.types import ConfigError, MissingExtraError

_log = logging.getLogger(__name__)

TRIES = 4
PAUSE = 0.5
"""Seconds before the second attempt of a remote read; doubled before each further one."""
_STAMPS = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "md5Hash", "generation")
"""File info keys of various stores that change with the file's content."""
_NOT_FOUND, _DENIED = (404, 410), (401, 403)
"""HTTP status codes."""
_BLOCK = 512
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
}

_TAR = re.compile(r"\.tar$|\.t[gbx]z2?$|\.tar\.(gz|bz2|xz|zst|lz4|zip)$")

Result = TypeVar("Result")


class ShardError(Exception):
    """The file is not a readable tar shard. The message is a phrase that follows the file's name."""


def locate(patterns: Sequence[str]) -> list[Shard]:
    """The shards named by paths, globs, brace ranges and folders, in that order, without duplicates.

    Raises:
        ConfigError: a pattern that matches nothing.
        MissingExtraError: the package for its protocol is not installed.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            raise ConfigError(f"{pattern}: pipe commands are not run; use the URL of the object store, e.g. s3://...")
        for path in [pattern] if os.path.lexists(pattern) else braces(expanded(pattern)):
            found.update(dict.fromkeys(_globbed(path, pattern)))
    return [Shard(path) for path in found]


def _globbed(path: str, pattern: str) -> list[str]:
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if "://" in path:
        if not set("*[") & set(path):
            return [path]
        filesystem, inner = _filesystem(path)
        hits = sorted(with_retries(path, lambda: filesystem.glob(inner)))
        names = [filesystem.unstrip_protocol(hit) for hit in hits]
    else:
        if os.path.isdir(path):
            names = _in_folder(path)
            path = os.path.join(path, "*.tar")
        elif not glob.has_magic(path) or os.path.lexists(path):
            return [path]
        else:
            names = sorted(glob.glob(path, recursive=True))
    if not names:
        raise ConfigError(f"source webdataset: no shard matches {pattern!r} (expanded to {path})")
    return names


def _in_folder(path: str) -> list[str]:
    """The tar files in a folder; compressed ones too, which are named when they are opened."""
    names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith(".") and entry.is_file())
    return [os.path.join(path, name) for name in names if _TAR.search(name.lower())]


@dataclass
class Shard:
    """One tar file.

    Args:
        path: local path or URL.
        local: local path of its bytes, if they are on this machine.
        size: in bytes.
        stamp: changes when the file does.
    """

    path: str
    local: str | None = field(default=None)
    size: int = -1
    stamp: str = ""

    @property
    def remote(self) -> bool:
        """Whether ``path`` is a URL."""
        return "://" in self.path

    def stat(self) -> None:
        """Set size and stamp.

        Raises:
            FileNotFoundError: the file does not exist.
            SourceError: it cannot be reached.
        """
        if not self.remote:
            facts = os.stat(self.path)
            if not stat.S_ISREG(facts.st_mode):
                raise ConfigError(f"source webdataset: {self.path} is not a regular file; name tar files, or a folder")
            self.local, self.size, self.stamp = self.path, facts.st_size, str(facts.st_mtime_ns)
            return
        filesystem, inner = _filesystem(self.path)
        facts = with_retries(self.path, lambda: filesystem.info(inner))
        if facts.get("size") is None:
            raise SourceError(f"{self.path}: the server does not report its size; copy the shards to a local folder")
        self.size = int(facts["size"])
        self.stamp = "|".join(f"{key}={facts[key]}" for key in _STAMPS if facts.get(key) is not None)

    def keep(self) -> None:
        """Copy a remote shard into the cache folder, unless it is already there."""
        target = index_path("shard", self.path, self.size, self.stamp).with_suffix(".tar")
        if not (target.is_file() and target.stat().st_size == self.size):
            filesystem, inner = _filesystem(self.path)
            try:
                with replacing(target) as partial:
                    if shutil.disk_usage(target.parent).free < self.size:
                        raise OSError(f"{self.size} bytes are needed")
                    with_retries(self.path, lambda: filesystem.get_file(inner, str(partial)))
            except SourceError:
                raise
            except OSError as error:
                _log.warning("%s is not kept in %s (%s); reading it remotely", self.path, target.parent, error)
                return
        self.local = str(target)

    def table(self, extensions: frozenset[str]) -> Table:
        """Index of its images, from the cache folder if it was built from this version of the file.

        Raises:
            ShardError: not a readable tar shard.
            SourceError: it cannot be reached.
        """
        cached = self.table_path(extensions)
        table = read(cached)
        if table is not None:
            return table
        if self.local is None:
            return with_retries(self.path, lambda: self._build_table(extensions, cached))
        try:
            return self._build_table(extensions, cached)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read ({error.strerror or error})") from error

    def _build_table(self, extensions: frozenset[str], path: Path) -> Table:
        with TableWriter("offset", "size") as writer, self._open() as file:
            damage, others = scan(file, self.size, extensions, writer)
            return writer.finish({"damage": damage, "others": {printable(k): n for k, n in others.items()}}, path)

    def table_path(self, extensions: frozenset[str]) -> Path:
        """Cache path of the index; the name hashes everything it depends on."""
        path = self.path if self.remote else os.path.abspath(self.path)
        return index_path("shards", path, self.size, self.stamp, sorted(extensions))

    def _open(self) -> BinaryIO:
        if self.local is not None:
            return open(self.local, "rb")
        filesystem, inner = _filesystem(self.path)
        return filesystem.open(inner, "rb")

    def read(self, offset: int, size: int) -> bytes:
        """A range of its bytes.

        Raises:
            SourceError: the range cannot be read, or the file changed since it was indexed.
        """
        if self.local is None:
            filesystem, inner = _filesystem(self.path)
            data = with_retries(self.path, lambda: filesystem.cat_file(inner, start=offset, end=offset + size))
            if len(data) != size:
                raise SourceError(
                    f"{self.path}: requested {size} bytes at {offset}, got {len(data)}: the server does not support "
                    "range requests, or the file has changed. Set keep_gb, or copy the shards to a local folder"
                )
            return data
        try:
            with open(self.local, "rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_size != self.size or (not self.remote and str(facts.st_mtime_ns) != self.stamp):
                    raise SourceError(f"{self.path} changed while in use; restart to index it again")
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{self.path} cannot be read ({error}); restore it and resume") from error


# ------------------------------------------------------------------------------------------------- the index of a tar


def extension(member: str) -> str:
    """All that follows the first dot of a member's file name, in lower case, as WebDataset defines it."""
    return member.rpartition("/")[2].partition(".")[2].lower()


def scan(file: BinaryIO, size: int, extensions: frozenset[str], writer: TableWriter) -> tuple[str, Counter[str]]:
    """Write a row ``(name, offset, size)`` for each complete image of a file of one or more joined archives.

    Links to members follow all other images, with the bytes of the member that they lead to.

    Args:
        file: seekable, at its start.
        size: of the file, in bytes.
        extensions: image extensions, lower case, without the dot.
        writer: with columns ``offset`` and ``size``.

    Returns:
        A phrase that describes damage to the file, empty for none; and the other members' count by extension, or by
        "links without a target" and "sparse file".

    Raises:
        ShardError: not a tar file, or a compressed one.
    """
    _check_head(file.read(_BLOCK), size)
    others: Counter[str] = Counter()
    links: dict[str, str] = {}
    missing = 0

    def visit(member: tarfile.TarInfo) -> bool:
        nonlocal missing
        ending = extension(member.name)
        if member.issym() or member.islnk():
            if ending in extensions:
                links[member.name] = _target(member)
        elif member.isfile():
            missing = max(0, member.offset_data + member.size - size)
            if ending not in extensions:
                others[ending or "no ending"] += 1
            elif member.issparse():
                others["sparse files"] += 1
            elif not missing:
                writer.add(member.name, offset=member.offset_data, size=member.size)
        elif not member.isdir():
            others["pipes or devices"] += 1
        return missing > 0

    damage = _walk(file, size, visit)
    if missing:
        damage = f"is truncated: {missing} bytes of its last member are missing"
    if links:
        others.update(_follow(file, size, links, writer))
    return damage, others


def _walk(file: BinaryIO, size: int, visit: Callable[[tarfile.TarInfo], bool]) -> str:
    """Visit the members of all archives of a file until ``visit`` returns true; a phrase on damage, empty for none."""
    start = 0
    while True:
        file.seek(start)
        end = start
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined] (tarfile would accumulate millions)
                    end = archive.offset
                    if visit(member):
                        return ""
        except (tarfile.TarError, EOFError) as error:
            if not end:
                raise ShardError(f"is not a tar file ({error})") from error
        if damage := _damage(file, end, size):
            return damage
        start = _after_zeros(file, end)
        if start + _BLOCK > size:
            return ""
        file.seek(start)
        try:
            tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return f"is damaged: {size - start} bytes at byte {start}, behind its end marker, are not an archive"


def _after_zeros(file: BinaryIO, at: int) -> int:
    """Offset of the first block from ``at`` that is not all zeros, or the end of the file."""
    file.seek(at)
    while piece := file.read(1 << 20):
        rest = piece.lstrip(b"\0")
        if rest:
            return at + (len(piece) - len(rest)) // _BLOCK * _BLOCK
        at += len(piece)
    return at


def _target(member: tarfile.TarInfo) -> str:
    """Name of the member that a link leads to: of a symbolic link relative to its folder."""
    folder = posixpath.dirname(member.name) if member.issym() else ""
    return posixpath.normpath(posixpath.join(folder, member.linkname))


def _follow(file: BinaryIO, size: int, links: dict[str, str], writer: TableWriter) -> Counter[str]:
    """Write a row for each link whose target is a member; returns the count of the others."""
    places: dict[str, tuple[int, int]] = {}
    known = {posixpath.normpath(name): target for name, target in links.items()}
    wanted = set(known.values())

    def visit(member: tarfile.TarInfo) -> bool:
        name = posixpath.normpath(member.name)
        if member.isfile() and not member.issparse() and name in wanted and member.offset_data + member.size <= size:
            places[name] = member.offset_data, member.size
        elif (member.issym() or member.islnk()) and name in wanted:
            known.setdefault(name, _target(member))
        return False

    while True:  # a link may lead to a link that is not an image
        before = len(known)
        wanted |= set(known.values())
        _walk(file, size, visit)
        if len(known) == before:
            break
    lost = 0
    for name, target in links.items():
        seen: set[str] = set()
        while target in known and target not in places and target not in seen:
            seen.add(target)
            target = known[target]
        if target in places:
            writer.add(name, offset=places[target][0], size=places[target][1])
        else:
            lost += 1
    return Counter({"links without a target": lost} if lost else {})


def _check_head(head: bytes, size: int) -> None:
    if size == 0:
        raise ShardError("is empty (0 bytes)")
    for magic, (name, tool) in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(f"is compressed with {name}, which prevents random access; {tool} it once")
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined] (an archive without members)
        return
    except tarfile.HeaderError:
        raise ShardError(f"is not a tar file ({size} bytes, beginning with {head[:8]!r})") from None


def _damage(file: BinaryIO, end: int, size: int) -> str:
    """Damage behind the last readable member: an intact archive continues with a block of zeros."""
    if end + _BLOCK > size:
        return f"is truncated: no end marker after {size} bytes"
    file.seek(end, os.SEEK_SET)
    if file.read(_BLOCK).strip(b"\0"):
        return f"is damaged: no valid member header at byte {end}, so later members cannot be located"
    return ""


# ------------------------------------------------------------------------------------------------- remote files


def with_retries(path: str, action: Callable[[], Result]) -> Result:
    """Run a remote operation, retrying with increasing pauses.

    Raises:
        FileNotFoundError: the file does not exist.
        SourceError: every attempt failed.
    """
    attempt = 1
    while True:
        try:
            return action()
        except ShardError:
            raise
        except Exception as error:
            cause = _cause(path, error)
            if isinstance(cause, FileNotFoundError):
                raise
            if isinstance(cause, PermissionError) or getattr(cause, "status", None) in _DENIED:
                denied = f"{path}: access is denied ({cause}); set the store's usual credentials"
                raise SourceError(denied) from error
            if isinstance(cause, ImportError):
                raise _not_installed(path, cause) from error
            if attempt == TRIES:
                why = f"{type(cause).__name__}: {cause}".strip(": ")
                advice = "check the network, or copy the shards to a local folder"
                raise SourceError(f"{path} cannot be reached after {TRIES} attempts ({why}); {advice}") from error
        time.sleep(PAUSE * 2 ** (attempt - 1))
        attempt += 1


def _cause(path: str, error: BaseException) -> BaseException:
    """The underlying error: fsspec reports every failed HTTP request as FileNotFoundError."""
    found: BaseException | None = error
    while isinstance(found, FileNotFoundError) and path.startswith("http"):
        found = found.__cause__ or found.__context__
    return error if found is None or getattr(found, "status", None) in _NOT_FOUND else found


_LOCK = threading.Lock()


def _filesystem(path: str) -> tuple[Any, str]:
    with _LOCK:
        return _connected(path.partition("://")[0]), path if path.startswith("http") else path.partition("://")[2]


@lru_cache(maxsize=16)
def _connected(protocol: str) -> Any:
    """The file system of a protocol, with the credentials it finds itself (variables, files, roles)."""
    fsspec = require("fsspec", "data")
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise _not_installed(f"{protocol}://", error) from error
    except ValueError as error:
        raise ConfigError(f"source webdataset: unknown protocol {protocol}:// ({error})") from error


def _not_installed(path: str, error: ImportError) -> MissingExtraError:
    protocol = path.partition("://")[0]
    package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(protocol)
    advice = install_command("data") if package is None else f"pip install {package}"
    return MissingExtraError(f"{protocol}:// shards need a package that is not installed: {advice} ({error})")
