"""Running several evals on one model."""

from __future__ import annotations

import inspect
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agglo.config import build, find, kinds, nearest, schema
from agglo.evals._features import Inapplicable, _shared, shared_features
from agglo.evals._reading import Opened
from agglo.evals._records import Records, recording
from agglo.evals._store import Store
from agglo.evals.base import Backbone, Eval, Progress
from agglo.teachers.base import Teacher
from agglo.types import AggloError, ConfigError

SUITES: dict[str, tuple[dict[str, Any], ...]] = {
    "quick": ({"kind": "knn"}, {"kind": "zero_shot"}, {"kind": "segmentation"}, {"kind": "depth"}),
    "dense": ({"kind": "segmentation"}, {"kind": "depth"}, {"kind": "normals"}, {"kind": "correspondence"}),
    "demo": (
        {"kind": "knn"},
        {"kind": "zero_shot"},
        {"kind": "segmentation"},
        {"kind": "depth"},
        {"kind": "retrieval"},
        {"kind": "agreement"},
    ),
}
"""Named suites: ``quick`` needs no teacher and takes seconds; ``dense`` is about maps; ``demo`` is what the quickstart
reports. ``full`` is every kind that can run without being told where its data lie."""


_FAILURES = (OSError, MemoryError, torch.OutOfMemoryError, torch.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage]
"""What one eval may run into while another need not: a disk, too little memory, a matrix without an answer."""

_NO_ROOM = re.compile(
    r"out of memory|not enough memory|(can't|cannot|failed to|unable to) allocate|alloc_failed|bad_alloc", re.IGNORECASE
)
"""What torch says of too little memory where it raises a plain RuntimeError: the allocator of each system's CPU, CUDA,
cuBLAS, cuDNN."""


def suites() -> list[str]:
    """The names of all suites."""
    return [*SUITES, "full"]


def suite(name: str) -> list[dict[str, Any]]:
    """The evals of a suite.

    Raises:
        ConfigError: there is none of that name.
    """
    if name == "full":
        return [{"kind": kind} for kind in kinds("evals", installed=False) if _complete(kind)]
    if name not in SUITES:
        raise ConfigError(f"no suite of evals {name!r}{nearest(name, suites())}")
    return [dict(entry) for entry in SUITES[name]]


def _complete(kind: str) -> bool:
    """Whether every key of an eval has a default, and one that names its data: an eval of an outside file has None."""
    fields = schema(find("evals", kind)).model_fields
    return not any(item.is_required() for item in fields.values()) and getattr(find("evals", kind), "bundled", True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one eval.

    Args:
        name: of the result.
        made: the eval.
        metrics: its numbers, or None.
        why: there are none.
        failed: it should have been possible; an eval that does not apply to a model has not failed.
        records: what it recorded of single images and classes.
        seconds: it took.
        warnings: what it said beside its numbers, each once.
    """

    name: str
    made: Eval
    metrics: dict[str, float] | None
    why: str = ""
    failed: bool = False
    records: Records = field(default_factory=Records)
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def evaluate(
    model: Backbone,
    evals: Sequence[Mapping[str, Any] | Eval] | str = "quick",
    teachers: Mapping[str, Teacher] | None = None,
    progress: Progress | None = None,
    *,
    workers: int = 0,
) -> dict[str, dict[str, Any]]:
    """Run evals on a model; each set of images is encoded once.

    Args:
        model: a Model, a Teacher, anything that encodes images.
        evals: a suite's name; or evals, built or as ``{"kind": ..., **keys}`` with an optional ``name`` of the result.
        teachers: by name, for the evals that compare with them (``agreement``).
        progress: told what is going on, in short phrases.
        workers: threads that read images ahead; the numbers do not depend on them.

    Returns:
        Metrics by the eval's name: its ``name``, else its kind, the second of a kind as ``knn#2``. Evals that do not
        apply to this model (no text tower, no spatial map, no teachers) are left out, and ``skipped`` holds each one's
        reason; the key is absent when nothing was left out. The same call gives the same numbers.

    Raises:
        ConfigError: an unknown suite, kind or key, or two evals of one name.
    """
    results: dict[str, dict[str, Any]] = {}
    skipped: dict[str, Any] = {}
    todo = named(evals, teachers)
    with _sharing(workers):
        for name, each in todo.items():
            tell = _named_progress(progress, name)
            try:
                results[name] = each.run(model, tell)
            except Inapplicable as error:
                skipped[name] = str(error)
                if tell is not None:
                    tell(f"left out: {error}")
    return {**results, "skipped": skipped} if skipped else results


def run_each(
    model: Backbone,
    todo: Mapping[str, Eval],
    done: Callable[[Outcome], None],
    progress: Progress | None = None,
    *,
    workers: int = 0,
    features: tuple[Path, str] | None = None,
) -> None:
    """Run evals one by one, and hand over each one's outcome as soon as it is there. One that fails stops no other.

    Args:
        model: what is measured.
        todo: from :func:`named`.
        done: called after each eval.
        progress: told what is going on.
        workers: threads that read images ahead.
        features: folder in which encoded images are kept, and the model's hash; None: in memory, for this call only.
    """
    with _sharing(workers) as shared:
        if features is not None:
            shared.encoded = Store(features[0], model, features[1], shared.kept)
        for name, each in todo.items():
            tell, began = _named_progress(progress, name), time.perf_counter()
            metrics, why, failed = None, "", False
            with recording() as records, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    metrics = each.run(model, tell)
                except Inapplicable as error:
                    why = str(error)
                except AggloError as error:
                    why, failed = str(error), True
                except (*_FAILURES, RuntimeError) as error:
                    if not isinstance(error, _FAILURES) and not _NO_ROOM.search(str(error)):
                        raise
                    first = next(iter(str(error).strip().splitlines()), "")
                    why, failed = f"{type(error).__name__}: {first}", True
            notes = tuple(dict.fromkeys(str(warning.message) for warning in said))
            done(Outcome(name, each, metrics, why, failed, records, time.perf_counter() - began, notes))


@contextmanager
def _sharing(workers: int) -> Iterator[Any]:
    """:func:`shared_features`, with sources that are read ahead."""
    opened = Opened(workers)
    try:
        with shared_features():
            shared = _shared.get()
            if shared is None:
                raise RuntimeError("no features are shared here")
            shared.sources = opened
            yield shared
    finally:
        opened.close()


def _named_progress(progress: Progress | None, name: str) -> Progress | None:
    """Every phrase carries its eval's name."""
    return None if progress is None else (lambda phrase: progress(f"{name}: {phrase}"))


def named(evals: Sequence[Mapping[str, Any] | Eval] | str, teachers: Mapping[str, Teacher] | None) -> dict[str, Eval]:
    """Every eval, built, by the name of its result: all recipes are checked before the first one runs.

    Raises:
        ConfigError: an unknown suite, kind or key, or two evals of one name.
    """
    if isinstance(evals, str):
        evals = suite(evals)
    found: dict[str, Eval] = {}
    for position, each in enumerate(evals):
        if isinstance(each, Eval):
            built, name = each, type(each).__module__.rpartition(".")[2]
        else:
            options = {key: value for key, value in each.items() if key != "name"}
            built = _build(options, teachers, f"evals.{position}")
            name = str(each.get("name") or options["kind"])
            if each.get("name") and (name in found or name == "skipped"):
                raise ConfigError(f"evals.{position}: the name {name!r} is taken; choose another")
        count = 1
        while (unique := name if count == 1 else f"{name}#{count}") in found:
            count += 1
        found[unique] = built
    return found


def _build(options: Mapping[str, Any], teachers: Mapping[str, Teacher] | None, where: str) -> Eval:
    program = []
    if "kind" in options:
        parameters = inspect.signature(find("evals", str(options["kind"]))).parameters.values()
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            program = [teachers]
    return build("evals", options, *program, where=where)
