"""What the evals of a suite share: opened sources, and encoded image sets in memory or in files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from agglo.config import build
from agglo.files import replacing
from agglo.results.identity import images_hash
from agglo.sources.base import Source
from agglo.types import AggloError, ConfigError

VERSION = 1
"""Of the file format and of the preprocessing: files of another version are not read."""

T = TypeVar("T")


# --- sources ----------------------------------------------------------------------------------------------------------


class SourcePool:
    """Sources by their options, each built once and read ahead by ``workers`` threads. A context manager.

    Images and their order do not depend on ``workers``.

    Raises:
        ConfigError: ``workers`` is negative.
    """

    def __init__(self, workers: int = 0) -> None:
        if workers < 0:
            raise ConfigError(f"workers must be a number of threads, 0 to read in the main one; got {workers}")
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers, "agglo-read") if workers else None
        self._sources: dict[str, Source] = {}
        self._ahead: dict[int, ReadAhead] = {}

    def open(self, options: Mapping[str, Any] | Source) -> Source:
        """Build the source of ``options``, or return the one built before; a source is returned as it is."""
        if isinstance(options, Source):
            return options
        key = source_key(options)
        if key not in self._sources:
            source = build("sources", dict(options))
            if not isinstance(source, Source):
                raise ConfigError(f"{dict(options)} is not a source of images")
            if self._threads is not None:
                self._ahead[id(source)] = ReadAhead(source, self._threads, 4 * self.workers)
            self._sources[key] = source
        return self._sources[key]

    def reader(self, source: Source) -> Callable[[int], Image.Image]:
        """A function that returns image ``index`` of a source; of one opened here, threads read the next ones ahead."""
        return self._ahead.get(id(source), source.read)

    def close(self) -> None:
        """Stop the threads; images that wait to be read are dropped."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> SourcePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ReadAhead:
    """``source.read``, while threads read the next images.

    Args:
        source: thread-safe, as every source is.
        threads: executor that reads.
        depth: number of images ahead.
    """

    def __init__(self, source: Source, threads: ThreadPoolExecutor, depth: int) -> None:
        self._read: Callable[[int], Image.Image] = source.read
        self._count = len(source)
        self._threads = threads
        self._depth = depth
        self._waiting: dict[int, Future[Image.Image]] = {}

    def __call__(self, index: int) -> Image.Image:
        """Return image ``index``; raises what reading it raised."""
        own = self._waiting.pop(index, None)
        window = range(index + 1, min(self._count, index + 1 + self._depth))
        for stale in [at for at in self._waiting if at not in window]:
            self._waiting.pop(stale).cancel()
        for at in window:
            if at not in self._waiting:
                self._waiting[at] = self._threads.submit(self._read, at)
        return self._read(index) if own is None else own.result()


def source_key(options: Mapping[str, Any] | Source) -> str:
    """Options as canonical JSON; of a source that was passed as an object, its identity."""
    return f"object {id(options)}" if isinstance(options, Source) else json.dumps(dict(options), sort_keys=True)


# --- features ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded set of images. All tensors are on the CPU; float32, the summary in ``encode``'s ``precision``.

    Args:
        names: the N readable images, in the source's order.
        index: their indices in the source.
        summary: ``(N, D)``; of a model without one (HOG, SAM) the mean-pooled spatial map.
        spatial: ``(N, D', h, w)``, or None (the model has none, or it was not requested and is large).
        skipped: names of the images that could not be read.
        sizes: full ``(H, W)`` of each of the N images, before cropping.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    summary: Tensor | None
    spatial: Tensor | None
    skipped: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


class FeatureKey(NamedTuple):
    """Identity of an encoded image set.

    Args:
        source: from :func:`source_key`.
        size: of the view; with the aspect mode where it is not a crop.
        model: identity of the model, and the blocks that are read (none: its output).
        text: the text-aligned embedding instead of the summary.
        precision: of the summaries.
    """

    source: str
    size: tuple[Any, ...]
    model: tuple[int, tuple[int, ...]]
    text: bool
    precision: torch.dtype


class FeatureCache:
    """Encoded image sets in memory."""

    def __init__(self) -> None:
        self._encoded: dict[FeatureKey, Encoded] = {}
        self._objects: dict[tuple[Any, ...], Any] = {}
        self._alive: dict[int, object] = {}

    def get(self, key: FeatureKey) -> Encoded | None:
        """The image set stored under ``key``, if any."""
        return self._encoded.get(key)

    def put(self, key: FeatureKey, encoded: Encoded, *owners: object) -> None:
        """Store an image set; ``owners``, whose ``id`` is part of the key, are kept alive with it."""
        self._encoded[key] = encoded
        self._alive |= {id(owner): owner for owner in owners}

    def once(self, key: tuple[Any, ...], create: Callable[[], T]) -> T:
        """Return the object of ``key``; ``create`` is called the first time."""
        if key not in self._objects:
            self._objects[key] = create()
        return self._objects[key]


class FeatureStore(FeatureCache):
    """Encoded image sets in memory and in files, so that an interrupted suite, or another one, can reuse them.

    A file name is the hash of what its content depends on: model, images (names, labels, file sizes and times), size,
    text alignment, blocks and precision. Sources passed as objects have no such identity and stay in memory.

    Args:
        folder: for the files; created with the first one.
        model: the model measured.
        model_hash: its identity.
        sources: opens the sources of keys.

    Attributes:
        read: number of files read.
        written: number of files written.
    """

    def __init__(self, folder: Path, model: object, model_hash: str, sources: SourcePool) -> None:
        super().__init__()
        self.folder = folder
        self.read = self.written = 0
        self._model, self._hash, self._sources = model, model_hash, sources
        self._data: dict[str, str] = {}

    def get(self, key: FeatureKey) -> Encoded | None:
        encoded = super().get(key)
        path = self._path(key) if encoded is None else None
        if path is None or not path.is_file():
            return encoded
        try:
            encoded = _read(path)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}); the images are encoded again", stacklevel=2)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.read += 1
        super().put(key, encoded)
        return encoded

    def put(self, key: FeatureKey, encoded: Encoded, *owners: object) -> None:
        super().put(key, encoded, *owners)
        path = self._path(key)
        if path is None:
            return
        try:
            _write(path, encoded)
            self.written += 1
        except (OSError, SafetensorError) as error:
            # The metrics do not need the file; only a later suite would have been faster with it.
            warnings.warn(f"cannot store features on disk: {path.parent}: {error}", stacklevel=2)

    def _path(self, key: FeatureKey) -> Path | None:
        if key.model[0] != id(self._model) or not key.source.startswith("{"):
            return None
        if key.source not in self._data:
            self._data[key.source] = _files_hash(self._sources.open(json.loads(key.source)))
        name = f"{self._hash} blocks {list(key.model[1])}" if key.model[1] else self._hash
        rest = [] if key.precision == torch.float32 else [str(key.precision)]
        parts = json.dumps([VERSION, name, self._data[key.source], list(key.size), key.text, *rest])
        return self.folder / self._hash / f"{hashlib.sha256(parts.encode()).hexdigest()[:24]}.safetensors"


def _files_hash(source: Source) -> str:
    """:func:`images_hash` with the size and time of each file, so that a replaced file counts as another image."""
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
    with replacing(path) as partial:
        save_file(tensors, partial)


def _read(path: Path) -> Encoded:
    with safe_open(path, "pt") as file:  # mapped into memory: tensors are read when used
        facts = json.loads(file.get_tensor("facts").numpy().tobytes())
        summary, spatial = (file.get_tensor(n) if n in file.keys() else None for n in ("summary", "spatial"))  # noqa: SIM118
    names, index, skipped = (tuple(facts[key]) for key in ("names", "index", "skipped"))
    count = len(names)
    if any(tensor is not None and len(tensor) != count for tensor in (summary, spatial)) or len(index) != count:
        raise ValueError("its parts are of different lengths")
    return Encoded(names, index, summary, spatial, skipped, tuple((int(h), int(w)) for h, w in facts["sizes"]))
