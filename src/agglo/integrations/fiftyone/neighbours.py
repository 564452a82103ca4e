"""Exact cosine neighbours: candidates by scikit-learn in float32, their distances in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from agglo.extras import require

_MARGIN = 8
"""Candidates beyond k: float32 may order equally distant vectors in any way."""
_SLACK = 1e-5
"""Added to a threshold in float32, so that no vector at exactly that distance is lost."""
_CHUNK = 2**18
"""Values of float64 that are compared at a time: 2 MiB, which stay in the processor's cache."""


class Neighbours:
    """Cosine neighbours among fixed vectors. The distance is ``1 - cos``, in [0, 2]; 0 between equal vectors, exactly.

    It is computed as half the squared distance of the unit vectors, which does not cancel for near-duplicates. Equal
    distances are ordered by row; of more than 8 at the end of the k nearest, any may be returned.

    Args:
        values: ``(N, D)`` floats, finite, no row of zeros.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self._norms = _norms(values)
        self._unit = (values / self._norms[:, None]).astype(np.float32)

    def nearest(self, k: int, queries: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query, nearest first.

        Args:
            k: at most N are returned, N - 1 without queries.
            queries: ``(M, D)``; None compares each vector with all others, itself left out.

        Returns:
            rows ``(M, k)`` and distances ``(M, k)``.
        """
        source = self.values if queries is None else queries
        limit = len(self.values) - (queries is None)
        count = min(k + _MARGIN, limit)
        if k < 1 or limit < 1 or not len(source):
            return np.zeros((len(source), 0), np.int64), np.zeros((len(source), 0))

        def reduce(block: np.ndarray) -> np.ndarray:
            return np.argpartition(block, count - 1, axis=1)[:, :count]

        found = np.concatenate(list(self._blocks(queries, reduce)))
        distances = self._exact(source, found)
        order = np.lexsort((found, distances), axis=1)[:, : min(k, limit)]
        return np.take_along_axis(found, order, 1), np.take_along_axis(distances, order, 1)

    def within(self, threshold: float, queries: np.ndarray | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """All vectors at a distance of at most ``threshold`` of each query, nearest first; arguments as above."""
        source = self.values if queries is None else queries

        def reduce(block: np.ndarray) -> list[np.ndarray]:
            return [np.flatnonzero(row <= threshold + _SLACK) for row in block]

        rows, distances = [], []
        for index, candidates in enumerate(chain.from_iterable(self._blocks(queries, reduce))):
            exact = self._exact(source[index : index + 1], candidates[None])[0] if len(candidates) else np.zeros(0)
            order = np.lexsort((candidates, exact))
            order = order[exact[order] <= threshold]
            rows.append(candidates[order])
            distances.append(exact[order])
        return rows, distances

    def _blocks(self, queries: np.ndarray | None, reduce: Callable[[np.ndarray], Any]) -> Iterator[Any]:
        """Reduce the float32 distances ``(M, N)`` by blocks of rows; a vector is infinitely far from itself."""

        def block(distances: np.ndarray, start: int) -> Any:
            if queries is None:
                rows = np.arange(len(distances))
                distances[rows, start + rows] = np.inf
            return reduce(distances)

        if not len(self.values) or (queries is not None and not len(queries)):
            return
        metrics = require("sklearn.metrics", "fiftyone")
        unit = self._unit if queries is None else _unit(queries)
        yield from metrics.pairwise_distances_chunked(unit, self._unit, reduce_func=block, metric="cosine")

    def _exact(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Distances of each query to the vectors in its row of ``rows``, in float64."""
        result = np.empty(rows.shape)
        width = self.values.shape[1]
        columns = max(1, min(rows.shape[1], _CHUNK // width))
        step = max(1, _CHUNK // (columns * width))
        for start in range(0, len(rows), step):
            block = queries[start : start + step]
            own = (block / _norms(block)[:, None])[:, None]
            for left in range(0, rows.shape[1], columns):
                part = rows[start : start + step, left : left + columns]
                apart = self.values[part] / self._norms[part][..., None] - own
                result[start : start + step, left : left + columns] = 0.5 * np.einsum("mnd,mnd->mn", apart, apart)
        return result


def cover(order: np.ndarray, near: list[np.ndarray]) -> np.ndarray:
    """Keep vectors greedily: in ``order``, each one that is not near to one that is already kept.

    Args:
        order: all rows, in order of preference.
        near: the neighbours of each row, without itself.

    Returns:
        ``(N,)`` bool, True for the kept.
    """
    kept = np.zeros(len(order), bool)
    covered = np.zeros(len(order), bool)
    for row in order:
        if not covered[row]:
            kept[row] = True
            covered[near[row]] = True
    return kept


def _norms(values: np.ndarray) -> np.ndarray:
    """Lengths in float64; scaled first, so that squares of float32's largest and smallest values stay finite."""
    scale = np.abs(values).max(1).astype(np.float64)
    return scale * np.sqrt(np.square(values / scale[:, None]).sum(1))


def _unit(values: np.ndarray) -> np.ndarray:
    return (values / _norms(values)[:, None]).astype(np.float32)
