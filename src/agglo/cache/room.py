"""Room on the disk: how much a cache will take, how much there is, and what to say of a disk that takes no more."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from agglo.cache.coding import Coding
from agglo.cache.folder import size_text
from agglo.cache.records import HEADER
from agglo.teachers.base import Teacher
from agglo.types import AggloError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def record_bytes(teacher: Teacher, dtype: str, grids: Iterable[tuple[int, int]]) -> float:
    """Of one record of a teacher, in bytes, as a mean over the grids of its map."""
    with torch.device("meta"):
        coding = Coding(teacher.spec, dtype)
    lengths = [HEADER.size + coding.bytes(grid) for grid in grids]
    return sum(lengths) / len(lengths)


def outlook(folder: Path, canvases: int, each: float, left: int, dtype: str) -> list[str]:
    """What a person wants to know before it begins.

    Args:
        folder: of the cache.
        canvases: it is to hold.
        each: bytes of one.
        left: bytes that are still to be written.
        dtype: their number format.
    """
    free = shutil.disk_usage(folder).free
    told = [
        f"{canvases} canvases, about {each / 1e3:.1f} kB each as {dtype}: {size_text(left)} to write, "
        f"{size_text(free)} free in {folder}"
    ]
    if left > free:
        told.append(f"{size_text(left - free)} more are needed than are free: it will stop when that is full")
    return told


@contextlib.contextmanager
def writing_to(folder: Path, state: Callable[[], str]) -> Iterator[None]:
    """Turn what the system says of a disk into what is kept, what is missing and what to do.

    Args:
        folder: of the cache.
        state: what to say of what is there and what is not.

    Raises:
        StorageError: the disk is full, or takes nothing for another reason.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, AggloError):
            raise
        full = error.errno in _FULL
        why = "the disk is full" if full else f"it cannot be written to ({error.strerror or error})"
        move = "Make room" if full else "Make it writable"
        raise StorageError(
            f"{folder}: {why}. {state()}. {move} and run the same command again: it goes on where it stopped"
        ) from error
