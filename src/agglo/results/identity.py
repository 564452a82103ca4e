"""Hashes that identify a result: of the model's weights, of the images and their ground truth, of the settings."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agglo.config import NESTED, check_options, find
from agglo.results.content import CHEAP_BYTES, SAMPLE, data_files, feed_files, read_or_mark, spread
from agglo.results.places import without_places
from agglo.results.truth import truth_hash
from agglo.sources.base import Source
from agglo.types import ImageError

PLACES = frozenset({"path", "shards", "dataset", "revision"})
"""Keys of sources that locate files on one machine. The content of the files is in the data's hash."""

CHEAP_PIXELS = 64 * 2**20
"""Images without stored bytes are all hashed if they take at most this many bytes as decoded."""


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """An eval's options with all defaults, those of its sources included, as JSON data.

    Raises:
        ConfigError: the options do not fit.
    """
    complete = check_options("evals", {key: value for key, value in options.items() if key != "name"}, "evals")
    for key, value in complete.items():
        if key in NESTED and isinstance(value, Mapping):
            complete[key] = check_options(NESTED[key], value, f"evals.{key}")
        elif key in NESTED and isinstance(value, list | tuple):
            complete[key] = [check_options(NESTED[key], each, f"evals.{key}") for each in value]
    return json.loads(json.dumps(complete, default=str))


def portable(complete: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without paths: equal on every machine."""

    def strip(value: Any, inside: bool) -> Any:
        if isinstance(value, Mapping):
            return {k: strip(v, inside) for k, v in value.items() if not (inside and k in PLACES)}
        return [strip(v, inside) for v in value] if isinstance(value, list) else value

    return {key: strip(value, key in NESTED) for key, value in without_places(complete).items()}


def protocol_hash(complete: Mapping[str, Any], **more: Any) -> str:
    """Hash of the settings, the eval's ``revision`` and ``more``.

    Args:
        complete: from :func:`settings`.
        more: other JSON data that the numbers depend on (the teachers of ``agreement``).
    """
    revision = getattr(find("evals", str(complete["kind"])), "revision", 1)
    return _digest({"settings": portable(complete), "revision": revision, **more})


def sources_of(complete: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The options of each source of an eval by its key (``train``, ``test``, ``sources.0``)."""
    found: dict[str, Mapping[str, Any]] = {}
    for key, value in complete.items():
        if NESTED.get(key) == "sources":
            several = value if isinstance(value, list) else [value]
            for index, each in enumerate(several):
                if isinstance(each, Mapping):
                    found[f"{key}.{index}" if isinstance(value, list) else key] = each
    return found


def data_hash(source: Source) -> str:
    """Hash of the images (:func:`images_hash`) and of their ground truth, if there is any."""
    images, truth = images_hash(source), truth_hash(source)
    return images if truth is None else hashlib.sha256(f"{images} {truth}".encode()).hexdigest()[:16]


def images_hash(source: Source) -> str:
    """Hash of a set of images: their number, names and labels, and their content where that is cheap.

    - Images in files: see :func:`agglo.results.content.feed_files`.
    - Other images: all of them up to :data:`agglo.results.content.CHEAP_BYTES` as stored, or :data:`CHEAP_PIXELS` as
      decoded; of a larger set :data:`SAMPLE` images, and the size and time of the source's ``data_files()``.

    The root folder's name is left out, so that a data set may be moved.
    """
    label: Callable[[int], Any] | None = getattr(source, "label", None)
    file: Callable[[int], Any] | None = getattr(source, "file", None)
    digest = hashlib.sha256(str(len(source)).encode())
    for index in range(len(source)):
        name = source.name(index)
        if callable(file):  # the root folder's name comes first
            name = name.partition("/")[2]
        digest.update(f"{name}\t{None if label is None else label(index)}\n".encode("utf-8", "surrogateescape"))
    if callable(file):
        feed_files(digest, [Path(file(index)) for index in range(len(source))])
    elif (whole := _all_content(source)) is not None:
        digest.update(whole)
    else:
        feed_files(digest, data_files(source))
        for index in spread(len(source), SAMPLE):
            digest.update(_bytes(source, index))
    return digest.hexdigest()[:16]


def _all_content(source: Source) -> bytes | None:
    """Hash of every image, or None if they exceed the limit; then at most that much was read."""
    left = CHEAP_BYTES if callable(getattr(source, "encoded", None)) else CHEAP_PIXELS
    digest = hashlib.sha256()
    for index in range(len(source)):
        content = _bytes(source, index)
        left -= len(content)
        if left < 0:
            return None
        digest.update(f"{len(content)} ".encode())
        digest.update(content)
    return digest.digest()


def _bytes(source: Source, index: int) -> bytes:
    encoded: Callable[[int], bytes] | None = getattr(source, "encoded", None)
    try:
        return source.read(index).tobytes() if encoded is None else encoded(index)
    except ImageError:
        return b"unreadable"


def model_hash(model: object, *more: Any) -> str:
    """Hash of a model's configuration and of all its tensors.

    Of a teacher, the mean, standard deviation and size of its processor count too; of a folder that the options name,
    its JSON files.

    Args:
        model: a Model, a Teacher, anything that encodes images.
        more: the options that it was built from, JSON data.
    """
    config: Callable[[], Mapping[str, Any]] | None = getattr(model, "config", None)
    known = {k: v for k, v in config().items() if k != "provenance"} if callable(config) else _plain(model)
    processor = getattr(model, "processor", None)
    beside = [dict(processor)] if isinstance(processor, Mapping) and processor else []
    facts = [type(model).__qualname__, known, *more, *beside, *_configurations(more)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    tensors = model.state_dict() if isinstance(model, nn.Module) else {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _configurations(options: Any) -> list[tuple[str, str]]:
    """Name and hash of each JSON file in the local folders that options name."""
    if isinstance(options, Mapping | list | tuple):
        values = options.values() if isinstance(options, Mapping) else options
        return [found for value in values for found in _configurations(value)]
    if not isinstance(options, str) or not options:
        return []
    folder = Path(options).expanduser()
    try:
        files = sorted(file for file in folder.glob("*.json") if file.is_file()) if folder.is_dir() else []
    except (OSError, ValueError):
        return []
    return [(file.name, read_or_mark(file).hex()) for file in files]


def _plain(model: object) -> dict[str, Any]:
    """The constructor's arguments that the object keeps under the same name: numbers, strings or lists of them."""
    simple = (int, float, str, bool, type(None))
    found = {name: vars(model).get(name) for name in inspect.signature(type(model).__init__).parameters}
    return {
        name: value
        for name, value in found.items()
        if all(isinstance(each, simple) for each in (value if isinstance(value, tuple | list) else [value]))
    }


def takes_teachers(kind: str) -> bool:
    """Whether an eval of this kind compares with teachers."""
    parameters = inspect.signature(find("evals", kind)).parameters.values()
    return any(p.kind is p.POSITIONAL_ONLY for p in parameters)


def file_name(text: str) -> str:
    """A name of a model, a file or a repository as one component of a path."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "model"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
