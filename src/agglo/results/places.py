"""The files that an eval's own keys name: where they lie is no part of a measurement, what they hold is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from agglo.config import find
from agglo.types import ConfigError

GIVEN = "given"
"""Stands in settings for the place of a file of data."""

SAMPLE = 16
"""Files whose content is part of the hash of a folder of data; of all others name and size are."""


LARGE = 64 * 2**20
"""Bytes from which on a file that was hashed is not read again while its size and time stay."""


def places_of(complete: Mapping[str, Any]) -> Mapping[str, str]:
    """Key → role of the files that it names, as :attr:`agglo.evals.base.Eval.places` has it."""
    return getattr(find("evals", str(complete["kind"])), "places", {})


def without_places(complete: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are the same wherever the files lie.

    Files of data are named as given or not, weights in a folder by what they hold; answers and places that are written
    to are left out.

    Raises:
        ConfigError: a folder of weights that cannot be read.
    """
    roles, found = places_of(complete), {}
    for key, value in complete.items():
        role = roles.get(key)
        place = Path(os.path.expanduser(value)) if role == "weights" and isinstance(value, str) and value else None
        if role is None or (role == "weights" and (place is None or not place.exists())):
            found[key] = value  # weights that lie nowhere here are a name on the hub
        elif place is not None:
            found[key] = f"content {digest(place, key)}"
        elif role == "data":
            found[key] = [GIVEN] * len(value) if isinstance(value, list) else value and GIVEN
    return found


def data_of(complete: Mapping[str, Any], made: Any) -> dict[str, dict[str, Any]]:
    """What a result says of each file or folder of data: ``{"truth": {"source": ..., "hash": ...}}``.

    Args:
        complete: from :func:`agglo.results.identity.settings`.
        made: the eval, which knows the files of a folder that it reads.

    Raises:
        ConfigError: one that cannot be read.
    """
    found = {}
    for name, key, path in _named(complete, "data"):
        only = made.members(key) if path.is_dir() else None
        found[name] = {"source": {"kind": "file", "path": str(path)}, "hash": digest(path, key, only, sample=True)}
    return found


def answers_of(complete: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each file of answers: of what another program made of the model, and what is measured here.

    Raises:
        ConfigError: one that cannot be read.
    """
    return {name: digest(path, key) for name, key, path in _named(complete, "answers")}


def writes(complete: Mapping[str, Any]) -> bool:
    """Whether the eval writes files, so that its numbers alone are not all that is wanted of it."""
    return any(True for _ in _named(complete, "output"))


def _named(complete: Mapping[str, Any], role: str) -> Iterator[tuple[str, str, Path]]:
    for key, own in places_of(complete).items():
        value = complete.get(key)
        if own == role and value:
            several = isinstance(value, list)
            for index, each in enumerate(value if several else [value]):
                yield f"{key}.{index}" if several else key, key, Path(os.path.expanduser(each))


def digest(path: Path, key: str, only: Sequence[str] | None = None, *, sample: bool = False) -> str:
    """Of what a file holds; of a folder, of its files and their names below it. Hidden files do not count.

    Args:
        path: a file or a folder.
        key: that names it, for messages.
        only: the files of the folder that count, by their names below it; None: all. Those that are not there count
            as that.
        sample: of a folder, names and sizes count, and the content of :data:`SAMPLE` files only.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if not path.is_dir():
            return _content(path)
        names = sorted(only) if only is not None else sorted(_below(path))
        whole = set(range(len(names)))
        if sample:
            whole = {i * len(names) // SAMPLE for i in range(SAMPLE)} & whole
        found = hashlib.sha256()
        for index, name in enumerate(names):
            file = path / name
            size = file.stat().st_size if file.is_file() else -1
            found.update(f"{name}\t{size}\t{_content(file) if index in whole and size >= 0 else ''}\n".encode())
        return found.hexdigest()[:16]
    except OSError as error:
        raise ConfigError(
            f"{key}: {path} cannot be read ({error.strerror or error}): name a file that is there"
        ) from error


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
    """Gigabytes of weights are read once, as long as their size and time are those of before."""
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(LARGE):
            found.update(block)
    return found.hexdigest()[:16]
