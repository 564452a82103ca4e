"""Scores of samples, in the fields and brain keys of FiftyOne's own functions: representativeness and uniqueness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

import agglo
from agglo.config import nearest
from agglo.extras import require
from agglo.integrations.fiftyone.neighbours import Neighbours, cover
from agglo.integrations.fiftyone.vectors import Vectors, fill, read_vectors
from agglo.types import ConfigError

METHODS = ("cluster-center", "cluster-center-downweight")
NEAREST = (0.6, 0.3, 0.1)
"""Weights of the nearest, second and third neighbour in :func:`uniqueness`."""
CLUSTERS = 20
NEAR = 0.125
"""Cosine distance below which a sample repeats a better one: unit vectors half a unit apart."""
REPEATED = 0.7
"""Factor on the score of a sample that repeats a better one."""


def representativeness(
    samples: Any,
    representativeness_field: str = "representativeness",
    method: str = "cluster-center",
    *,
    embeddings: Any = None,
    similarity_index: Any = None,
    model: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    clusters: int | None = None,
    seed: int = 51,
    **options: Any,
) -> None:
    """Score how near each sample is to the centre of its cluster: 1 for the most central one, less further out.

    The unit vectors are clustered by k-means. With ``d`` the distance of a sample to its centre, the score is
    ``(mean d + min d) / (mean d + d)`` with the mean and minimum of its cluster, so it is in (0, 1] and does not depend
    on the cluster's width. A cluster of one represents nothing: its sample is scored as an outlier of the nearest
    cluster of several. FiftyOne 1.22.1 gives the *outermost* sample of each cluster 1, NaN to a cluster of one, and
    fails below 20 samples.

    Args:
        samples: dataset or view.
        representativeness_field: field of the score, and brain key of the run.
        method: ``cluster-center``; or ``cluster-center-downweight``, which multiplies the score of a sample by 0.7 if
            one with a higher score lies within a cosine distance of 0.125.
        embeddings: name of the field with the vectors, or an array ``(N, D)``; with ``model``, the field to fill.
        similarity_index: an index or its brain key, in place of ``embeddings``.
        model: model or name of a zoo model that computes missing vectors.
        model_kwargs: arguments of the zoo model.
        clusters: number of clusters; by default the square root of the number of samples, at most 20.
        seed: seed of k-means.
        options: arguments of ``compute_embeddings``.

    Raises:
        ConfigError: unknown method, a number of clusters that is not positive, or vectors that cannot be used
            (:func:`~agglo.integrations.fiftyone.vectors.read_vectors`).
    """
    if method not in METHODS:
        raise ConfigError(f"representativeness: unknown method {method!r}{nearest(method, METHODS)}")
    if clusters is not None and clusters < 1:
        raise ConfigError(f"representativeness: clusters={clusters} is not positive")
    fill(samples, embeddings, model, model_kwargs, **options)
    vectors = read_vectors(samples, embeddings, similarity_index=similarity_index)
    runs = require("fiftyone.brain.internal.core.representativeness", "fiftyone")
    config = runs.RepresentativenessConfig(
        representativeness_field,
        method=method,
        embeddings_field=embeddings if isinstance(embeddings, str) else None,
        similarity_index=similarity_index,
        model=model,
        model_kwargs=model_kwargs,
        computed_by=f"agglo {agglo.__version__}",
    )
    scores = central(vectors.values, clusters, seed)
    if method == "cluster-center-downweight":
        scores = downweighted(vectors.values, scores)
    _store(samples, representativeness_field, config, vectors, scores)


def uniqueness(
    samples: Any,
    uniqueness_field: str = "uniqueness",
    *,
    embeddings: Any = None,
    similarity_index: Any = None,
    model: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Score how far each sample is from its three nearest neighbours: 1 for the most unique, 0 for an exact copy.

    The score is the weighted geometric mean of the cosine distances, 0.6 : 0.3 : 0.1 from the nearest on, divided by
    the largest score. FiftyOne 1.22.1 leaves out the nearest neighbour, so that the two of an identical pair look
    unique; an arithmetic mean would still rank a pair far from everything else above a sample of a dense cluster.

    Arguments and errors as for :func:`representativeness`.
    """
    fill(samples, embeddings, model, model_kwargs, **options)
    vectors = read_vectors(samples, embeddings, similarity_index=similarity_index)
    runs = require("fiftyone.brain.internal.core.uniqueness", "fiftyone")
    config = runs.UniquenessConfig(
        uniqueness_field,
        embeddings_field=embeddings if isinstance(embeddings, str) else None,
        similarity_index=similarity_index,
        model=model,
        model_kwargs=model_kwargs,
        computed_by=f"agglo {agglo.__version__}",
    )
    _store(samples, uniqueness_field, config, vectors, isolation(vectors.values))


def central(values: np.ndarray, clusters: int | None = None, seed: int = 51) -> np.ndarray:
    """The scores of :func:`representativeness`.

    Args:
        values: ``(N, D)``, no row of zeros.
        clusters: as there.
        seed: as there.

    Returns:
        ``(N,)`` in (0, 1].
    """
    unit = values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    wanted = min(CLUSTERS, math.isqrt(len(unit) - 1) + 1) if clusters is None else clusters
    wanted = min(wanted, len({row.tobytes() for row in unit.round(6) + 0.0}))  # + 0.0: -0.0 and 0.0 are equal
    means = require("sklearn.cluster", "fiftyone").KMeans(wanted, n_init=4, random_state=seed).fit(unit)
    labels, centres = means.labels_, means.cluster_centers_
    several = np.flatnonzero(np.bincount(labels, minlength=len(centres)) > 1)
    alone = ~np.isin(labels, several)
    if len(several) and alone.any():
        apart = np.linalg.norm(unit[alone][:, None] - centres[several], axis=2)
        labels = labels.copy()
        labels[alone] = several[apart.argmin(1)]
    distance = np.linalg.norm(unit - centres[labels], axis=1)
    scores = np.ones(len(unit))
    for cluster in np.unique(labels):
        own = labels == cluster
        mean = distance[own].mean()
        if mean > 1e-9:  # else one sample, or copies of one: rounding would rank them
            scores[own] = (mean + distance[own].min()) / (mean + distance[own])
    return scores


def downweighted(values: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Multiply by 0.7 the scores of samples near one with a higher score; ``(N,)``."""
    near, _ = Neighbours(values).within(NEAR)
    kept = cover(np.argsort(-scores, kind="stable"), near)
    return np.where(kept, scores, REPEATED * scores)


def isolation(values: np.ndarray) -> np.ndarray:
    """The scores of :func:`uniqueness`: ``(N, D)``, no row of zeros, to ``(N,)`` in [0, 1]."""
    _, distances = Neighbours(values).nearest(len(NEAREST))
    if not distances.shape[1]:
        return np.ones(len(values))
    weights = np.array(NEAREST[: distances.shape[1]])
    with np.errstate(divide="ignore"):  # log 0 = -inf: a copy scores 0
        scores = np.exp(np.log(distances) @ (weights / weights.sum()))
    top = scores.max()
    return scores / top if top > 0 else scores


def _store(samples: Any, field: str, config: Any, vectors: Vectors, scores: np.ndarray) -> None:
    """Write the field and the run as FiftyOne's functions do; samples without a vector get no score."""
    method = config.build()
    method.register_run(samples, field, cleanup=False)
    fiftyone = require("fiftyone", "fiftyone")
    samples._dataset.add_sample_field(field, fiftyone.FloatField)
    values: dict[str, float | None] = dict.fromkeys(vectors.left_out)
    values.update(zip(vectors.sample_ids.tolist(), scores.tolist(), strict=True))
    samples.set_values(field, values, key_field="id")
    method.save_run_results(samples, field, None)
