"""``results.jsonl``: one line for each finished eval, appended, never rewritten.

Beside it lies ``images/<id>.json.gz``, a value for each image and each class, for whoever compares two models.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from agglo.types import AggloError, StorageError

FORMAT = 2
"""Of a line. Format 1 was the whole file ``evals.json`` of ``agglo eval --out``, without settings or hashes."""

FILE = "results.jsonl"
IMAGES = "images"

STUDENT, UNTRAINED, TEACHER = "student", "untrained", "teacher"
"""``role`` of the models of a training run; the first two are their names as well."""


class ResultError(AggloError, ValueError):
    """A result file cannot be read or written as it is; says what to do."""


@dataclass(frozen=True, slots=True)
class Result:
    """One finished eval of one model.

    Args:
        name: of the result: the eval's kind, or what a suite or protocol calls it (``knn@224``).
        kind: the eval's kind.
        model: ``name``, ``hash``, ``parameters`` and whatever else is known of it.
        settings: every key of the eval, defaults filled in, without the places of files.
        protocol: hash of the settings.
        data: split → ``{source, images, hash}`` of each data set it read, ``{source, hash}`` of each file.
        metrics: metric → finite number.
        lower_is_better: the metrics that are better when lower.
        protocol_name: the published protocol that it was run as (``nvidia``), if any.
        view: ``(H, W)`` in pixels at which the model saw the images; None where the eval has no size, or whole images
            several (``aspect: keep``).
        seconds: it took, with encoding.
        versions: of the packages that can change a number.
        hardware: the processor, its threads, the device.
        time: when it ended, ISO 8601, UTC.
        notes: what a reader must know, e.g. images that were skipped.
        inputs: key → hash of each file of answers that was measured in the model's place.
    """

    name: str
    kind: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    protocol: str
    data: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, float]
    lower_is_better: tuple[str, ...] = ()
    protocol_name: str | None = None
    view: tuple[int, int] | None = None
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] = field(default_factory=dict)
    time: str = ""
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_hash(self) -> str:
        """Hash of all data sets that were read."""
        return data_digest(self.data)

    @property
    def id(self) -> str:
        """Same model, protocol, data, answers and version of agglo: same id. The file of its images has this name."""
        agglo = self.versions.get("agglo", "")
        return identifier(str(self.model["hash"]), self.protocol, self.data_hash, agglo, self.inputs)

    @property
    def column(self) -> tuple[str, str]:
        """What two numbers must share to stand in one column: the protocol's and the data's hash."""
        return self.protocol, self.data_hash


@dataclass(frozen=True, slots=True)
class PerImage:
    """What was recorded of single images.

    Args:
        images: metric → image → value.
        classes: metric → class → value.
    """

    images: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    classes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def identifier(model: str, protocol: str, data: str, agglo: str, inputs: Mapping[str, str] | None = None) -> str:
    """The id of a result, known before it is there; without ``inputs`` it is that of the other four."""
    return _digest([model, protocol, data, agglo, *([dict(inputs)] if inputs else [])])[:16]


def data_digest(data: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash of several data sets (:attr:`Result.data`)."""
    hashes = {split: str(facts["hash"]) for split, facts in data.items()}
    return next(iter(hashes.values())) if len(hashes) == 1 else _digest(hashes)


def current(results: Sequence[Result]) -> list[Result]:
    """Results without those of replaced models: of each role and name, the newest model only.

    A resumed run has results of several students; models without a role are all kept.
    """
    newest = {(r.model["role"], r.model["name"]): r.model["hash"] for r in results if "role" in r.model}
    return [
        r for r in results if newest.get((r.model.get("role"), r.model["name"]), r.model["hash"]) == r.model["hash"]
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# --- writing ----------------------------------------------------------------------------------------------------------


def append(folder: Path, result: Result, images: PerImage | None = None) -> Path:
    """Add a result to a folder's ``results.jsonl``; its images first, so that no line promises what is not there.

    Raises:
        ResultError: a metric is not finite: no such number is kept.
        StorageError: the disk is full or the folder read-only; what was there before is as it was.
    """
    bad = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if bad:
        raise ResultError(f"{result.name}: {', '.join(bad)} is not a finite number, so it is not kept as a result")
    line = json.dumps({"format": FORMAT, "id": result.id, **asdict(result)}, allow_nan=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if images is not None and (images.images or images.classes):
            _write_images(folder / IMAGES / f"{result.id}.json.gz", images)
        _add_line(folder / FILE, line)
    except OSError as error:
        raise StorageError(
            f"the result of {result.name} cannot be written to {folder} ({error.strerror or error}): free some space "
            "or name another folder with --out, and run the same command again; the results there are kept"
        ) from None
    return folder / FILE


def _add_line(path: Path, line: str) -> None:
    """All of the line at the end of the file, or none of it."""
    # A line that a killed process left half-written must not swallow this one.
    size = path.stat().st_size if path.is_file() else 0
    content = (("\n" if size and _last_byte(path) != b"\n" else "") + line).encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(handle, content)  # one call: appends of two processes do not mix
        if written < len(content):
            os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)
    finally:
        os.close(handle)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def _write_images(path: Path, images: PerImage) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "images": images.images, "classes": images.classes})
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        partial.write_bytes(gzip.compress(text.encode(), mtime=0))
        partial.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


# --- reading ----------------------------------------------------------------------------------------------------------


def read(place: str | Path) -> list[Result]:
    """The results of a folder (or of a ``results.jsonl``), oldest first; of one id the newest only.

    Lines that are cut off or damaged are left out and counted in a warning.

    Raises:
        ResultError: there is no such file, or it is of another format; says what to do.
    """
    path = results_file(place)
    found: dict[str, Result] = {}
    damaged = 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        result = _parse(entry, path, number)
        found.pop(result.id, None)
        found[result.id] = result
    if damaged:
        warnings.warn(f"{path}: {damaged} damaged line{'s' if damaged > 1 else ''} left out", stacklevel=2)
    return list(found.values())


def results_file(place: str | Path) -> Path:
    """The ``results.jsonl`` that a path means.

    Raises:
        ResultError: there is none; an older layout is recognised and named.
    """
    path = Path(place)
    if path.is_dir():
        for candidate in (path / FILE, path / "evals" / FILE):
            if candidate.is_file():
                return candidate
        if (path / "evals.json").is_file() or list(path.glob("*.json")):
            raise ResultError(f"{path} holds results of format 1 (.json) and no {FILE}: {_AGAIN}")
        raise ResultError(f"{path} holds no {FILE}: make one with `agglo eval MODEL --out {path}`")
    if not path.exists():
        raise ResultError(f"there are no results at {path}: make some with `agglo eval MODEL --out FOLDER`")
    if path.suffix == ".json":
        raise ResultError(f"{path} is of format 1 (.json), this version reads {FILE} of format {FORMAT}: {_AGAIN}")
    return path


_AGAIN = (
    "it says neither the settings nor the data behind its numbers, so measure again: `agglo eval MODEL --out FOLDER`"
)


def _parse(entry: Any, path: Path, number: int) -> Result:
    where = f"{path}, line {number}"
    version = entry.get("format", 1) if isinstance(entry, dict) else 1
    if not isinstance(version, int) or version < FORMAT:
        raise ResultError(
            f"{where} is of format {version}, this version reads {FORMAT}: {_AGAIN}; then move {path} away"
        )
    if version > FORMAT:
        raise ResultError(f"{where} is of format {version}, this version reads {FORMAT}: pip install --upgrade agglo")
    known = {item.name for item in fields(Result)}
    try:
        values = {key: value for key, value in entry.items() if key in known}
        for key in ("lower_is_better", "notes"):
            values[key] = tuple(values.get(key, ()))
        values["view"] = None if values.get("view") is None else tuple(values["view"])
        values["metrics"] = {str(name): float(value) for name, value in values["metrics"].items()}
        result = Result(**values)
        _ = result.id
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ResultError(f"{where} is no result ({error}): remove the line") from None
    return result


def read_images(place: str | Path, result: Result) -> PerImage | None:
    """What a result knows of single images and classes; None where nothing was recorded.

    Raises:
        ResultError: the file is damaged.
    """
    path = results_file(place).parent / IMAGES / f"{result.id}.json.gz"
    if not path.is_file():
        return None
    try:
        entry = json.loads(gzip.decompress(path.read_bytes()))
        return PerImage(entry["images"], entry["classes"])
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise ResultError(
            f"{path} is damaged ({error}): delete it and measure again with `agglo eval --again`"
        ) from None
