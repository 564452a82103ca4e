"""Compare two models on the same images: bootstrap intervals, and the classes and images that changed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from agglo.config import nearest
from agglo.results.records import STUDENT, PerImage, Result, ResultError, current, read, results_file
from agglo.results.tables import differences, labels
from agglo.types import ConfigError

DRAWS = 10_000
"""Bootstrap samples."""
_BLOCK = 2**24


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference ``b - a`` over images and its 95 % interval.

    Args:
        images: their number.
        a, b: the two means.
        low, high: the interval, by paired bootstrap over images.
        better: share of the bootstrap samples in which b is above a; ties count half.
    """

    metric: str
    images: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    better: float

    @property
    def sure(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Compared:
    """One eval of two models.

    Args:
        name: of the results.
        metrics: metric → ``(a, b)``, of the metrics that both have.
        lower_is_better: the metrics that are better when lower.
        intervals: of the metrics recorded per image.
        classes: metric → ``(class, a, b)``, the largest change first.
        changed: metric → ``(image, a, b)``, the largest change first; images with equal values are left out.
        why: the reason why the results do not compare; everything else is then empty.
        notes: remarks.
    """

    name: str
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    lower_is_better: frozenset[str] = frozenset()
    intervals: Sequence[Interval] = ()
    classes: Mapping[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    changed: Mapping[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    why: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a folder of results.

    Args:
        place: as the user wrote it.
        folder: of the results.
        results: by the model's row of a table (:func:`agglo.results.tables.labels`), oldest first.
        wanted: the row that was named, or that of a run's student; empty if several could be meant.
    """

    place: str
    folder: Path
    results: Mapping[str, list[Result]]
    wanted: str

    def of(self, row: str) -> list[Result]:
        """The results of one row."""
        return self.results[row]

    def name(self, row: str) -> str:
        """The model's name, without the suffix that distinguishes models of one name."""
        return str(self.results[row][-1].model["name"])

    def time(self, row: str) -> str:
        """When the row's newest result was measured."""
        return max(result.time for result in self.results[row])


def read_models(place: str) -> Models:
    """Read ``FOLDER`` or ``FOLDER#ROW``.

    Raises:
        ConfigError: no results, or no such row.
    """
    path, _, wanted = (place, "", "") if os.path.exists(place) else place.rpartition("#")
    path = path or place
    found = current(read(path))
    if not found:
        raise ConfigError(f"{results_file(path)} holds no results: measure first, with `agglo eval MODEL`")
    called = labels(found)
    rows: dict[str, list[Result]] = {}
    for each in found:
        rows.setdefault(called[each.id], []).append(each)
    if wanted and wanted not in rows:
        raise ConfigError(f"{path} holds no results of {wanted!r}{nearest(wanted, rows)}")
    students = {called[each.id] for each in found if each.model.get("role") == STUDENT}
    default = students if len(students) == 1 else set(rows) if len(rows) == 1 else {""}
    return Models(place, Path(path), rows, wanted or default.pop())


def chosen_models(a: Models, b: Models) -> tuple[str, str]:
    """The row of each folder to compare: the one named, else the only one with results that compare.

    Raises:
        ConfigError: several could be meant.
    """
    pairs = [
        (x, y)
        for x in ([a.wanted] if a.wanted else a.results)
        for y in ([b.wanted] if b.wanted else b.results)
        if (a.folder.resolve(), x) != (b.folder.resolve(), y) or (a.wanted and b.wanted)
    ]
    matching = [(x, y) for x, y in pairs if {r.column for r in a.of(x)} & {r.column for r in b.of(y)}]
    rows = (*a.results.values(), *b.results.values())
    if not any(result.inputs for row in rows for result in row):  # of models of one name the newest is meant
        matching.sort(key=lambda pair: (a.time(pair[0]), b.time(pair[1])))
        matching = list({(a.name(x), b.name(y)): (x, y) for x, y in matching}.values())
    if len(matching or pairs) == 1:
        return (matching or pairs)[0]
    several = a if not a.wanted else b
    names = list(several.results)
    raise ConfigError(
        f"{several.place} holds results of {', '.join(names)}: name one, {shlex.quote(f'{several.place}#{names[0]}')}"
    )


def pair_results(a: Sequence[Result], b: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Pairs of results to compare: the newest with equal protocol and data, else the newest of equal name."""
    newest = {result.column: result for result in b}
    pairs = {result.column: (result, newest[result.column]) for result in a if result.column in newest}
    names = {name for x, y in pairs.values() for name in (x.name, y.name)}
    others = {result.name: result for result in b if result.name not in names}
    rest = {result.name: (result, others[result.name]) for result in a if result.name in others}
    order = {name: index for index, name in reversed(list(enumerate(result.name for result in a)))}
    return sorted((*pairs.values(), *rest.values()), key=lambda pair: order[pair[0].name])


def compare(a: Result, b: Result, a_images: PerImage | None, b_images: PerImage | None, seed: int = 0) -> Compared:
    """Compare one eval of two models; the same seed gives the same intervals.

    Results with other settings or other data are not compared; ``why`` names the difference.
    """
    if a.column != b.column:
        chosen = "; ".join(differences(a.settings, b.settings)) if a.protocol != b.protocol else ""
        data = f"other data ({a.data_hash[:8]}, {b.data_hash[:8]})" if a.data_hash != b.data_hash else ""
        return Compared(a.name, why=" and ".join(filter(None, (chosen, data))) or "another version of the eval")
    metrics = {name: (a.metrics[name], b.metrics[name]) for name in a.metrics if name in b.metrics}
    lower = frozenset(a.lower_is_better)
    if a_images is None or b_images is None:
        return Compared(a.name, metrics, lower, notes=("no values per image are recorded",))
    intervals, changed, notes = [], {}, []
    for metric, first in a_images.images.items():
        second = b_images.images.get(metric, {})
        names = [name for name in first if name in second]
        unpaired = len(first) + len(second) - 2 * len(names)
        if unpaired:
            notes.append(f"{metric}: {unpaired} images have a value for one model only and are left out")
        if not names:
            continue
        x, y = (np.array([values[name] for name in names]) for values in (first, second))
        intervals.append(bootstrap(metric, x, y, seed))
        changed[metric] = _sorted((name, float(p), float(q)) for name, p, q in zip(names, x, y, strict=True))
    classes = {
        metric: _sorted(
            (kind, value, b_images.classes[metric][kind])
            for kind, value in values.items()
            if kind in b_images.classes.get(metric, {})
        )
        for metric, values in a_images.classes.items()
    }
    return Compared(a.name, metrics, lower, intervals, classes, changed, notes=tuple(notes))


def _sorted(rows: Iterable[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return sorted((row for row in rows if row[1] != row[2]), key=lambda row: (-abs(row[2] - row[1]), row[0]))


def bootstrap(metric: str, a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Paired bootstrap (Efron 1979): images are drawn with replacement, the same for both models.

    Args:
        metric: name of the result.
        a, b: ``(N,)`` values of the same images.
        seed: of the draws.
        draws: number of samples.

    Raises:
        ResultError: no images, or arrays of different length.
    """
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ResultError(f"{metric}: shapes {a.shape} and {b.shape} are not values of the same images")
    gap = b.astype(np.float64) - a.astype(np.float64)
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, block := max(1, _BLOCK // len(gap))):
        rows = random.integers(0, len(gap), (min(block, draws - start), len(gap)))
        means.append(gap[rows].mean(1))
    mean = np.concatenate(means)
    low, high = np.percentile(mean, (2.5, 97.5))
    better = float((mean > 0).mean() + 0.5 * (mean == 0).mean())
    return Interval(
        metric, len(gap), float(a.mean()), float(b.mean()), float(gap.mean()), float(low), float(high), better
    )
