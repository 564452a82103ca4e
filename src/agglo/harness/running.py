"""Run evals on one model: sources are opened and images encoded once for all of them."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agglo.config import build
from agglo.evals.base import (
    Backbone,
    Eval,
    EvalContext,
    FeatureCache,
    FeatureStore,
    Inapplicable,
    Progress,
    Records,
    SourcePool,
    input_size,
)  # fmt: skip
from agglo.harness.protocols import snapped, suite
from agglo.results.identity import takes_teachers
from agglo.teachers.base import Teacher
from agglo.types import AggloError, ConfigError

TRACEBACK = "AGGLO_TRACEBACK"
"""Environment variable: if set, an unexpected error of an eval is raised, with its traceback."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one eval.

    Args:
        metrics: its numbers; None if it was skipped or failed.
        why: the reason for having no numbers.
        failed: an error occurred; an eval that does not apply to a model is skipped, not failed.
        records: values per image and per class.
        warnings: distinct warnings raised while it ran.
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
        progress: called with short phrases.
        workers: threads that read images ahead; the numbers do not depend on them.

    Returns:
        Metrics by the eval's name: its ``name``, else its kind, the second of a kind as ``knn#2``. Evals that do not
        apply to this model (no text tower, no spatial map, no teachers) are left out, and ``skipped`` holds each one's
        reason; ``failed`` holds the errors of evals that failed while others ran. Both keys are absent when empty. The
        same call gives the same numbers.

    Raises:
        ConfigError: an unknown suite, kind or key, or two evals of one name.
        Exception: the error of the first eval, if every eval failed.
    """
    results: dict[str, dict[str, Any]] = {}
    skipped: dict[str, Any] = {}
    failed: dict[str, Exception] = {}
    if not isinstance(evals, str) and not any(isinstance(each, Eval) for each in evals):
        evals, _ = snapped(cast(Sequence[Mapping[str, Any]], evals), lambda side: max(input_size(model, side)))
    todo = named(evals, teachers)
    with SourcePool(workers) as sources:
        features = FeatureCache()
        for name, each in todo.items():
            context = EvalContext(prefixed(progress, name), Records(), sources, features)
            try:
                results[name] = each.run(model, context)
            except Inapplicable as error:
                skipped[name] = str(error)
                context.report(f"left out: {error}")
            except Exception as error:  # noqa: BLE001 - whatever it is, the other evals run
                failed[name] = error
    if failed and not results:
        raise next(iter(failed.values()))
    for name, error in failed.items():
        warnings.warn(f"{name} failed: {error_text(error)}", stacklevel=2)
    left = {"skipped": skipped, "failed": {name: error_text(error) for name, error in failed.items()}}
    return {**results, **{key: value for key, value in left.items() if value}}


def run_each(
    model: Backbone,
    todo: Mapping[str, Eval],
    done: Callable[[Outcome], None],
    progress: Progress | None = None,
    *,
    workers: int = 0,
    features: tuple[Path, str] | None = None,
) -> None:
    """Run evals one by one and pass each outcome to ``done``. An eval that fails does not stop the next.

    Args:
        model: what is measured.
        todo: from :func:`named`.
        done: called after each eval.
        progress: called with short phrases.
        workers: threads that read images ahead.
        features: folder of encoded images and the model's hash; None keeps them in memory for this call.
    """
    with SourcePool(workers) as sources:
        cache = FeatureCache() if features is None else FeatureStore(features[0], model, features[1], sources)
        for name, each in todo.items():
            context = EvalContext(prefixed(progress, name), Records(), sources, cache)
            began = time.perf_counter()
            metrics, why, failed = None, "", False
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    metrics = each.run(model, context)
                except Inapplicable as error:
                    why = str(error)
                except Exception as error:
                    if os.environ.get(TRACEBACK) and not isinstance(error, AggloError):
                        raise
                    why, failed = error_text(error), True
            notes = tuple(dict.fromkeys(str(warning.message) for warning in caught))
            done(Outcome(name, each, metrics, why, failed, context.records, time.perf_counter() - began, notes))


def error_text(error: Exception) -> str:
    """The message of an error in one line; prefixed with its type unless it is an ``AggloError``."""
    if isinstance(error, AggloError):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def prefixed(progress: Progress | None, name: str) -> Progress | None:
    """``progress`` with ``name`` before every phrase."""
    return None if progress is None else (lambda phrase: progress(f"{name}: {phrase}"))


def named(evals: Sequence[Mapping[str, Any] | Eval] | str, teachers: Mapping[str, Teacher] | None) -> dict[str, Eval]:
    """Build every eval, by the name of its result; so all options are checked before the first eval runs.

    Raises:
        ConfigError: an unknown suite, kind or key, or two evals of one name.
    """
    if isinstance(evals, str):
        evals = suite(evals)
    kinds = [type(e).__module__.rpartition(".")[2] if isinstance(e, Eval) else str(e.get("kind")) for e in evals]
    wanted = [None if isinstance(each, Eval) else each.get("name") for each in evals]
    names = unique_names(kinds, wanted)
    return {
        name: each if isinstance(each, Eval) else _build(each, teachers, f"evals.{position}")
        for position, (name, each) in enumerate(zip(names, evals, strict=True))
    }


def unique_names(kinds: Sequence[str], wanted: Sequence[str | None]) -> list[str]:
    """The name of each eval's result: the one wanted, else its kind, the second of a kind as ``knn#2``.

    Raises:
        ConfigError: two evals want one name.
    """
    found: list[str] = []
    for position, (kind, name) in enumerate(zip(kinds, wanted, strict=True)):
        if name and (name in found or name in ("skipped", "failed")):
            raise ConfigError(f"evals.{position}: the name {name!r} is taken; choose another")
        count, unique = 1, str(name or kind)
        while unique in found:
            count += 1
            unique = f"{name or kind}#{count}"
        found.append(unique)
    return found


def _build(options: Mapping[str, Any], teachers: Mapping[str, Teacher] | None, where: str) -> Eval:
    options = {key: value for key, value in options.items() if key != "name"}
    with_teachers = "kind" in options and takes_teachers(str(options["kind"]))
    return build("evals", options, *([teachers] if with_teachers else []), where=where)
