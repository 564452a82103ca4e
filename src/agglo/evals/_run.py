"""Running several evals on one model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from agglo.config import build, find, nearest
from agglo.evals._features import Inapplicable, shared_features
from agglo.evals.base import Backbone, Eval, Progress
from agglo.teachers.base import Teacher
from agglo.types import ConfigError

SUITES: dict[str, tuple[dict[str, Any], ...]] = {
    "quick": ({"kind": "knn"}, {"kind": "zero_shot"}, {"kind": "segmentation"}, {"kind": "depth"}),
    "demo": (
        {"kind": "knn"},
        {"kind": "zero_shot"},
        {"kind": "segmentation"},
        {"kind": "depth"},
        {"kind": "retrieval"},
        {"kind": "agreement"},
    ),
}
"""Named suites: ``quick`` needs no teacher and takes seconds; ``demo`` is what the quickstart reports."""


def evaluate(
    model: Backbone,
    evals: Sequence[Mapping[str, Any] | Eval] | str = "quick",
    teachers: Mapping[str, Teacher] | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Run evals on a model; each set of images is encoded once.

    Args:
        model: a Model, a Teacher, anything that encodes images.
        evals: a suite's name; or evals, built or as ``{"kind": ..., **keys}`` with an optional ``name`` of the result.
        teachers: by name, for the evals that compare with them (``agreement``).
        progress: told what is going on, in short phrases.

    Returns:
        Metrics by the eval's name: its ``name``, else its kind, the second of a kind as ``knn#2``. Evals that do not
        apply to this model (no text tower, no spatial map, no teachers) are left out, and ``skipped`` holds each one's
        reason; the key is absent when nothing was left out. The same call gives the same numbers.

    Raises:
        ConfigError: an unknown suite, kind or key, or two evals of one name.
    """
    results: dict[str, dict[str, Any]] = {}
    skipped: dict[str, Any] = {}
    todo = _named(evals, teachers)
    with shared_features():
        for name, each in todo.items():
            # A loop variable in a closure: bound here, so that every phrase carries its own eval's name.
            tell = None if progress is None else (lambda phrase, name=name: progress(f"{name}: {phrase}"))
            try:
                results[name] = each.run(model, tell)
            except Inapplicable as error:
                skipped[name] = str(error)
                if tell is not None:
                    tell(f"left out: {error}")
    return {**results, "skipped": skipped} if skipped else results


def _named(evals: Sequence[Mapping[str, Any] | Eval] | str, teachers: Mapping[str, Teacher] | None) -> dict[str, Eval]:
    """Every eval, built, by the name of its result: all recipes are checked before the first one runs."""
    if isinstance(evals, str):
        if evals not in SUITES:
            raise ConfigError(f"no suite of evals {evals!r}{nearest(evals, SUITES)}")
        evals = SUITES[evals]
    named: dict[str, Eval] = {}
    for position, each in enumerate(evals):
        if isinstance(each, Eval):
            built, name = each, type(each).__module__.rpartition(".")[2]
        else:
            options = {key: value for key, value in each.items() if key != "name"}
            built = _build(options, teachers, f"evals.{position}")
            name = str(each.get("name") or options["kind"])
            if each.get("name") and (name in named or name == "skipped"):
                raise ConfigError(f"evals.{position}: the name {name!r} is taken; choose another")
        count = 1
        while (unique := name if count == 1 else f"{name}#{count}") in named:
            count += 1
        named[unique] = built
    return named


def _build(options: Mapping[str, Any], teachers: Mapping[str, Teacher] | None, where: str) -> Eval:
    program = []
    if "kind" in options:
        parameters = inspect.signature(find("evals", str(options["kind"]))).parameters.values()
        if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
            program = [teachers]
    return build("evals", options, *program, where=where)
