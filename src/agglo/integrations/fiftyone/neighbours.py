"""Exact cosine neighbours: candidates by scikit-learn in float32, their distances in float64."""

from __future__ import annotations

import numpy as np

from agglo.extras import require

_MARGIN = 8
"""Candidates beyond k: float32 may order equally distant vectors in any way."""
_SLACK = 1e-5
"""Added to a radius in float32, so that no vector at exactly the threshold is lost."""
_CHUNK = 2**23
"""Values of float64 that are compared at a time: 64 MiB."""


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
        self._search = require("sklearn.neighbors", "fiftyone").NearestNeighbors(
            algorithm="brute", metric="sqeuclidean"
        )
        self._search.fit(self._unit)

    def nearest(self, k: int, queries: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query, nearest first.

        Args:
            k: at most N are returned, N - 1 without queries.
            queries: ``(M, D)``; None compares each vector with all others, itself left out.

        Returns:
            rows ``(M, k)`` and distances ``(M, k)``.
        """
        own = queries is None
        limit = len(self.values) - own
        if limit < 1 or k < 1:
            rows = len(self.values) if queries is None else len(queries)
            return np.zeros((rows, 0), np.int64), np.zeros((rows, 0))
        found = self._search.kneighbors(
            None if queries is None else _unit(queries), min(k + _MARGIN, limit), return_distance=False
        )
        distances = self._exact(self.values if queries is None else queries, found)
        order = np.lexsort((found, distances), axis=1)[:, : min(k, limit)]
        return np.take_along_axis(found, order, 1), np.take_along_axis(distances, order, 1)

    def within(self, threshold: float, queries: np.ndarray | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """All vectors at a distance of at most ``threshold`` of each query, nearest first; arguments as above."""
        if queries is None and len(self.values) < 2:
            return [np.zeros(0, np.int64)] * len(self.values), [np.zeros(0)] * len(self.values)
        radius = 2 * threshold + _SLACK
        found = self._search.radius_neighbors(
            None if queries is None else _unit(queries), radius, return_distance=False
        )
        source = self.values if queries is None else queries
        rows, distances = [], []
        for index, candidates in enumerate(found):
            exact = self._exact(source[index : index + 1], candidates[None])[0]
            order = np.lexsort((candidates, exact))
            order = order[exact[order] <= threshold]
            rows.append(candidates[order])
            distances.append(exact[order])
        return rows, distances

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
                other = self.values[part] / self._norms[part][..., None]
                result[start : start + step, left : left + columns] = 0.5 * np.square(other - own).sum(-1)
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
