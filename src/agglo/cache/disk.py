"""Writing to a cache's folder: one writer at a time, sizes before it begins, and errors of a full disk."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from agglo import files
from agglo.cache.coding import Coding
from agglo.cache.identity import MANIFEST
from agglo.cache.records import HEADER
from agglo.files import LOCK, PARTIAL
from agglo.teachers.base import Teacher
from agglo.types import AggloError, ConfigError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Create a cache's folder and lock it; the system releases the lock when the process ends.

    Raises:
        ConfigError: another process has the lock, or the folder contains something else.
        OSError: it cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name another folder with --out")
    new = not (folder / MANIFEST).is_file()
    if new and folder.is_dir() and any(path.name != LOCK and PARTIAL not in path.name for path in folder.iterdir()):
        raise ConfigError(f"{folder} is in use and is not a feature cache: name another folder with --out")
    with files.exclusive(folder, "wait for it, or name another folder"):
        yield


def size_text(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def record_bytes(teacher: Teacher, dtype: str, grids: Iterable[tuple[int, int]]) -> float:
    """Mean size of a teacher's records in bytes, over the grids of its maps."""
    with torch.device("meta"):
        coding = Coding(teacher.spec, dtype)
    lengths = [HEADER.size + coding.bytes(grid) for grid in grids]
    return sum(lengths) / len(lengths)


def forecast(folder: Path, crops: int, crop_bytes: float, remaining: int, dtype: str) -> list[str]:
    """Lines on the size of a cache and the free space.

    Args:
        folder: of the cache.
        crops: number of crops in the finished cache.
        crop_bytes: of one crop.
        remaining: bytes still to be written.
        dtype: of the features.
    """
    free = shutil.disk_usage(folder).free
    lines = [
        f"{crops} crops, about {crop_bytes / 1e3:.1f} kB each as {dtype}: {size_text(remaining)} to write, "
        f"{size_text(free)} free in {folder}"
    ]
    if remaining > free:
        lines.append(f"{size_text(remaining - free)} more than is free: precomputing will stop when the disk is full")
    return lines


@contextlib.contextmanager
def writing_to(folder: Path, state: Callable[[], str]) -> Iterator[None]:
    """Turn an OSError into a StorageError that names what is kept, what is missing and what to do.

    Args:
        folder: of the cache.
        state: returns how much is written and how much is missing.

    Raises:
        StorageError: the disk is full, or not writable.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, AggloError):
            raise
        full = error.errno in _FULL
        why = "the disk is full" if full else f"cannot write ({error.strerror or error})"
        move = "Free some space" if full else "Make it writable"
        raise StorageError(f"{folder}: {why}. {state()}. {move} and run the same command again to resume") from error
