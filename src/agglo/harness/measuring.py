"""Measure a model: known results are taken from the folder, new ones are appended as soon as they are finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agglo import __version__
from agglo.config import build
from agglo.embedding import check_memory
from agglo.evals.base import Backbone, Eval, Progress, device_of, input_size, view_of_all
from agglo.files import versions
from agglo.harness.protocols import PREFERRED, resolved, snapped
from agglo.harness.running import Outcome, error_text, named, run_each
from agglo.results.identity import data_hash, model_hash, portable, protocol_hash, settings, sources_of, takes_teachers
from agglo.results.places import answers_of, data_of, writes
from agglo.results.records import FILE, PerImage, Result, append, data_digest, identifier, read
from agglo.teachers.base import Teacher
from agglo.types import AggloError, MissingExtraError

MACHINE = ("processor", "threads", "platform")
BATCH = 32
"""Images per forward pass of the evals, for the memory that a size needs."""

FEATURES = "features"
"""The folder, beside ``results.jsonl``, of encoded images; it may be deleted at any time."""


@dataclass(slots=True)
class Measured:
    """The outcome of a list of evals on one model.

    Args:
        model: the model's facts, as in its results.
        results: finished evals by name, known and new.
        known: names of those that were in the folder before.
        skipped: name → why the eval does not apply to this model.
        failed: name → the error.
        seconds: wall-clock time.
        notes: remarks on the evals: sizes of a sweep that the model does not take.
    """

    model: dict[str, Any]
    results: dict[str, Result] = field(default_factory=dict)
    known: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Task:
    """An eval to run, and the part of its result that is known before it runs."""

    name: str
    made: Eval
    settings: dict[str, Any]
    protocol: str
    data: dict[str, dict[str, Any]]
    view: tuple[int, int] | None
    inputs: dict[str, str]
    writes: bool
    notes: tuple[str, ...] = ()


def measure(
    model: Backbone,
    name: str,
    entries: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    built_from: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    published: str | None = None,
    teachers: Mapping[str, Teacher] | None = None,
    again: bool = False,
    keep_features: bool = True,
    workers: int = 0,
    hashes: dict[str, dict[str, Any]] | None = None,
    progress: Progress | None = None,
    done: Callable[[Outcome], None] | None = None,
) -> Measured:
    """Run evals on a model; append each result to ``folder/results.jsonl`` when it is finished.

    A result in the folder of the same model, settings, data, answers and version of agglo is not measured again, so an
    interrupted suite continues where it stopped. An eval that writes files, or whose numbers vary, always runs.

    Args:
        model: a Model, a Teacher, anything that encodes images.
        name: the model's name in tables.
        entries: from :func:`agglo.harness.protocols.plan`.
        folder: of the results; encoded images are kept in its ``features``.
        built_from: the options that made the model, if its weights do not determine it.
        facts: further entries of the model's record (``role``, ``run``).
        published: the name of the published protocol of the entries.
        teachers: by name, for the evals that compare with them.
        again: measure known results too.
        keep_features: keep encoded images.
        workers: threads that read images ahead; the numbers do not depend on them.
        hashes: of data sets, filled here; pass one dictionary to several calls to hash each data set once.
        progress: called with short phrases.
        done: called after each eval that ran.

    Raises:
        ConfigError: an eval's keys do not fit.
        ResultError: the folder holds results of another format.
    """
    began = time.perf_counter()
    if progress is not None:
        progress("hashing the model")
    identity = {**describe(model, name, built_from), **(facts or {})}
    entries, notes = snapped(entries, lambda side: max(input_size(model, side)))
    found = Measured(identity, notes=notes)
    known = {result.id: result for result in read(folder)} if (folder / FILE).is_file() else {}
    tasks = _tasks(model, entries, teachers, found, {} if hashes is None else hashes, progress)
    for task in list(tasks.values()):
        key = identifier(identity["hash"], task.protocol, data_digest(task.data), __version__, task.inputs)
        if key in known and task.made.deterministic and not task.writes and not again:
            found.results[task.name] = known[key]
            found.known.append(task.name)
            del tasks[task.name]

    def keep(outcome: Outcome) -> None:
        if outcome.metrics is None:
            (found.failed if outcome.failed else found.skipped)[outcome.name] = outcome.why
        else:
            try:
                result = _result(tasks[outcome.name], outcome, identity, published, model)
                append(folder, result, PerImage(outcome.records.images, outcome.records.classes))
                found.results[outcome.name] = result
            except AggloError as error:
                found.failed[outcome.name] = str(error)
        if done is not None:
            done(outcome)

    features = (folder / FEATURES, identity["hash"]) if keep_features else None
    todo = {task.name: task.made for task in tasks.values()}
    run_each(model, todo, keep, progress, workers=workers, features=features)
    order = [str(entry["name"]) for entry in entries]
    found.results = {each: found.results[each] for each in order if each in found.results}
    found.seconds = time.perf_counter() - began
    return found


def describe(model: Backbone, name: str, built_from: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts on a model that its results carry."""
    spec = model.spec
    parameters = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0
    return {
        "name": name,
        "hash": model_hash(model, *([] if built_from is None else [dict(built_from)])),
        "parameters": parameters,
        "summary": spec.summary,
        "spatial": spec.spatial,
        "stride": spec.stride,
    }


def _tasks(
    model: Backbone,
    entries: Sequence[Mapping[str, Any]],
    teachers: Mapping[str, Teacher] | None,
    found: Measured,
    hashes: dict[str, dict[str, Any]],
    progress: Progress | None,
) -> dict[str, _Task]:
    """The evals to run, built. Missing data or packages become failures; keys that do not fit raise."""
    tasks: dict[str, _Task] = {}
    for entry in entries:
        name, options = str(entry["name"]), resolved(entry, model)
        complete = settings(options)
        more = {}
        if takes_teachers(complete["kind"]) and teachers:
            more["teachers"] = {each: model_hash(teacher) for each, teacher in teachers.items()}
        try:
            (made,) = named([options], teachers).values()
        except MissingExtraError as error:  # concerns this eval only
            found.failed[name] = str(error)
            continue
        stated = {**complete, "size": PREFERRED} if entry.get("size") == PREFERRED else complete
        size = complete.get("size")
        try:
            data = {}
            for split, source in sources_of(complete).items():
                if progress is not None:
                    progress(f"{name}: reading the names of {source.get('kind')}")
                data[split] = _data(source, hashes)
            data |= data_of(complete, made)
            inputs, protocol = answers_of(complete), protocol_hash(stated, **more)
            if size is not None:
                check_memory(model, input_size(model, size), BATCH)
        except Exception as error:  # noqa: BLE001 - damaged data of one eval must not stop the others
            found.failed[name] = error_text(error)
            continue
        view = None if size is None else view_of_all(model, size, complete.get("aspect"))
        # Neither the settings (`preferred`) nor a single view give the number of pixels.
        notes = () if view or stated is complete else (f"whole images, scaled to cover {size} px, the preferred size",)
        kept = portable(stated) | more
        tasks[name] = _Task(name, made, kept, protocol, data, view, inputs, writes(complete), notes)
    return tasks


def _data(options: Mapping[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    key = repr(sorted(options.items(), key=lambda item: item[0]))
    if key not in known:
        source = build("sources", options)
        known[key] = {"source": dict(options), "images": len(source), "hash": data_hash(source)}
    return known[key]


def _result(
    task: _Task, outcome: Outcome, identity: Mapping[str, Any], published: str | None, model: Backbone
) -> Result:
    found = versions()
    device = device_of(model)
    return Result(
        name=task.name,
        kind=str(task.settings["kind"]),
        model=dict(identity),
        settings=task.settings,
        protocol=task.protocol,
        data=task.data,
        metrics=dict(outcome.metrics or {}),
        lower_is_better=tuple(sorted(outcome.made.lower_is_better)),
        protocol_name=published,
        view=task.view,
        seconds=round(outcome.seconds, 3),
        versions={key: value for key, value in found.items() if key not in (*MACHINE, "device")},
        hardware={
            **{key: found[key] for key in MACHINE if key in found},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        },
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        notes=(*task.notes, *outcome.warnings),
        inputs=task.inputs,
    )
