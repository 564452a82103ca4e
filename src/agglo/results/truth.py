"""Hash of a source's ground truth: masks, maps, key points, captions, queries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from agglo.results.content import data_files, feed_files, spread
from agglo.sources.base import Source
from agglo.types import ConfigError, ImageError

TRUTHS = 64
"""Number of images, spread over the source, whose annotation is hashed if all of them are large."""

CHEAP_ARRAYS = 64 * 2**20
"""Annotations without files are all hashed if their arrays take at most this many bytes."""


def truth_hash(source: Source) -> str | None:
    """Hash of a source's ground truth beside labels; None if it has none.

    - ``query(index)`` and ``captions(index)`` of every image, and all ``pairs()``;
    - ``annotation_files(index)``: see :func:`agglo.results.content.feed_files`;
    - without such files, every ``annotation(index)`` up to :data:`CHEAP_ARRAYS`, else those of :data:`TRUTHS` images;
    - the source's ``data_files()``.
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
    files: Callable[[int], Sequence[Path]] | None = getattr(source, "annotation_files", None)
    annotation: Callable[[int], Any] | None = getattr(source, "annotation", None)
    if files is not None:
        found = True
        own = [tuple(files(index)) for index in range(len(source))]
        feed_files(digest, list(dict.fromkeys(file for each in own for file in each)))
    elif annotation is not None:
        found = True
        _feed_annotations(digest, annotation, len(source))
    if found:
        feed_files(digest, data_files(source))
    return digest.hexdigest() if found else None


def _feed_annotations(digest: Any, annotation: Callable[[int], Any], count: int) -> None:
    """Add all annotations if they are small, else those of :data:`TRUTHS` images."""
    whole, left = hashlib.sha256(), CHEAP_ARRAYS
    for index in range(count):
        value = _readable(lambda index=index: annotation(index))
        left -= _array_bytes(value)
        if left < 0:
            break
        _feed(whole, value)
    else:
        digest.update(whole.digest())
        return
    for index in spread(count, TRUTHS):
        _feed(digest, _readable(lambda index=index: annotation(index)))


def _array_bytes(value: Any) -> int:
    """Bytes of the arrays and tensors that an annotation holds directly."""
    inner = {item.name: getattr(value, item.name) for item in fields(value)} if is_dataclass(value) else {}
    inner = inner or dict(getattr(value, "__dict__", {}))
    return sum(int(each.nbytes) for each in inner.values() if isinstance(each, np.ndarray | Tensor))


def _readable(get: Callable[[], Any]) -> Any:
    """What ``get`` returns, or a constant if it cannot be read: the eval raises if it needs that file."""
    try:
        return get()
    except (ImageError, ConfigError):
        return b"unreadable"


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
