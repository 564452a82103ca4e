"""Encoded image sets on disk, so that a suite that was interrupted, or another one, need not encode them again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from agglo.evals._features import Encoded, open_source
from agglo.results.identity import images_hash
from agglo.sources.base import Source
from agglo.types import AggloError

VERSION = 1
"""Of the files and of how images are cropped and scaled on their way to the model."""

_OBJECT = "object "

Key = tuple[Any, ...]


class Store(dict[Key, Encoded]):
    """Image sets as one suite keeps them, each also in a file of a folder.

    A file is named by what its content depends on: the model, the images (names, labels, sizes and times of their
    files, where there are any), the size, whether it is the text-aligned embedding, the precision. What cannot be named
    so (a source that is an object, not options) stays in memory.

    Args:
        folder: of the files; made when the first is written.
        model: whose features.
        model_hash: what identifies it.
        kept: objects derived from the model within the suite, such as its view through several blocks.
    """

    def __init__(self, folder: Path, model: object, model_hash: str, kept: Mapping[Any, Any]) -> None:
        super().__init__()
        self.folder = folder
        self._model, self._hash, self._kept = model, model_hash, kept
        self._data: dict[str, str] = {}
        self.read = self.written = 0

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        found = self._load(key) if isinstance(key, tuple) else None
        if found is None or not isinstance(key, tuple):
            return False
        super().__setitem__(key, found)
        self.read += 1
        return True

    def __setitem__(self, key: Key, value: Encoded) -> None:
        super().__setitem__(key, value)
        path = self._path(key)
        if path is None:
            return
        try:
            _write(path, value)
            self.written += 1
        except (OSError, SafetensorError) as error:
            # The numbers do not need the file; only a later suite would have been faster for it.
            warnings.warn(f"features are not kept on disk: {path.parent}: {error}", stacklevel=2)

    def _load(self, key: Key) -> Encoded | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            return _read(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}): the images are encoded again", stacklevel=2)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def _path(self, key: Key) -> Path | None:
        source, size, model, text, precision = key
        name = self._name(model)
        if name is None or str(source).startswith(_OBJECT):
            return None
        if source not in self._data:
            self._data[source] = _identity(open_source(json.loads(source)))
        kept = [] if precision == torch.float32 else [str(precision)]
        parts = json.dumps([VERSION, name, self._data[source], list(size), bool(text), *kept])
        return self.folder / self._hash / f"{hashlib.sha256(parts.encode()).hexdigest()[:24]}.safetensors"

    def _name(self, model: int) -> str | None:
        if model == id(self._model):
            return self._hash
        for each in self._kept.values():
            if id(each) == model and getattr(each, "model", None) is self._model and hasattr(each, "blocks"):
                return f"{self._hash} blocks {each.blocks}"
        return None


def _identity(source: Source) -> str:
    """:func:`images_hash`, with size and time of each file: on this machine, a replaced file is another one."""
    digest = hashlib.sha256(images_hash(source).encode())
    place = getattr(source, "file", None)
    for index in range(len(source)) if callable(place) else ():
        try:
            facts = os.stat(place(index))  # type: ignore[arg-type]
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
        except (OSError, AggloError):
            digest.update(b"missing\n")
    return digest.hexdigest()[:24]


def _write(path: Path, encoded: Encoded) -> None:
    facts = {"names": encoded.names, "index": encoded.index, "skipped": encoded.skipped, "sizes": encoded.sizes}
    tensors = {"facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}
    for name in ("summary", "spatial"):
        tensor = getattr(encoded, name)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        save_file(tensors, partial)
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def _read(path: Path) -> Encoded:
    with safe_open(path, "pt") as file:  # mapped into memory: what is not looked at is not read
        facts = json.loads(file.get_tensor("facts").numpy().tobytes())
        summary, spatial = (file.get_tensor(n) if n in file.keys() else None for n in ("summary", "spatial"))  # noqa: SIM118
    names, index, skipped = (tuple(facts[key]) for key in ("names", "index", "skipped"))
    count = len(names)
    if any(tensor is not None and len(tensor) != count for tensor in (summary, spatial)) or len(index) != count:
        raise ValueError("its parts are of different lengths")
    return Encoded(names, index, summary, spatial, skipped, tuple((int(h), int(w)) for h, w in facts["sizes"]))
