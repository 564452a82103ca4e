"""Weights with a piecewise-linear schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import Tensor

from agglo.balancers._weights import Weighted, nearest, teacher_of

Points = list[tuple[float, float]]


class Schedule(Weighted):
    """``L = Σ_k w_k f_k(τ) L_k`` with piecewise-linear factors over progress ``τ = step / (total - 1)``.

    C-RADIOv4 uses ``fixed``. In a recipe::

        balancer:
          kind: schedule
          points:
            siglip2/summary: [[0, 1.5], [1, 1]]
            "*/spatial": [[0, 1], [1, 1.25]]
            sam3: [[0.6, 0], [0.7, 1]]

    A factor is constant before its first and after its last point; two points at one progress are a jump. A term with
    factor 0 is left out. Terms that match no key have factor 1.

    Args:
        weights: term name to the recipe's weight, which the factor multiplies.
        points: term, teacher or glob over terms, to ``[progress, factor]`` in order of progress. If several keys match
            a term, its own name comes first, then its teacher's, then the first glob.

    Raises:
        ValueError: a key matches no term; points are missing, out of order, outside [0, 1], or negative.
    """

    def __init__(self, weights: Mapping[str, float], /, *, points: dict[str, list[tuple[float, float]]]) -> None:
        super().__init__(weights)
        for key, line in points.items():
            _check(key, line)
            if not any(_rank(key, name) for name in self.weights):
                known = {**self.weights, **{t: 0 for t in map(teacher_of, self.weights) if t}}
                raise ValueError(f"points: {key!r} matches no term; {nearest(key, known)}")
        self.lines: dict[str, Points] = {}
        for name in self.names:
            matching = [key for key in points if _rank(key, name)]
            if matching:  # max takes the first of equals
                self.lines[name] = points[max(matching, key=lambda key: _rank(key, name))]

    def combine(
        self, terms: dict[str, Tensor], *, step: int, total: int, per_image: Mapping[str, Tensor] | None
    ) -> Tensor:
        factors = self.factors(step / max(1, total - 1))
        active = {name: term for name, term in terms.items() if factors[name] > 0}
        return self.weigh(active, factors) if active else self.zero(terms)

    def factors(self, progress: float) -> dict[str, float]:
        """Factor of every term at a progress from 0 (first step) to 1 (last)."""
        return {name: _at(self.lines[name], progress) if name in self.lines else 1.0 for name in self.names}


def _rank(key: str, name: str) -> int:
    """How closely a key matches a term: 3 its name, 2 its teacher, 1 a glob, 0 not."""
    if key == name:
        return 3
    return 2 if key == teacher_of(name) else int(fnmatchcase(name, key))


def _check(key: str, line: Points) -> None:
    if not line:
        raise ValueError(f"points: {key!r} has no points: give [[progress, factor], ...]")
    for progress, factor in line:
        if not 0 <= progress <= 1:
            raise ValueError(f"points: {key!r} has a progress of {progress}, which must be in [0, 1]")
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"points: {key!r} has a factor of {factor}, which must be finite and at least 0")
    if any(right[0] < left[0] for left, right in pairwise(line)):
        raise ValueError(f"points: {key!r} must be in order of progress, got {[list(point) for point in line]}")


def _at(line: Points, progress: float) -> float:
    if progress < line[0][0]:
        return line[0][1]
    for (start, first), (stop, second) in pairwise(line):
        if progress < stop:
            return first + (second - first) * (progress - start) / (stop - start)
    return line[-1][1]
