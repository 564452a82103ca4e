"""Vectors of a FiftyOne collection: computed where they are missing, read, and checked.

Modules that import torch are imported in functions: the App's server imports this one to list the runs of a dataset.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from agglo.config import nearest
from agglo.extras import require
from agglo.types import ConfigError

COMPUTE = ("batch_size", "num_workers", "skip_failures", "progress")
"""Options of ``compute_embeddings`` that functions pass on."""
_LISTS = {"Detections": "detections", "Polylines": "polylines"}
"""Label types that hold a list → the name of that list."""


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Vectors by sample, or by label where they belong to patches.

    Args:
        values: ``(N, D)`` floats, all finite, no row of zeros.
        sample_ids: ``(N,)`` strings.
        label_ids: ``(N,)`` strings for patches, else None.
        left_out: ids of the samples (of the labels, for patches) without a vector, and their paths.
        where: the field or argument that the vectors come from.
    """

    values: np.ndarray
    sample_ids: np.ndarray
    label_ids: np.ndarray | None = None
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: str = ""


def collection_name(samples: Any) -> str:
    """The name of the dataset behind a collection, quoted."""
    return repr(getattr(samples, "dataset_name", None) or samples.name)


def check_samples(samples: Any) -> None:
    """Raise if a collection is empty.

    Raises:
        ConfigError: the collection has no samples.
    """
    if not len(samples):
        raise ConfigError(f"dataset {collection_name(samples)}: this collection has no samples; add photographs first")


def read_vectors(
    samples: Any,
    embeddings: Any = None,
    *,
    similarity_index: Any = None,
    patches_field: str | None = None,
    report: bool = True,
) -> Vectors:
    """Read the vectors of a collection, and check them.

    Args:
        samples: dataset or view.
        embeddings: name of a field; or ``(N, D)`` array or list of vectors in the order of ``samples``, None where a
            sample has none; or a mapping of sample ids to vectors.
        similarity_index: an index or its brain key, in place of ``embeddings``.
        patches_field: label field whose labels have the vectors, in their attribute ``embeddings``.
        report: warn about samples without a vector.

    Raises:
        ConfigError: the collection is empty, the field does not exist, no sample has a vector, or vectors differ in
            length, are not finite, or are all zeros; the message names the sample.
    """
    check_samples(samples)
    if (embeddings is None) == (similarity_index is None):
        raise ConfigError("give either embeddings (the name of a field, or an array) or similarity_index")
    if similarity_index is not None:
        found, names, where = _from_index(samples, similarity_index)
    elif isinstance(embeddings, str):
        found, names, where = _from_field(samples, embeddings, patches_field)
    else:
        found, names, where = _from_array(samples, embeddings)
    kept = [(sample, label, vector) for sample, label, vector in found if vector is not None]
    if not kept:
        raise ConfigError(f"{where}: no sample has a vector; compute them first, or pass model=")
    ids = [label or sample for sample, label, _ in kept]
    values = checked([vector for _, _, vector in kept], [names.get(i, i) for i in ids], where)
    missing = [label or sample for sample, label, vector in found if vector is None]
    labels = np.array([label for _, label, _ in kept]) if kept[0][1] is not None else None
    sample_ids = np.array([sample for sample, _, _ in kept])
    vectors = Vectors(values, sample_ids, labels, {each: names.get(each, each) for each in missing}, where)
    if report:
        report_left_out(vectors)
    return vectors


def report_left_out(vectors: Vectors, samples: Any = None) -> None:
    """Warn if samples have no vector; of ``samples`` only, if given."""
    missing, total = list(vectors.left_out), len(vectors.values) + len(vectors.left_out)
    if samples is not None and vectors.label_ids is None:
        wanted = set(samples.values("id"))
        missing, total = [each for each in missing if each in wanted], len(wanted)
    if missing:
        warnings.warn(
            f"{vectors.where}: {len(missing)} of {total} have no vector and are left out, "
            f"first {vectors.left_out[missing[0]]}",
            stacklevel=4,
        )


def checked(vectors: Sequence[Any], names: Sequence[str], where: str) -> np.ndarray:
    """Stack vectors to ``(N, D)`` floats.

    Args:
        vectors: one-dimensional arrays or lists.
        names: what to call each of them in an error.
        where: the field or argument they come from.

    Raises:
        ConfigError: vectors differ in length, are not finite, or are all zeros.
    """
    rows = [np.asarray(vector) for vector in vectors]
    for row, name in zip(rows, names, strict=True):
        if row.ndim != 1 or not row.size or row.dtype.kind not in "fiu":
            raise ConfigError(f"{where}: {name} has {row.dtype} of shape {row.shape}, not a vector of numbers")
    sizes = Counter(row.size for row in rows)
    if len(sizes) > 1:
        (usual, many), *_, (odd, few) = sizes.most_common()
        first = next(name for row, name in zip(rows, names, strict=True) if row.size == odd)
        raise ConfigError(
            f"{where}: vectors of {usual} ({many}) and of {odd} values ({few}, first {first}); "
            "compute all of them with one model"
        )
    values = np.stack(rows)
    values = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
    good = np.isfinite(values).all(1)
    if not good.all():
        index = int(np.argmin(good))
        raise ConfigError(
            f"{where}: {names[index]} has {int((~np.isfinite(values[index])).sum())} values that are not finite "
            f"({int((~good).sum())} samples in all); clear or recompute its vector"
        )
    zero = ~values.any(1)
    if zero.any():
        raise ConfigError(f"{where}: {names[int(np.argmax(zero))]} has a vector of zeros, which has no direction")
    return values


def fill(samples: Any, field: Any, model: Any, model_kwargs: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Compute the vectors of the samples that have none in ``field``; does nothing without a model.

    Args:
        samples: dataset or view.
        field: name of the field; created if necessary.
        model: a FiftyOne model, the name of a zoo model, or None.
        model_kwargs: arguments of the zoo model.
        options: arguments of ``compute_embeddings``, of :data:`COMPUTE`.

    Returns:
        The model, loaded, or None.

    Raises:
        ConfigError: the collection is empty, an option is unknown, the field has no name, or it has vectors of another
            agglo model (:func:`agglo.integrations.fiftyone.compute_embeddings`).
    """
    check_samples(samples)
    check_options(options)
    if model is None:
        return None
    if not isinstance(field, str):
        raise ConfigError("name the field for the model's vectors: embeddings='radio'")
    from agglo.integrations.fiftyone.encoding import compute_embeddings
    from agglo.integrations.fiftyone.model import AggloModel

    model = load(model, model_kwargs)
    if isinstance(model, AggloModel):
        compute_embeddings(samples, model, field, **options)
        return model
    todo = samples
    if samples.has_field(field):
        todo = samples.match(require("fiftyone", "fiftyone").ViewField(field) == None)  # noqa: E711
    if len(todo):
        todo.compute_embeddings(model, embeddings_field=field, **options)
    return model


def check_options(options: Iterable[str], known: Iterable[str] = COMPUTE) -> None:
    """Raise for an unknown option, with the nearest name.

    Raises:
        ConfigError: as above.
    """
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{nearest(name, known)}")


def load(model: Any, model_kwargs: Mapping[str, Any] | None = None) -> Any:
    """A model of the zoo by its name; a model object and None as they are."""
    if not isinstance(model, str):
        return model
    return require("fiftyone.zoo", "fiftyone").load_zoo_model(model, **(model_kwargs or {}))


Found = tuple[list[tuple[str, str | None, Any]], dict[str, str], str]
"""``(sample id, label id or None, vector or None)`` of each; a readable name by id; where they come from."""


def vector_fields(samples: Any) -> list[str]:
    """Names of the collection's vector fields."""
    fiftyone = require("fiftyone", "fiftyone")
    return sorted(samples.get_field_schema(ftype=(fiftyone.VectorField, fiftyone.ArrayField), flat=True))


def patches_path(samples: Any, patches_field: str, attribute: str) -> str:
    """The path of a label's attribute: ``("boxes", "radio")`` becomes ``boxes.detections.radio``."""
    field = samples.get_field(patches_field)
    kind = getattr(getattr(field, "document_type", None), "__name__", None)
    if kind is None:
        raise ConfigError(
            f"dataset {collection_name(samples)} has no label field {patches_field!r}"
            + nearest(patches_field, samples.get_field_schema())
        )
    root = ".".join(filter(None, (patches_field, _LISTS.get(kind))))
    return f"{root}.{attribute.removeprefix(root + '.')}"


def _from_field(samples: Any, field: str, patches_field: str | None) -> Found:
    where = f"field {field!r} of dataset {collection_name(samples)}"
    if patches_field is not None:
        return _from_patches(samples, field, patches_field)
    if not samples.has_field(field):
        known = vector_fields(samples)
        advice = nearest(field, known) if known else ", nor another with vectors; compute them first, or pass model="
        raise ConfigError(f"dataset {collection_name(samples)} has no field {field!r}{advice}")
    ids, paths, vectors = samples.values(["id", "filepath", field])
    return [(i, None, v) for i, v in zip(ids, vectors, strict=True)], dict(zip(ids, paths, strict=True)), where


def _from_patches(samples: Any, field: str, patches_field: str) -> Found:
    path = patches_path(samples, patches_field, field)
    declared = samples.has_field(path)  # compute_patch_embeddings writes attributes that the schema does not list
    ids, files = samples.values(["id", "filepath"])
    labels = samples.values(path.removesuffix(path.rpartition(".")[2]) + "id")
    values = samples.values(path, _field=None if declared else require("fiftyone", "fiftyone").VectorField())
    found, names = [], {}
    for sample, file, label, vector in zip(ids, files, labels, values, strict=True):
        several = isinstance(label, list)
        for one, v in zip(label if several else [label], _aligned(label, vector), strict=True):
            if one is not None:
                found.append((sample, one, v))
                names[one] = f"label {one} of {file}"
    return found, names, f"{path!r} of dataset {collection_name(samples)}"


def _aligned(labels: Any, vectors: Any) -> Iterable[Any]:
    if not isinstance(labels, list):
        return [vectors]
    return vectors if vectors is not None else [None] * len(labels)


def _from_array(samples: Any, embeddings: Any) -> Found:
    ids, paths = samples.values(["id", "filepath"])
    if isinstance(embeddings, Mapping):
        vectors = [embeddings.get(i) for i in ids]
    else:
        vectors = list(embeddings)
        if len(vectors) != len(ids):
            raise ConfigError(
                f"embeddings: {len(vectors)} vectors for {len(ids)} samples; pass one each, None for none"
            )
    return [(i, None, v) for i, v in zip(ids, vectors, strict=True)], dict(zip(ids, paths, strict=True)), "embeddings"


def _from_index(samples: Any, index: Any) -> Found:
    """The vectors of an index. FiftyOne's own index is read anew: a query centres the one in memory in place."""
    if isinstance(index, str):
        index = load_index(samples, index, cache=False)
    ids, paths = samples.values(["id", "filepath"])
    values, sample_ids, labels = index.get_embeddings(sample_ids=ids, allow_missing=True, warn_missing=False)
    if labels is not None:
        raise ConfigError(f"index {index.key!r} has vectors of patches; scores and layouts of samples need samples'")
    held = dict(zip(sample_ids, values, strict=True))
    return [(i, None, held.get(i)) for i in ids], dict(zip(ids, paths, strict=True)), f"index {index.key!r}"


def load_index(samples: Any, key: str, *, cache: bool = True) -> Any:
    """The similarity index that is stored under a brain key.

    Raises:
        ConfigError: the dataset has no similarity index of that key.
    """
    known = samples.list_brain_runs(type="similarity")
    if key not in known:
        raise ConfigError(
            f"dataset {collection_name(samples)} has no similarity index {key!r}"
            + (nearest(key, known) if known else "; build one with agglo.integrations.fiftyone.similarity")
        )
    return samples.load_brain_results(key, cache=cache)
