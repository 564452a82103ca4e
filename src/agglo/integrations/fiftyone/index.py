"""A similarity index for FiftyOne with exact cosine distances, and the function that builds it.

FiftyOne stores the class path of a run's configuration, so an index is available in later sessions and in the App's
server wherever agglo is installed; nothing needs to be registered. The App lists a run as a similarity index if the
class path contains ``similarity``, and finds its other classes by the name of ``CosineSimilarityConfig``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from agglo.extras import require
from agglo.integrations.fiftyone.neighbours import Neighbours
from agglo.integrations.fiftyone.vectors import (
    Vectors,
    check_options,
    check_samples,
    checked,
    collection_name,
    fill,
    load,
    read_vectors,
    report_left_out,
)
from agglo.types import ConfigError


def similarity(
    samples: Any,
    *,
    embeddings: Any = None,
    brain_key: str | None = None,
    model: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    patches_field: str | None = None,
    **options: Any,
) -> Any:
    """Index vectors for ``sort_by_similarity``, duplicates and splits, by exact cosine distance.

    Replaces ``fiftyone.brain.compute_similarity``, whose default index (1.22.1) centres its vectors at the first query
    by image. With this one, text and image queries do not depend on earlier queries, added vectors are found at once,
    and thresholds and distances are ``1 - cos``, in [0, 2]. A second call with the same key reads the field again and,
    with ``model``, computes the vectors of new samples: it brings an index up to date.

    Args:
        samples: dataset or view; the index covers the dataset.
        embeddings: name of the field with the vectors, which stay there; or an array ``(N, D)``, a list with None for
            samples without a vector, or a mapping of ids, stored with the run.
        brain_key: key of the run; None for an index of this session only.
        model: name of a zoo model, or a model of :func:`agglo.integrations.fiftyone.load_model`. It embeds the samples
            that have no vector and, if it can embed text, enables text queries, in later sessions and in the App too.
            Other model objects enable them in this session only.
        model_kwargs: arguments of the zoo model, stored with the run.
        patches_field: label field whose labels have the vectors, in their attribute ``embeddings``.
        options: arguments of ``compute_embeddings`` (``batch_size``, ``num_workers``, ``progress``).

    Returns:
        A FiftyOne ``SimilarityIndex`` with the ``DuplicatesMixin``.

    Raises:
        ConfigError: the key belongs to another run, or vectors cannot be used
            (:func:`~agglo.integrations.fiftyone.vectors.read_vectors`).
    """
    field = embeddings if isinstance(embeddings, str) else None
    check_samples(samples)
    if patches_field is None:
        loaded = fill(samples, embeddings, model, model_kwargs, **options)
    else:
        check_options(options)
        loaded = load(model, model_kwargs)
    source = samples if field is None else all_samples(samples._dataset)
    vectors = read_vectors(source, embeddings, patches_field=patches_field, report=False)
    report_left_out(vectors, samples)
    dataset = samples._base_view if samples._is_frames else samples._root_dataset
    if brain_key is not None and brain_key in dataset.list_brain_runs():
        index = _stored(dataset, brain_key, field, patches_field)
        index.update(vectors)
    else:
        config = _classes()["CosineSimilarityConfig"](embeddings_field=field, patches_field=patches_field)
        method = config.build()
        method.register_run(dataset, brain_key, overwrite=False)
        index = method.initialize(dataset, brain_key, vectors)
        method.save_run_results(dataset, brain_key, index)
    if loaded is not None:
        _set_model(index, model, model_kwargs, loaded)
    return index


def _set_model(index: Any, model: Any, model_kwargs: Mapping[str, Any] | None, loaded: Any) -> None:
    """Store the model with the run, by its zoo name, so that it embeds text in other processes."""
    from agglo.integrations.fiftyone.reference import zoo_reference  # imports torch, which the App's server avoids

    index._model = loaded
    index._supports_prompts = bool(getattr(loaded, "can_embed_prompts", False))
    name, options = (model, dict(model_kwargs or {})) if isinstance(model, str) else zoo_reference(loaded) or (None, {})
    if name is None:
        if index._supports_prompts and index.key is not None:
            warnings.warn(
                f"brain key {index.key!r}: text queries work in this session only; pass the model's zoo name, so that "
                "the App can load it",
                stacklevel=3,
            )
        return
    index.config.model, index.config.model_kwargs = name, options
    index.config.supports_prompts = index._supports_prompts
    if index.key is not None:
        index.save_config()


def _stored(dataset: Any, key: str, field: str | None, patches_field: str | None) -> Any:
    """The index under an existing key, if it is one of these and over the same vectors."""
    config = dataset.get_brain_info(key).config
    if not isinstance(config, _classes()["CosineSimilarityConfig"]):
        raise ConfigError(
            f"brain key {key!r} of dataset {collection_name(dataset)} belongs to another run ({config.cls}); "
            f"choose another key, or delete it with delete_brain_run({key!r})"
        )
    if (config.embeddings_field, config.patches_field) != (field, patches_field):
        raise ConfigError(
            f"brain key {key!r} indexes field {config.embeddings_field!r} of {config.patches_field or 'samples'}, not "
            f"{field!r} of {patches_field or 'samples'}; choose another key, or call delete_brain_run({key!r})"
        )
    return dataset.load_brain_results(key)


def all_samples(dataset: Any) -> Any:
    """The dataset; of a grouped one, all slices."""
    return dataset.select_group_slices(_allow_mixed=True) if dataset.media_type == "group" else dataset


class _Config:
    """Configuration of a :class:`_Index`; the arguments are those of FiftyOne's ``SimilarityConfig``."""

    method = "cosine"
    max_k = None
    supports_least_similarity = True
    supported_aggregations = ("mean",)
    metric = "cosine"


class _Method:
    """Builds a :class:`_Index` for FiftyOne's ``compute_similarity``."""

    config: Any

    def initialize(self, samples: Any, brain_key: str | None, vectors: Vectors | None = None) -> Any:
        """An index over ``vectors``, by default those of the configuration's field; empty without a field."""
        return _classes()["CosineSimilarityIndex"](samples, self.config, brain_key, vectors, backend=self)


class _Index:
    """Exact cosine search; the methods are those of FiftyOne's ``SimilarityIndex`` and ``DuplicatesMixin``.

    Args:
        samples: the dataset.
        config: a ``CosineSimilarityConfig``.
        brain_key: key of the run, or None.
        vectors: the indexed vectors; None to read them from the field.
        removed: ids that were removed from the index and keep their vector in the field.
        backend: a ``CosineSimilarity``.
    """

    config: Any
    current_sample_ids: Any
    current_label_ids: Any
    _current_inds: Any
    key: Any
    samples: Any
    save: Any

    def __init__(
        self,
        samples: Any,
        config: Any,
        brain_key: str | None,
        vectors: Vectors | None = None,
        removed: Iterable[str] = (),
        backend: Any = None,
    ) -> None:
        bases = _bases()
        self._dataset = samples._dataset
        self._removed = set(removed)
        self._vectors = _EMPTY
        self._active: tuple[Any, Neighbours] | None = None
        self._seen: tuple[Any, int] = None, 0
        bases.SimilarityIndex.__init__(self, samples, config, brain_key, backend=backend)
        bases.DuplicatesMixin.__init__(self)
        if vectors is not None:
            self._take(vectors)
        else:
            self._read_field()

    # --- what is indexed ----------------------------------------------------------------------------------------------

    @property
    def is_external(self) -> bool:
        """Whether the vectors are stored with the run instead of in a field."""
        return self.config.embeddings_field is None

    @property
    def sample_ids(self) -> np.ndarray:
        """``(N,)`` sample ids of the vectors."""
        return self._vectors.sample_ids

    @property
    def label_ids(self) -> np.ndarray | None:
        """``(N,)`` label ids of the vectors, or None if they belong to samples."""
        return self._vectors.label_ids if self.config.patches_field is not None else None

    @property
    def total_index_size(self) -> int:
        """Number of vectors."""
        return len(self._vectors.values)

    @property
    def _ids(self) -> np.ndarray:
        labels = self.label_ids
        return self.sample_ids if labels is None else labels

    def get_embeddings(
        self, sample_ids: Any = None, label_ids: Any = None, allow_missing: bool = True, warn_missing: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The vectors of some samples or labels, or all: vectors ``(M, D)``, sample ids, label ids or None."""
        rows = np.arange(self.total_index_size)
        if sample_ids is not None or label_ids is not None:
            wanted: Any = sample_ids if label_ids is None else label_ids
            by = self.sample_ids if label_ids is None else self._ids
            rows = self._rows([wanted] if isinstance(wanted, str) else list(wanted), by, allow_missing)
        labels = self.label_ids
        return self._vectors.values[rows], self.sample_ids[rows], None if labels is None else labels[rows]

    def add_to_index(
        self,
        embeddings: Any,
        sample_ids: Any,
        label_ids: Any = None,
        overwrite: bool = True,
        allow_existing: bool = True,
        warn_existing: bool = False,
        reload: bool = True,
    ) -> None:
        """Add vectors, store them (in the field, or with the run), and find them from then on.

        Args:
            embeddings: ``(M, D)``.
            sample_ids: ``(M,)``.
            label_ids: ``(M,)`` for patches.
            overwrite: replace the vectors of ids that are indexed; False keeps them.
            allow_existing: False raises if ``overwrite`` is False and an id is indexed.
            warn_existing: accepted for FiftyOne's signature; kept vectors are not reported.
            reload: accepted for FiftyOne's signature; the current view is always recomputed.

        Raises:
            ConfigError: ids or lengths do not match, an id occurs twice, or a vector cannot be used.
        """
        sample_ids = np.asarray(sample_ids, dtype=str)
        ids = sample_ids if label_ids is None else np.asarray(label_ids, dtype=str)
        values = checked(list(embeddings), ids.tolist(), "add_to_index")
        self._check_added(values, ids, label_ids)
        present = np.isin(ids, self._ids)
        if not overwrite:
            if present.any() and not allow_existing:
                raise ConfigError(f"add_to_index: {ids[present][0]} is already in the index; pass overwrite=True")
            ids, sample_ids, values, present = (each[~present] for each in (ids, sample_ids, values, present))
        if not len(ids):
            return
        self._write_field(ids, values)
        if not self.is_external:
            self._seen = self._state()
        self._removed -= set(ids.tolist())
        stay = ~np.isin(self._ids, ids)
        old = self._vectors
        self._set(
            np.concatenate([old.values[stay], values]) if len(old.values) else values,
            np.concatenate([old.sample_ids[stay], sample_ids]),
            None if label_ids is None else np.concatenate([self._ids[stay], ids]),
        )
        self._keep()

    def _check_added(self, values: np.ndarray, ids: np.ndarray, label_ids: Any) -> None:
        if (label_ids is None) != (self.config.patches_field is None):
            raise ConfigError("add_to_index: label_ids are required for an index of patches, and for no other")
        unique, counts = np.unique(ids, return_counts=True)
        if counts.max(initial=0) > 1:
            raise ConfigError(f"add_to_index: {unique[counts.argmax()]} occurs {counts.max()} times; pass each id once")
        if self.total_index_size and values.shape[1] != self._vectors.values.shape[1]:
            raise ConfigError(
                f"add_to_index: vectors of {values.shape[1]} values, the index has {self._vectors.values.shape[1]}; "
                "compute all of them with one model"
            )

    def remove_from_index(
        self,
        sample_ids: Any = None,
        label_ids: Any = None,
        allow_missing: bool = True,
        warn_missing: bool = False,
        reload: bool = True,
    ) -> None:
        """Remove vectors from the index; a field keeps them (FiftyOne's index clears the field).

        Raises:
            ConfigError: ``allow_missing`` is False and an id is not in the index.
        """
        wanted = sample_ids if label_ids is None else label_ids
        by = self.sample_ids if label_ids is None else self._ids
        wanted = np.asarray([] if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted), dtype=str)
        if not allow_missing:
            self._rows(wanted, by, False)
        stay = ~np.isin(by, wanted)
        if not self.is_external:
            self._removed |= set(self._ids[~stay].tolist())
        self._drop(stay)
        self._keep()

    def update(self, vectors: Vectors) -> None:
        """Index the vectors of the field, read anew; without a field, add them."""
        if self.is_external:
            self.add_to_index(vectors.values, vectors.sample_ids, label_ids=vectors.label_ids)
        else:
            self._take(vectors)
            _bases().SimilarityIndex.reload(self)

    def reload(self) -> None:
        """Read the field again, so that vectors of other sessions are found."""
        self._read_field()
        _bases().SimilarityIndex.reload(self)

    def cleanup(self) -> None:
        """Nothing is stored outside the run and the field."""

    def _read_field(self) -> None:
        if self.is_external:
            return
        options = {"embeddings": self.config.embeddings_field, "patches_field": self.config.patches_field}
        try:
            found = read_vectors(all_samples(self._dataset), report=False, **options)
        except ConfigError:
            if self._has_vectors():
                raise
            found = _EMPTY
        self._take(found)

    def _take(self, found: Vectors) -> None:
        """Index these vectors, without those that were removed."""
        if not self.is_external:
            self._seen = self._state()
        stay = ~np.isin(found.sample_ids if found.label_ids is None else found.label_ids, list(self._removed))
        labels = None if found.label_ids is None else found.label_ids[stay]
        self._set(found.values[stay], found.sample_ids[stay], labels)

    def _has_vectors(self) -> bool:
        """Whether an index that cannot be read is wrong; a field that is still empty is not."""
        return self.config.patches_field is not None or self._state()[1] > 0

    def _state(self) -> tuple[Any, int]:
        """When a sample last changed, and the number of vectors in the field: both cheap."""
        samples, field = all_samples(self._dataset), self.config.embeddings_field
        if self.config.patches_field is not None or not samples.has_field(field):
            return None, 0
        return samples.max("last_modified_at"), samples.exists(field).count()

    def _refresh(self) -> None:
        """Read the field again if another process or index added vectors: the App's server keeps its own copy."""
        if self.is_external or self.config.patches_field is not None:
            return
        if all_samples(self._dataset).max("last_modified_at") != self._seen[0]:
            now = self._state()
            if now[1] != self._seen[1]:
                self.reload()
            self._seen = now

    def _write_field(self, ids: np.ndarray, values: np.ndarray) -> None:
        if self.is_external:
            return
        utils = require("fiftyone.brain.internal.core.utils", "fiftyone")
        labels = None if self.config.patches_field is None else ids
        utils.add_embeddings(
            self._dataset, values, ids, labels, self.config.embeddings_field, patches_field=self.config.patches_field
        )

    def _set(self, values: np.ndarray, sample_ids: np.ndarray, label_ids: np.ndarray | None) -> None:
        self._vectors = Vectors(values, sample_ids, label_ids)
        self._active = None

    def _drop(self, stay: np.ndarray) -> None:
        old = self._vectors
        self._set(old.values[stay], old.sample_ids[stay], None if old.label_ids is None else old.label_ids[stay])

    def _keep(self) -> None:
        """Store a change with the run, and recompute the current view."""
        if self.key is not None and self.key in self.samples.list_brain_runs():
            self.save()
        _bases().SimilarityIndex.reload(self)

    # --- storage ------------------------------------------------------------------------------------------------------

    def serialize(self, reflective: bool = False) -> dict[str, Any]:
        """A JSON document: the removed ids and, without a field, the vectors as compressed arrays."""
        result: dict[str, Any] = {"cls": f"{__name__}.CosineSimilarityIndex", "removed": sorted(self._removed)}
        if self.is_external:
            pack = functools.partial(require("fiftyone.core.utils", "fiftyone").serialize_numpy_array, ascii=True)
            result |= {"embeddings": pack(self._vectors.values), "sample_ids": pack(self.sample_ids)}
            if self.label_ids is not None:
                result["label_ids"] = pack(self.label_ids)
        return result

    @classmethod
    def _from_dict(cls, d: dict[str, Any], samples: Any, config: Any, brain_key: str) -> Any:
        unpack = functools.partial(require("fiftyone.core.utils", "fiftyone").deserialize_numpy_array, ascii=True)
        vectors = None
        if "embeddings" in d:
            labels = unpack(d["label_ids"]) if "label_ids" in d else None
            vectors = Vectors(unpack(d["embeddings"]), unpack(d["sample_ids"]), labels)
        return cls(samples, config, brain_key, vectors=vectors, removed=d.get("removed", ()))

    # --- search -------------------------------------------------------------------------------------------------------

    def find_duplicates(self, thresh: float | None = None, fraction: float | None = None) -> None:
        """Find near-duplicates by cosine distance; FiftyOne's ``DuplicatesMixin`` describes the results.

        Raises:
            ConfigError: not exactly one of the two is given, or it is outside [0, 2] or [0, 1].
        """
        check_limits(thresh, fraction)
        self._refresh()
        self._drop_deleted(self.sample_ids)
        _bases().DuplicatesMixin.find_duplicates(self, thresh=thresh, fraction=fraction)

    def _kneighbors(
        self,
        query: Any = None,
        k: int | None = None,
        reverse: bool = False,
        aggregation: str | None = None,
        return_dists: bool = False,
    ) -> Any:
        self._refresh()
        if query is None:
            rows, distances = self._search.nearest(self.total_index_size if k is None else k)
            return (list(rows), list(distances)) if return_dists else list(rows)
        vectors, single = self._query(query, aggregation)
        while True:
            wanted = len(self._search.values) if k is None else k
            rows, distances = self._search.nearest(wanted, -vectors if reverse else vectors)
            if k is None or not self._drop_deleted(self._current(self.sample_ids)[rows].ravel()):
                break
        return self._answer(rows, 2 - distances if reverse else distances, single, return_dists)

    def _radius_neighbors(self, query: Any = None, thresh: float | None = None, return_dists: bool = False) -> Any:
        check_limits(thresh, None)
        limit = 0.0 if thresh is None else float(thresh)
        if query is None:
            rows, distances = self._search.within(limit)
            return (rows, distances) if return_dists else rows
        vectors, single = self._query(query, None)
        return self._answer(*self._search.within(limit, vectors), single, return_dists)

    @property
    def _search(self) -> Neighbours:
        """The vectors of the current view, ready for search."""
        rows = self._current_inds
        if self._active is None or not np.array_equal(self._active[0], rows):
            self._active = rows, Neighbours(self._current(self._vectors.values))
        return self._active[1]

    def _current(self, values: np.ndarray) -> np.ndarray:
        """Rows of the current view, in its order."""
        rows = self._current_inds
        return values if rows is None else values[rows]

    def _query(self, query: Any, aggregation: str | None) -> tuple[np.ndarray, bool]:
        """Query vectors ``(M, D)``, and whether the answer is one list; ids become their vectors."""
        single = isinstance(query, str)
        array = np.asarray([query] if single else query)
        if array.dtype.kind in "US":
            array = self._vectors.values[self._rows(array, self._ids, False)]
        elif array.ndim == 1:
            array, single = array[None], True
        width = self._vectors.values.shape[1]
        if array.ndim != 2 or (self.total_index_size and array.shape[1] != width):
            raise ConfigError(
                f"a query of shape {array.shape}, the index has vectors of {width} values; "
                "text needs a field with the vectors that the model compares with text"
            )
        array = checked(list(array), [f"query {i}" for i in range(len(array))], "query")
        if aggregation not in (None, "mean"):
            raise ConfigError(f"aggregation {aggregation!r} is not supported; use 'mean'")
        if aggregation == "mean":
            array = (array / np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)).mean(0, keepdims=True)
        return array, single or aggregation is not None

    def _rows(self, wanted: Sequence[str] | np.ndarray, by: np.ndarray, allow_missing: bool) -> np.ndarray:
        """Positions of ids in ``by``, in the order of ``wanted``; of all labels of a sample."""
        where: dict[str, list[int]] = {}
        for row, each in enumerate(by.tolist()):
            where.setdefault(each, []).append(row)
        missing = [each for each in wanted if each not in where]
        if missing and not allow_missing:
            raise ConfigError(
                f"{len(missing)} ids are not in this index, first {missing[0]}: they have no vector, or were added "
                "after it was read; call reload()"
            )
        return np.array([row for each in wanted for row in where.get(each, ())], dtype=np.int64)

    def _drop_deleted(self, sample_ids: np.ndarray) -> bool:
        """Drop the vectors of samples that were deleted from the dataset; True if there were any."""
        unique = np.unique(sample_ids)
        if not len(unique):
            return False
        alive = all_samples(self._dataset).select(unique.tolist()).values("id")
        gone = np.setdiff1d(unique, np.array(alive, dtype=str))
        if len(gone):
            self._drop(~np.isin(self.sample_ids, gone))
            _bases().SimilarityIndex.reload(self)
        return bool(len(gone))

    def _answer(self, rows: Any, distances: Any, single: bool, return_dists: bool) -> tuple[Any, ...]:
        labels = self.current_label_ids
        sample_ids = [self.current_sample_ids[each].tolist() for each in rows]
        label_ids = None if labels is None else [labels[each].tolist() for each in rows]
        lists = [each.tolist() for each in distances]
        if single:
            sample_ids, label_ids, lists = sample_ids[0], label_ids and label_ids[0], lists[0]
        return (sample_ids, label_ids, lists) if return_dists else (sample_ids, label_ids)


_EMPTY = Vectors(np.zeros((0, 0), np.float32), np.array([], dtype="<U24"))


def check_limits(threshold: Any, fraction: Any) -> None:
    """Raise unless exactly one of a cosine distance in [0, 2] and a fraction in [0, 1] is given.

    Raises:
        ConfigError: as above.
    """
    if (threshold is None) == (fraction is None):
        raise ConfigError("give either a threshold (cosine distance, 0 for exact copies) or a fraction")
    name, value, top = ("threshold", threshold, 2) if fraction is None else ("fraction", fraction, 1)
    if not 0 <= value <= top:
        raise ConfigError(f"{name} {value} is outside [0, {top}]")


def _bases() -> Any:
    """The module with FiftyOne's base classes."""
    return require("fiftyone.brain.similarity", "fiftyone")


@functools.cache
def _classes() -> dict[str, type]:
    """The three classes by name: the parts above on top of FiftyOne's, which cannot be imported without it."""
    bases = _bases()
    parts = {
        "CosineSimilarityConfig": (_Config, bases.SimilarityConfig),
        "CosineSimilarity": (_Method, bases.Similarity),
        "CosineSimilarityIndex": (_Index, bases.SimilarityIndex, bases.DuplicatesMixin),
    }
    return {
        name: type(name, each, {"__module__": __name__, "__doc__": each[0].__doc__}) for name, each in parts.items()
    }


def __getattr__(name: str) -> Any:
    """Classes by the paths that FiftyOne stores: ``CosineSimilarityConfig``, ``CosineSimilarity`` and its index."""
    if not name.startswith("CosineSimilarity"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _classes()[name]
