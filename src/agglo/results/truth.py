"""Hash of a source's ground truth: masks, maps, key points, captions, queries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from agglo.sources.base import Source
from agglo.types import ConfigError, ImageError

TRUTHS = 64
"""Number of images, spread over the source, whose annotation is hashed if reading all would take long."""

ALL_BYTES = 64 * 2**20
"""All annotation files are hashed if their total size is at most this."""


def truth_hash(source: Source) -> str | None:
    """Hash of a source's ground truth beside labels; None if it has none.

    - ``query(index)`` and ``captions(index)`` of every image, and all ``pairs()``;
    - ``annotation_files(index)``: the size of every file, and the content of all files up to :data:`ALL_BYTES`
      together, else of those of :data:`TRUTHS` images;
    - without such files, ``annotation(index)`` of :data:`TRUTHS` images.
    """
    digest, found = hashlib.sha256(), False
    for name in ("query", "captions"):
        of: Callable[[int], Any] | None = getattr(source, name, None)
        if of is not None:
            found = True
            _feed(digest, [of(index) for index in range(len(source))])
    pairs: Callable[[], Iterable[Any]] | None = getattr(source, "pairs", None)
    if callable(pairs):
        found = True
        _feed(digest, _readable(lambda: list(pairs())))
    chosen = sorted({i * len(source) // TRUTHS for i in range(TRUTHS)}) if len(source) else []
    files: Callable[[int], Sequence[Path]] | None = getattr(source, "annotation_files", None)
    annotation: Callable[[int], Any] | None = getattr(source, "annotation", None)
    if files is not None:
        found = True
        _feed_files(digest, [tuple(files(index)) for index in range(len(source))], chosen)
    elif annotation is not None:
        found = True
        for index in chosen:
            _feed(digest, _readable(lambda index=index: annotation(index)))
    return digest.hexdigest() if found else None


def _readable(get: Callable[[], Any]) -> Any:
    """What ``get`` returns, or a constant if it cannot be read: the eval raises if it needs that file."""
    try:
        return get()
    except (ImageError, ConfigError):
        return b"unreadable"


def _feed_files(digest: Any, files: Sequence[tuple[Path, ...]], chosen: Sequence[int]) -> None:
    sizes = {file: _size(file) for file in dict.fromkeys(file for each in files for file in each)}
    _feed(digest, list(sizes.values()))  # modification times differ between copies of a data set
    whole = sum(sizes.values()) <= ALL_BYTES
    for file in sizes if whole else dict.fromkeys(file for index in chosen for file in files[index]):
        try:
            digest.update(file.read_bytes())
        except OSError:
            digest.update(b"unreadable")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _feed(digest: Any, value: Any) -> None:
    """Add a value unambiguously: arrays by type, shape and bytes, objects by their fields."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest.update(f"array {value.dtype.str} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, np.ndarray | list | tuple):
        digest.update(f"list {len(value)}".encode())
        for each in value:
            _feed(digest, each)
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}".encode())
        for key in sorted(value, key=str):
            digest.update(f"{key!r}:".encode())
            _feed(digest, value[key])
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {item.name: getattr(value, item.name) for item in fields(value)})
    elif isinstance(value, str | bytes | int | float | np.generic | None):
        text = repr(value.item() if isinstance(value, np.generic) else value)
        digest.update(f"{len(text)} {text};".encode())
    else:
        digest.update(f"object {type(value).__name__}".encode())
        _feed(digest, dict(getattr(value, "__dict__", {})))
