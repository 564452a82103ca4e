"""What an eval knows beyond its few numbers: a value for each image and for each class, for whoever asks.

``with recording() as records: eval.run(model)`` collects them; without it nothing is kept. Comparing two models image
by image, bootstrap intervals and lists of failures are made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Records:
    """What was recorded.

    Args:
        images: metric → image (or ``first → second`` for a pair of images) → value. The mean over the images is the
            eval's metric of that name where the metric is a mean (``top1``); a ratio of sums (``miou``) is not.
        classes: metric → class → value, of the classes that occur.
    """

    images: dict[str, dict[str, float]] = field(default_factory=dict)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)


_records: ContextVar[Records | None] = ContextVar("agglo_evals_records", default=None)


@contextmanager
def recording() -> Iterator[Records]:
    """Collect what the evals that run inside this block record."""
    records = Records()
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def record_images(metric: str, names: Sequence[str], values: Tensor | Sequence[float]) -> None:
    """Keep one value for each image; does nothing where nobody records."""
    _keep(metric, names, values, "images")


def record_classes(metric: str, names: Sequence[str], values: Tensor | Sequence[float]) -> None:
    """Keep one value for each class; does nothing where nobody records."""
    _keep(metric, names, values, "classes")


def record_by_class(metric: str, names: Sequence[str], labels: Sequence[str], values: Tensor) -> None:
    """Keep a value for each image, and its mean over the images of each class."""
    if _records.get() is None:
        return
    record_images(metric, names, values)
    numbers = values.double().tolist()
    groups: dict[str, list[float]] = {}
    for label, value in zip(labels, numbers, strict=True):
        groups.setdefault(label, []).append(value)
    kinds = sorted(groups)
    record_classes(metric, kinds, [sum(groups[kind]) / len(groups[kind]) for kind in kinds])


def _keep(metric: str, names: Sequence[str], values: Tensor | Sequence[float], where: str) -> None:
    records = _records.get()
    if records is not None:
        numbers = values.double().tolist() if isinstance(values, Tensor) else [float(value) for value in values]
        getattr(records, where).setdefault(metric, {}).update(zip(names, numbers, strict=True))
