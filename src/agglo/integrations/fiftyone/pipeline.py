"""Everything on one folder, as one resumable pipeline: what ``agglo fiftyone DIR`` does."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from agglo.embedding import as_files, encode
from agglo.extras import require
from agglo.files import printable
from agglo.integrations.fiftyone.duplicates import near_duplicates
from agglo.integrations.fiftyone.index import similarity
from agglo.integrations.fiftyone.layout import METHODS, visualization
from agglo.integrations.fiftyone.maps import field_name
from agglo.integrations.fiftyone.model import AggloModel
from agglo.integrations.fiftyone.options import parse
from agglo.integrations.fiftyone.records import ERROR_FIELD, field_record, record_field
from agglo.integrations.fiftyone.scores import representativeness, uniqueness
from agglo.integrations.fiftyone.zoo import ANY, check_database, register, zoo_names
from agglo.types import ConfigError
from agglo.zoo.info import describe

Progress = Callable[[str, int, int], None]
"""Called with (step, photographs done, photographs in all)."""

EMBEDDING, TEXT, MAPS, STAMP = "radio", "radio_text", "radio_map", "file_stamp"
COPY_OF, COPY_DISTANCE = "near_duplicate_of", "near_duplicate_distance"
REPRESENTATIVE, UNIQUE = "representativeness", "uniqueness"
SIMILARITY, TEXT_SIMILARITY, LAYOUT = "similarity", "text_similarity", "layout"

_INFO = "agglo_pipeline"
"""Key of the dataset's ``info``: the folder, the model and the input of every finished step."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of :func:`curate`.

    Args:
        model: a released name, a run folder, an exported folder or a repository on the hub.
        max_size: longer side of the input of the heatmaps in pixels; None for the preferred size, at least 512.
        prompts: texts; a heatmap of the similarity to each.
        threshold: largest cosine distance of a near duplicate.
        method: layout of the Embeddings panel: ``umap``, ``tsne`` or ``pca``.
        batch_size: images per batch.
        num_workers: reading processes; None for FiftyOne's default.
        device: None for the GPU if there is one.
    """

    model: str = "agglo-lite"
    max_size: int | None = None
    prompts: tuple[str, ...] = ()
    threshold: float = 0.1
    method: str = "umap"
    batch_size: int = 32
    num_workers: int | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step.

    Args:
        name: of the step.
        detail: what it found.
        seconds: it took; 0 if its result was up to date.
        done: photographs that were computed.
    """

    name: str
    detail: str
    seconds: float = 0.0
    done: int = 0


@dataclass(slots=True)
class Curated:
    """A dataset with all results of :func:`curate`.

    Args:
        dataset: the persistent ``fiftyone.Dataset``.
        steps: what was done.
        failed: path → reason of the photographs without an embedding.
        notes: about the folder and the dataset.
    """

    dataset: Any = None
    steps: list[Step] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def curate(
    folder: str | Path,
    *,
    name: str | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
    report: Callable[[Step], None] | None = None,
) -> Curated:
    """Make a persistent FiftyOne dataset of a folder, with embeddings, heatmaps, searches, a layout and scores.

    Fields: ``radio`` (summary), ``radio_text`` (comparable with text), heatmaps ``radio_map_*``,
    ``representativeness``, ``uniqueness``, ``near_duplicate_of`` (path in the folder) and ``near_duplicate_distance``
    (cosine). Brain keys: ``similarity``, ``text_similarity``, ``layout``, and those of the scores. Saved views:
    ``near duplicates``, ``unique first``, ``representative first``.

    A later call computes the photographs that are new or have changed, and the steps whose input has changed; this is
    also how an interrupted call is continued. If the folder was moved, the dataset follows it.

    Args:
        folder: of photographs, with its sub-folders.
        name: of the dataset; None for that of the folder.
        settings: model, sizes, threshold.
        progress: called after every batch.
        report: called with every finished step.

    Raises:
        ConfigError: no photographs; a dataset of that name that holds something else, belongs to another folder or has
            the embeddings of another model; or the database cannot be reached.
        MissingExtraError: FiftyOne, or its database, is not installed.
    """
    settings = settings or Settings()
    if settings.method not in METHODS:
        raise ConfigError(f"method: {settings.method!r} is not one of {', '.join(METHODS)}")
    if not 0 <= settings.threshold <= 2:
        raise ConfigError(f"threshold: {settings.threshold:g} is not a cosine distance in [0, 2]")
    files = as_files(folder)
    root = Path(folder).expanduser().resolve()
    root = root if root.is_dir() else root.parent
    paths = [os.path.abspath(files.file(index)) for index in range(len(files))]  # pyright: ignore[reportAttributeAccessIssue]
    check_database()
    run = _Run(require("fiftyone", "fiftyone"), root, settings, progress, report)
    run.open(name or printable(root.name))
    run.synchronise(paths)
    run.encode()
    run.derive()
    return run.result


class _Run:
    """One call of :func:`curate`."""

    def __init__(
        self,
        fiftyone: Any,
        root: Path,
        settings: Settings,
        progress: Progress | None,
        report: Callable[[Step], None] | None,
    ) -> None:
        self.fiftyone, self.root, self.settings = fiftyone, root, settings
        self.result = Curated()
        self._progress, self._report = progress, report

    @property
    def dataset(self) -> Any:
        return self.result.dataset

    # --- the dataset --------------------------------------------------------------------------------------------------

    def open(self, name: str) -> None:
        """Open the dataset of this folder, or create it."""
        fo = self.fiftyone
        if not fo.dataset_exists(name):
            self.result.dataset = fo.Dataset(name, persistent=True)
            # One colour with varying opacity, the default, hides what a heatmap shows.
            scheme = fo.ColorScheme(color_by="value", default_colorscale={"name": "viridis", "list": None})
            self.dataset.app_config.color_scheme = scheme
            self._remember(root=str(self.root), model=self.settings.model, max_size=self.settings.max_size, steps={})
            return
        self.result.dataset = fo.load_dataset(name)
        advice = "choose another name with --name (name=)"
        if self.dataset.media_type not in (None, "image"):
            raise ConfigError(f"dataset {name!r} holds media of type {self.dataset.media_type}, not images: {advice}")
        if _INFO not in self.dataset.info:
            raise ConfigError(f"dataset {name!r} exists and was not made from a folder by agglo: {advice}")
        if self._info["model"] != self.settings.model:
            raise ConfigError(
                f"dataset {name!r} has embeddings of {self._info['model']}, not of {self.settings.model}: {advice}"
            )
        if self._info["max_size"] != self.settings.max_size:
            raise ConfigError(
                f"dataset {name!r} has heatmaps of max_size {self._info['max_size']}, not {self.settings.max_size}: "
                f"use that one, or {advice}"
            )
        before = Path(self._info["root"])
        if before != self.root:
            if before.exists():
                raise ConfigError(f"dataset {name!r} belongs to the folder {before}: {advice}")
            self._follow(before)

    def _follow(self, before: Path) -> None:
        """Point the samples to the folder's new place."""
        ids, paths = self.dataset.values(["id", "filepath"])
        moved = {
            each: str(self.root / Path(path).relative_to(before))
            for each, path in zip(ids, paths, strict=True)
            if Path(path).is_relative_to(before)
        }
        if moved and not any(Path(path).exists() for path in moved.values()):
            raise ConfigError(
                f"dataset {self.dataset.name!r} belongs to the folder {before}, which does not exist, and none of its "
                f"photographs is in {self.root}: choose another name with --name (name=)"
            )
        self.dataset.set_values("filepath", moved, key_field="id")
        self._remember(root=str(self.root))
        self.result.notes.append(f"the folder was moved from {before}: {len(moved)} paths updated")

    @property
    def _info(self) -> dict[str, Any]:
        return self.dataset.info[_INFO]

    def _remember(self, **facts: Any) -> None:
        self.dataset.info[_INFO] = {**self.dataset.info.get(_INFO, {}), **facts}
        self.dataset.save()

    def synchronise(self, paths: Sequence[str]) -> None:
        """Add the new photographs; forget the results of those that have changed."""
        began = time.perf_counter()
        fo, dataset = self.fiftyone, self.dataset
        usable = [path for path in paths if path == printable(path)]
        if len(usable) < len(paths):
            self.result.notes.append(f"{len(paths) - len(usable)} file names are not UTF-8 and are left out")
        stamps = {path: stamp for path in usable if (stamp := _stamp(path)) is not None}
        known: dict[str, tuple[str, str | None]] = {}
        if len(dataset) and dataset.has_field(STAMP):
            known = {path: (i, s) for i, path, s in zip(*dataset.values(["id", "filepath", STAMP]), strict=True)}
        new = [path for path in stamps if path not in known]
        dataset.add_samples([fo.Sample(filepath=path, **{STAMP: stamps[path]}) for path in new], progress=False)
        changed = {known[path][0]: s for path, s in stamps.items() if path in known and known[path][1] != s}
        if changed:
            self._forget(list(changed))
            dataset.set_values(STAMP, changed, key_field="id")
        missing = [path for path in known if path not in stamps and not Path(path).exists()]
        if missing:
            self.result.notes.append(f"{_count(missing)} no longer exist, first {missing[0]}")
        detail = f"{len(dataset)} in dataset {dataset.name!r}, {len(new)} new, {len(changed)} changed"
        self._finish(Step("photographs", detail, time.perf_counter() - began, len(new) + len(changed)))

    def _forget(self, ids: Sequence[str]) -> None:
        view = self.dataset.select(ids)
        for name in self.dataset.get_field_schema():
            if name.startswith(EMBEDDING) or name == ERROR_FIELD:
                view.set_values(name, [None] * len(view))

    # --- what is computed from the photographs ------------------------------------------------------------------------

    def encode(self) -> None:
        """Embeddings and heatmaps of the photographs that have none."""
        maps = {"pca": MAPS, **{field_name(text): f"{MAPS}_{field_name(text)}" for text in self.settings.prompts}}
        embed, draw = self._without([EMBEDDING]), self._without(list(maps.values()))
        self._apply("embeddings", embed, _vectors, {"summary": EMBEDDING, "text": TEXT})
        self._apply("heatmaps", draw, self._drawing, maps if len(maps) > 1 else MAPS)
        if self.dataset.has_field(ERROR_FIELD):
            view = self.dataset.exists(ERROR_FIELD)
            self.result.failed = dict(zip(*view.values(["filepath", ERROR_FIELD]), strict=True))

    def _without(self, fields: Sequence[str]) -> Any:
        """The samples that lack one of the fields and whose image is not known to be unreadable."""
        expression = self.fiftyone.ViewField
        view = self.dataset
        if view.has_field(ERROR_FIELD):
            view = view.match(expression(ERROR_FIELD) == None)  # noqa: E711
        if all(view.has_field(name) for name in fields):
            lacks = [expression(name) == None for name in fields]  # noqa: E711
            view = view.match(self.fiftyone.ViewExpression.any(lacks))
        return view

    def _load(self) -> AggloModel:
        """The model, loaded once, as the App's server loads it for text queries."""
        zoo: Any = require("fiftyone.zoo", "fiftyone")  # it keeps loaded models
        register()
        name, options = self._zoo()
        device = {} if self.settings.device is None else {"device": self.settings.device}
        return zoo.load_zoo_model(name, **options, **device)

    def _zoo(self) -> tuple[str, dict[str, Any]]:
        """Name and options in the zoo; ``text`` if the model is comparable with text."""
        model = self.settings.model
        options = {"text": True} if describe(model).text else {}
        return (model, options) if model in zoo_names() else (ANY, {**options, "model": model})

    def _drawing(self, loaded: AggloModel) -> AggloModel:
        """The same weights, drawing heatmaps."""
        options: dict[str, Any] = {"output_type": "spatial", "max_size": self.settings.max_size}
        if self.settings.prompts:
            options["text"] = self.settings.prompts
        return AggloModel(loaded.model, loaded.name, parse(options))

    def _apply(self, name: str, view: Any, make: Callable[[AggloModel], AggloModel], fields: Any) -> None:
        """Store the results of a model; those of finished batches remain if it is interrupted."""
        began, total = time.perf_counter(), len(view)
        written = list(fields.values()) if isinstance(fields, dict) else [fields]
        if not total:
            self._finish(Step(name, f"of all photographs, fields {', '.join(w for w in written if self._has(w))}"))
            return
        model = make(self._load())
        self._check_record(written, model.record())
        model.always_skip = True
        view.apply_model(
            model,
            label_field=fields,
            batch_size=self.settings.batch_size,
            num_workers=self.settings.num_workers,
            skip_failures=False,  # other errors than unreadable photographs must stop the run
            progress=False if self._progress is None else lambda bar: self._show(name, bar.iteration, total),
        )
        for each in filter(self._has, written):
            backbone = {"head": None, "text": False} if each == EMBEDDING else {}
            record_field(self.dataset, each, {**model.record(), **backbone})
        seconds = time.perf_counter() - began
        detail = f"{_count(range(total))}, {total / seconds:.1f} per second, fields "
        self._finish(Step(name, detail + ", ".join(filter(self._has, written)), seconds, total))

    def _check_record(self, fields: Sequence[str], record: dict[str, Any]) -> None:
        """Refuse to mix results of other weights, a retrained run for example, into a field."""
        for name in filter(self._has, fields):
            before = field_record(self.dataset, name) or record
            for key in ("hash", "size", "dtype"):
                if before[key] != record[key]:
                    raise ConfigError(
                        f"field {name!r} of dataset {self.dataset.name!r} was computed with another {key} of "
                        f"{record['model']} ({before[key]}, now {record[key]}): choose another name with --name (name=)"
                    )

    def _has(self, name: str) -> bool:
        return self.dataset.has_field(name)

    def _show(self, name: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(name, done, total)

    # --- what is computed from the embeddings -------------------------------------------------------------------------

    def derive(self) -> None:
        """Searches, layout, scores and near duplicates, where their input has changed."""
        view = self.dataset.exists(EMBEDDING) if self.dataset.has_field(EMBEDDING) else self.dataset.limit(0)
        ids, stamps = view.values(["id", STAMP])
        if not ids:
            self.result.notes.append("no photograph has an embedding")
            return
        state = _digest([self.settings.model, sorted(zip(ids, stamps, strict=True))])
        threshold, method = self.settings.threshold, self.settings.method
        self._once("search by image", state, self._similarity, key=SIMILARITY)
        if self.dataset.has_field(TEXT):
            self._once("search by text", state, self._text_similarity, key=TEXT_SIMILARITY)
        self._once("layout", _digest([state, method]), lambda: self._layout(view), key=LAYOUT)
        self._once("representativeness", state, lambda: self._score(view, representativeness, REPRESENTATIVE))
        self._once("uniqueness", state, lambda: self._score(view, uniqueness, UNIQUE))
        self._once("near duplicates", _digest([state, threshold]), lambda: self._near_duplicates(view))

    def _once(self, name: str, state: str, work: Callable[[], str], key: str | None = None) -> None:
        """Run a step unless it ran on the same input and its brain run still exists."""
        done = self._info["steps"].get(name)
        if done and done[0] == state and (key is None or key in self.dataset.list_brain_runs()):
            self._finish(Step(name, done[1]))
            return
        began = time.perf_counter()
        detail = work()
        self._remember(steps={**self._info["steps"], name: [state, detail]})
        self._finish(Step(name, detail, time.perf_counter() - began, len(self.dataset)))

    def _similarity(self) -> str:
        index = similarity(self.dataset.exists(EMBEDDING), embeddings=EMBEDDING, brain_key=SIMILARITY)
        return f"{index.total_index_size} vectors, brain key {SIMILARITY!r}"

    def _text_similarity(self) -> str:
        name, options = self._zoo()
        index = similarity(
            self.dataset.exists(TEXT), embeddings=TEXT, brain_key=TEXT_SIMILARITY, model=name, model_kwargs=options
        )
        return f"{index.total_index_size} vectors, brain key {TEXT_SIMILARITY!r}"

    def _layout(self, view: Any) -> str:
        least = 5
        method = self.settings.method if len(view) >= least else "pca"
        if len(view) < 3:
            return f"needs 3 photographs, got {len(view)}"
        visualization(view, embeddings=EMBEDDING, brain_key=LAYOUT, method=method)
        return f"{method}, brain key {LAYOUT!r}"

    def _score(self, view: Any, function: Callable[..., None], name: str) -> str:
        function(view, name, embeddings=EMBEDDING)
        verb = {REPRESENTATIVE: "representative", UNIQUE: "unique"}[name]
        self.dataset.save_view(f"{verb} first", view.sort_by(name, reverse=True), overwrite=True)
        return f"field {name!r}, view '{verb} first'"

    def _near_duplicates(self, view: Any) -> str:
        index = near_duplicates(view, self.settings.threshold, similarity_index=SIMILARITY)
        paths = dict(zip(*view.values(["id", "filepath"]), strict=True))
        groups = {kept: sorted(near, key=lambda pair: pair[1]) for kept, near in index.neighbors_map.items()}
        originals = {other: self._relative(paths[kept]) for kept, near in groups.items() for other, _ in near}
        distances = {other: max(0.0, float(d)) for near in groups.values() for other, d in near}
        fo, ids = self.fiftyone, self.dataset.values("id")
        for name, kind, values in (
            (COPY_OF, fo.StringField, originals),
            (COPY_DISTANCE, fo.FloatField, distances),
        ):
            self.dataset.add_sample_field(name, kind)
            self.dataset.set_values(name, [values.get(each) for each in ids])
        ordered = [each for kept, near in groups.items() for each in (kept, *(other for other, _ in near))]
        self.dataset.save_view("near duplicates", self.dataset.select(ordered, ordered=True), overwrite=True)
        return f"{len(originals)} of {_count(groups)}, within a distance of {self.settings.threshold:g}"

    def _relative(self, path: str) -> str:
        return str(Path(path).relative_to(self.root)) if Path(path).is_relative_to(self.root) else path

    def _finish(self, step: Step) -> None:
        self.result.steps.append(step)
        if self._report is not None:
            self._report(step)


class _VectorModel(AggloModel):
    """Summary and text-aligned vector of the centre square from one forward pass, equal to those of ``agglo embed``."""

    def predict_all(self, args: Iterable[Any], samples: Iterable[Any] | None = None) -> list[Any]:
        """Per image ``{"summary": (D,), "text": (E,)}``, without ``text`` for a model that has none; or None."""
        del samples
        width = int(self.model.spec.summary or 0)
        names = ("summary", "text") if self.can_embed_prompts else ("summary",)
        rows = self.embed_all(args)
        return [None if r is None else dict(zip(names, (r[:width], r[width:]), strict=False)) for r in rows]

    def _vectors(self, images: Tensor) -> np.ndarray:
        return np.concatenate(encode(self.model, images, self._embedding_head), axis=1)


def _vectors(loaded: AggloModel) -> AggloModel:
    return _VectorModel(loaded.model, loaded.name, loaded.config)


def _count(photographs: Collection[Any]) -> str:
    return f"{len(photographs)} photograph{'' if len(photographs) == 1 else 's'}"


def _stamp(path: str) -> str | None:
    """Size and modification time of a file; None if it cannot be read."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
