"""The images with the worst values of a metric, as thumbnails if they can be read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from agglo.config import build
from agglo.report.visuals import THUMB, square
from agglo.results.records import Result, read_images
from agglo.results.tables import labels
from agglo.sources.base import Source
from agglo.types import AggloError


@dataclass(frozen=True, slots=True)
class Failure:
    """One image with a bad value: its class if known, the value of each model, and a thumbnail if it can be read."""

    name: str
    label: str
    values: Mapping[str, float]
    thumb: Image.Image | None


@dataclass(frozen=True, slots=True)
class Failures:
    """The worst images of one metric of one eval, the worst first, of ``count`` images."""

    name: str
    metric: str
    worst: Sequence[Failure]
    count: int


def failures(found: Sequence[tuple[Path, Result]], most: int = 6) -> list[Failures]:
    """The worst images of each metric recorded per image, over all models with the same settings and data.

    Args:
        found: results with their folders.
        most: number of images per metric.
    """
    called = labels([result for _, result in found])
    values: dict[tuple[str, str, str, str], dict[str, dict[str, float]]] = {}
    example: dict[tuple[str, str, str, str], Result] = {}
    for folder, result in found:
        try:
            images = read_images(folder, result)
        except AggloError:  # damaged: leave the metric out
            continue
        for metric, by_image in (images.images if images else {}).items():
            key = (result.name, metric, *result.column)
            example[key] = result
            for image, value in by_image.items():
                values.setdefault(key, {}).setdefault(image, {})[called[result.id]] = value
    return [_worst(key, by_image, example[key], most) for key, by_image in values.items()]


def _worst(
    key: tuple[str, str, str, str], by_image: Mapping[str, Mapping[str, float]], result: Result, most: int
) -> Failures:
    name, metric = key[:2]
    lower = metric in result.lower_is_better

    def order(image: str) -> tuple[float, str]:
        mean = sum(by_image[image].values()) / len(by_image[image])
        # Ties are broken by hash, so that not only the first images of the folder are shown.
        return (-mean if lower else mean), hashlib.sha256(image.encode()).hexdigest()

    chosen = sorted(by_image, key=order)[:most]
    source = _opened(result)
    index = {} if source is None else _where(source, {image.partition(" -> ")[0] for image in chosen})
    shown = []
    for image in chosen:
        at = index.get(image.partition(" -> ")[0])
        thumb, label = (None, "") if source is None or at is None else (_thumb(source, at), _label(source, at))
        shown.append(Failure(image, label, by_image[image], thumb))
    return Failures(name, metric, shown, len(by_image))


def _opened(result: Result) -> Source | None:
    facts = result.data.get("test") or result.data.get("source") or next(iter(result.data.values()), None)
    if facts is None:
        return None
    try:
        source = build("sources", dict(facts["source"]))
        return source if len(source) == facts["images"] else None
    except (AggloError, OSError, KeyError):  # measured on another machine: show names only
        return None


def _where(source: Source, names: set[str]) -> dict[str, int]:
    return {name: index for index in range(len(source)) if (name := source.name(index)) in names}


def _thumb(source: Source, index: int) -> Image.Image | None:
    try:
        return square(source.read(index), THUMB)
    except (AggloError, OSError):
        return None


def _label(source: Source, index: int) -> str:
    label: Callable[[int], Any] | None = getattr(source, "label", None)
    found = None if label is None else label(index)
    classes = getattr(source, "classes", ())
    if isinstance(found, int) and 0 <= found < len(classes):
        return str(classes[found])
    return "" if found is None else str(found)
