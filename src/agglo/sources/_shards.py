"""Shards: tar files on this machine, on a web server or in an object store, each with its index."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from agglo.extras import require
from agglo.sources._index import Table, Writer, place, read
from agglo.sources._paths import braces, expanded
from agglo.sources._tar import ShardError, survey
from agglo.sources.base import SourceError
from agglo.types import ConfigError, MissingExtraError

_log = logging.getLogger(__name__)

TRIES = 4
PAUSE = 0.5
"""Seconds before the second try of a remote read; doubled before each further one."""
_SIGNS = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "md5Hash", "generation")
"""What tells that a remote file has changed, in the words of several stores."""

_GONE, _DENIED = (404, 410), (401, 403)
"""What a web server answers where there is no such file, and where it gives it to others only."""

Result = TypeVar("Result")


def locate(patterns: Sequence[str]) -> list[Shard]:
    """The shards that paths, globs, brace ranges and folders name, in that order, each once.

    Raises:
        ConfigError: a pattern that names nothing.
        MissingExtraError: what its protocol needs is not installed.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            raise ConfigError(f"{pattern}: programs in a recipe are not run; name the object store, e.g. s3://...")
        for path in braces(expanded(pattern)):
            found.update(dict.fromkeys(_globbed(path, pattern)))
    return [Shard(path) for path in found]


def _globbed(path: str, pattern: str) -> list[str]:
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if "://" in path:
        if not set("*[") & set(path):
            return [path]
        filesystem, inner = _filesystem(path)
        hits = sorted(reach(path, lambda: filesystem.glob(inner)))
        names = [filesystem.unstrip_protocol(hit) for hit in hits]
    else:
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            path = os.path.join(glob.escape(path), "*.tar")
        elif not glob.has_magic(path):
            return [path]
        names = sorted(glob.glob(path, recursive=True))
    if not names:
        raise ConfigError(f"source webdataset: no shard matches {pattern!r}: looked for {path}")
    return names


@dataclass
class Shard:
    """One tar file.

    Args:
        path: on this machine, or a URL.
        local: where its bytes are on this machine, if they are.
        size: in bytes.
        stamp: changes when the file does.
    """

    path: str
    local: str | None = field(default=None)
    size: int = -1
    stamp: str = ""

    @property
    def remote(self) -> bool:
        """Whether it lies elsewhere."""
        return "://" in self.path

    def look(self) -> None:
        """Find its size and stamp.

        Raises:
            FileNotFoundError: there is none.
            SourceError: it cannot be reached.
        """
        if not self.remote:
            facts = os.stat(self.path)
            self.local, self.size, self.stamp = self.path, facts.st_size, str(facts.st_mtime_ns)
            return
        filesystem, inner = _filesystem(self.path)
        facts = reach(self.path, lambda: filesystem.info(inner))
        if facts.get("size") is None:
            raise SourceError(
                f"{self.path}: its server does not say how large it is; copy the shards to a local folder"
            )
        self.size = int(facts["size"])
        self.stamp = "|".join(f"{sign}={facts[sign]}" for sign in _SIGNS if facts.get(sign) is not None)

    def keep(self) -> None:
        """Copy a remote shard into the cache folder, unless it is there."""
        target = place("shard", self.path, self.size, self.stamp).with_suffix(".tar")
        if not (target.is_file() and target.stat().st_size == self.size):
            filesystem, inner = _filesystem(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            os.close(handle)
            try:
                if shutil.disk_usage(target.parent).free < self.size:
                    raise OSError(f"{self.size} bytes are needed")
                reach(self.path, lambda: filesystem.get_file(inner, beside))
                os.replace(beside, target)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.unlink(beside)
                if isinstance(error, SourceError):
                    raise
                _log.warning("%s is not kept in %s (%s); it is read where it lies", self.path, target.parent, error)
                return
        self.local = str(target)

    def table(self, wanted: frozenset[str]) -> Table:
        """Its index, from the cache folder where that is of this very file.

        Raises:
            ShardError: no shard.
            SourceError: it cannot be reached.
        """
        kept = self.index(wanted)
        table = read(kept)
        if table is not None:
            return table
        if self.local is None:
            return reach(self.path, lambda: self._indexed(wanted, kept))
        try:
            return self._indexed(wanted, kept)
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read ({error.strerror or error})") from error

    def _indexed(self, wanted: frozenset[str], kept: Path) -> Table:
        with Writer("offset", "size") as writer, self._open() as file:
            found = survey(file, self.size, wanted, writer)
            return writer.finish({"damage": found.damage, "others": dict(found.others)}, kept)

    def index(self, wanted: frozenset[str]) -> Path:
        """Where its index is kept. The name holds what it depends on."""
        path = self.path if self.remote else os.path.abspath(self.path)
        return place("tar", path, self.size, self.stamp, sorted(wanted))

    def _open(self) -> BinaryIO:
        if self.local is not None:
            return open(self.local, "rb")
        filesystem, inner = _filesystem(self.path)
        return filesystem.open(inner, "rb")

    def read(self, offset: int, size: int) -> bytes:
        """Some of its bytes.

        Raises:
            SourceError: they cannot be had, or the file is not the one that was indexed.
        """
        if self.local is None:
            filesystem, inner = _filesystem(self.path)
            data = reach(self.path, lambda: filesystem.cat_file(inner, start=offset, end=offset + size))
            if len(data) != size:
                raise SourceError(
                    f"{self.path}: asked for {size} bytes at {offset}, got {len(data)}: its server does not give parts "
                    "of files, or the file has changed. Set keep_gb, or copy the shards to a local folder"
                )
            return data
        try:
            with open(self.local, "rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_size != self.size or (not self.remote and str(facts.st_mtime_ns) != self.stamp):
                    raise SourceError(f"{self.path} changed while it was in use; start again, which indexes it anew")
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{self.path} cannot be read ({error}); bring it back and go on from here") from error


def reach(path: str, action: Callable[[], Result]) -> Result:
    """Do something far away, trying again when it fails.

    Raises:
        FileNotFoundError: there is no such file.
        SourceError: it failed every time.
    """
    attempt = 1
    while True:
        try:
            return action()
        except ShardError:
            raise
        except Exception as error:
            trouble = _trouble(path, error)
            if isinstance(trouble, FileNotFoundError):
                raise
            if isinstance(trouble, PermissionError) or getattr(trouble, "status", None) in _DENIED:
                denied = f"{path}: access is denied ({trouble}); give the store's usual credentials"
                raise SourceError(denied) from error
            if isinstance(trouble, ImportError):
                raise _not_installed(path, trouble) from error
            if attempt == TRIES:
                why = f"{type(trouble).__name__}: {trouble}".strip(": ")
                advice = "check the network, or copy the shards here and name the copy"
                raise SourceError(f"{path} cannot be reached, {TRIES} times ({why}); {advice}") from error
        time.sleep(PAUSE * 2 ** (attempt - 1))
        attempt += 1


def _trouble(path: str, error: BaseException) -> BaseException:
    """What really went wrong: fsspec calls whatever it does not get from a web server a file that does not exist."""
    found: BaseException | None = error
    while isinstance(found, FileNotFoundError) and path.startswith("http"):
        found = found.__cause__ or found.__context__
    return error if found is None or getattr(found, "status", None) in _GONE else found


_LOCK = threading.Lock()


def _filesystem(path: str) -> tuple[Any, str]:
    with _LOCK:
        return _connected(path.partition("://")[0]), path if path.startswith("http") else path.partition("://")[2]


@lru_cache(maxsize=16)
def _connected(protocol: str) -> Any:
    """The file system of a protocol, with the credentials that it finds for itself (variables, files, roles)."""
    fsspec = require("fsspec", "data")
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise _not_installed(f"{protocol}://", error) from error
    except ValueError as error:
        raise ConfigError(f"source webdataset: no way to read {protocol}:// ({error})") from error


def _not_installed(path: str, error: ImportError) -> MissingExtraError:
    protocol = path.partition("://")[0]
    package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(protocol)
    advice = 'pip install "agglo[data]"' if package is None else f"pip install {package}"
    return MissingExtraError(f"{protocol}:// shards need a package that is not installed: {advice} ({error})")
