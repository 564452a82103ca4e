"""A cache's folder: one writer at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from agglo.cache import identity
from agglo.types import ConfigError

LOCK = ".lock"
_OWN = {LOCK, identity.MANIFEST + identity.PARTIAL}
"""What a writer that was killed may have left in a folder that was new."""


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """See that no other process writes; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another one does; or the folder holds something else, and nothing is left in it.
        OSError: it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name another folder with --out")
    new = not (folder / identity.MANIFEST).is_file()
    if new and folder.is_dir() and any(path.name not in _OWN for path in folder.iterdir()):
        raise ConfigError(f"{folder} is in use and is no feature cache: name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            import fcntl
        except ImportError:  # no such locks here: one writer at a time is then up to whoever starts them
            fcntl = None
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"another process is writing to {folder}: wait for it, or name another folder"
                ) from None
        yield
    finally:
        os.close(file)
