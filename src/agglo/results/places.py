"""File-valued options of evals: a file is identified by its content, not by its path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from agglo.config import find
from agglo.results.content import feed_files
from agglo.types import ConfigError

GIVEN = "given"
"""Replaces the path of a data file in settings."""

LARGE = 64 * 2**20
"""Files of at least this many bytes are hashed once per size and modification time."""


def places_of(complete: Mapping[str, Any]) -> Mapping[str, str]:
    """Key → role of its files (:attr:`agglo.evals.base.Eval.places`)."""
    return getattr(find("evals", str(complete["kind"])), "places", {})


def without_places(complete: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that do not depend on the location of files.

    The path of a data file becomes :data:`GIVEN`, that of weights the hash of their content; answers and outputs are
    left out.

    Raises:
        ConfigError: weights cannot be read.
    """
    roles, found = places_of(complete), {}
    for key, value in complete.items():
        role = roles.get(key)
        place = Path(os.path.expanduser(value)) if role == "weights" and isinstance(value, str) and value else None
        if role is None or (role == "weights" and (place is None or not place.exists())):
            found[key] = value  # no such path: a name on the hub
        elif place is not None:
            found[key] = f"content {digest(place, key)}"
        elif role == "data":
            found[key] = [GIVEN] * len(value) if isinstance(value, list) else value and GIVEN
    return found


def data_of(complete: Mapping[str, Any], made: Any) -> dict[str, dict[str, Any]]:
    """The record of each file or folder of data: ``{"truth": {"source": ..., "hash": ...}}``.

    Args:
        complete: from :func:`agglo.results.identity.settings`.
        made: the eval; it lists the files that it reads of a folder.

    Raises:
        ConfigError: a file cannot be read.
    """
    found = {}
    for name, key, path in _named(complete, "data"):
        only = made.members(key) if path.is_dir() else None
        found[name] = {"source": {"kind": "file", "path": str(path)}, "hash": digest(path, key, only, sample=True)}
    return found


def answers_of(complete: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each file of answers (another program's output for the model).

    Raises:
        ConfigError: a file cannot be read.
    """
    return {name: digest(path, key) for name, key, path in _named(complete, "answers")}


def writes(complete: Mapping[str, Any]) -> bool:
    """Whether the eval writes files."""
    return any(True for _ in _named(complete, "output"))


def _named(complete: Mapping[str, Any], role: str) -> Iterator[tuple[str, str, Path]]:
    for key, own in places_of(complete).items():
        value = complete.get(key)
        if own == role and value:
            several = isinstance(value, list)
            for index, each in enumerate(value if several else [value]):
                yield f"{key}.{index}" if several else key, key, Path(os.path.expanduser(each))


def digest(path: Path, key: str, only: Sequence[str] | None = None, *, sample: bool = False) -> str:
    """Hash of a file's content, or of a folder's files and their relative names. Hidden files are ignored.

    Args:
        path: a file or a folder.
        key: of the option, for error messages.
        only: relative names of the folder's files to hash, existing or not; None for all.
        sample: hash a large folder as data: see :func:`agglo.results.content.feed_files`.

    Raises:
        ConfigError: the file or folder cannot be read.
    """
    try:
        if not path.is_dir():
            return _content(path)
        names = sorted(only) if only is not None else sorted(_below(path))
        found = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape"))
        if sample:
            feed_files(found, [path / name for name in names])
        else:
            for name in names:
                file = path / name
                found.update(f"{name}\t{_content(file) if file.is_file() else -1}\n".encode("utf-8", "surrogateescape"))
        return found.hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror or error}): name an existing file") from error


def _below(path: Path) -> Iterator[str]:
    for file in path.rglob("*"):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _content(file: Path) -> str:
    known = file.stat()
    if known.st_size < LARGE:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return _hashed(str(file.resolve()), known.st_size, known.st_mtime_ns)


@lru_cache(256)
def _hashed(file: str, size: int, time: int) -> str:
    """Hash of a large file; cached by size and modification time."""
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(LARGE):
            found.update(block)
    return found.hexdigest()[:16]
