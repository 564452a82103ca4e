"""``results.jsonl``: one line per finished eval, append-only.

Beside it lies ``images/<id>.json.gz`` with a value for each image and each class.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import math
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from agglo.files import write_bytes
from agglo.types import AggloError, StorageError

FORMAT = 2
"""Format version of a line in ``results.jsonl``."""

FILE = "results.jsonl"
MEASURED = "measured.json"
"""What the last complete evaluation of a run found, beside its results; see :mod:`agglo.harness.runs`."""
IMAGES = "images"

STUDENT, UNTRAINED, TEACHER = "student", "untrained", "teacher"
"""``role`` of the models of a training run; the first two are their names as well."""


class ResultError(AggloError, ValueError):
    """A result file cannot be read or written."""


@dataclass(frozen=True, slots=True)
class Result:
    """One finished eval of one model.

    Args:
        name: of the result: the eval's kind, or its name in a suite or protocol (``knn@224``).
        kind: the eval's kind.
        model: ``name``, ``hash``, ``parameters``, widths; of a training run's models also ``role`` and ``run``.
        settings: every key of the eval with defaults, without paths.
        protocol: hash of the settings.
        data: split → ``{source, images, hash}`` of each data set, ``{source, hash}`` of each file.
        metrics: metric → finite number.
        lower_is_better: the metrics that are better when lower.
        protocol_name: the published protocol (``nvidia``), if any.
        view: ``(H, W)`` of the model's input in pixels; None if the eval has no size, or whole images have several
            (``aspect: keep``).
        seconds: wall-clock time, encoding included.
        versions: of the packages that can change a number.
        hardware: the processor, its threads, the device.
        time: of the end, ISO 8601, UTC.
        notes: warnings, e.g. skipped images.
        inputs: key → hash of each file of answers that was scored instead of the model's output.
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
        """Equal for equal model, protocol, data, answers and version of agglo. Names the file of its images."""
        agglo = self.versions.get("agglo", "")
        return identifier(str(self.model["hash"]), self.protocol, self.data_hash, agglo, self.inputs)

    @property
    def column(self) -> tuple[str, str]:
        """The hashes of protocol and data: numbers compare if these are equal."""
        return self.protocol, self.data_hash


@dataclass(frozen=True, slots=True)
class PerImage:
    """Values per image and per class.

    Args:
        images: metric → image → value.
        classes: metric → class → value.
    """

    images: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    classes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def identifier(model: str, protocol: str, data: str, agglo: str, inputs: Mapping[str, str] | None = None) -> str:
    """The id of a result, known before it is measured."""
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
    """Append a result to a folder's ``results.jsonl``, after the file of its images.

    Raises:
        ResultError: a metric is not finite.
        StorageError: the disk is full or the folder read-only; earlier results are kept.
    """
    bad = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if bad:
        raise ResultError(f"{result.name}: metric {', '.join(bad)} is not finite; result not stored")
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
    """Append the whole line or nothing."""
    # A killed process may have left an incomplete last line: begin a new one.
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
    text = json.dumps({"format": FORMAT, "images": images.images, "classes": images.classes})
    write_bytes(path, gzip.compress(text.encode(), mtime=0))


# --- reading ----------------------------------------------------------------------------------------------------------


def read(place: str | Path) -> list[Result]:
    """The results of a folder or of a ``results.jsonl``, oldest first; of one id the newest only.

    Damaged lines are left out, with a warning.

    Raises:
        ResultError: the file does not exist or is of another format.
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
    """The ``results.jsonl`` of a folder or of a run folder, or the file itself.

    Raises:
        ResultError: there is none.
    """
    path = Path(place)
    if path.is_dir():
        for candidate in (path / FILE, path / "evals" / FILE):
            if candidate.is_file():
                return candidate
        if (path / "evals.json").is_file():
            run = shlex.quote(str(path))
            raise ResultError(
                f"{path} was measured by an older version (evals.json): measure it again with `agglo eval {run}`"
            )
        raise ResultError(f"{path} holds no {FILE}: make one with `agglo eval MODEL --out {path}`")
    if not path.exists():
        raise ResultError(f"no results at {path}: make some with `agglo eval MODEL --out FOLDER`")
    if path.suffix == ".json":
        raise ResultError(
            f"{path} has one JSON document, a results file one per line: pass a {FILE} or its folder (write one with "
            "`agglo eval MODEL --out FOLDER`)"
        )
    return path


def _parse(entry: Any, path: Path, number: int) -> Result:
    where = f"{path}, line {number}"
    version = entry.get("format") if isinstance(entry, dict) else None
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        advice = "pip install --upgrade agglo" if newer else f"move {path} away and measure again: `agglo eval MODEL`"
        raise ResultError(f"{where} is not a result of format {FORMAT} (format: {version}): {advice}")
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
        raise ResultError(f"{where} is not a result ({error}): remove the line") from None
    return result


def read_images(place: str | Path, result: Result) -> PerImage | None:
    """The values per image and class of a result; None if none were recorded.

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
