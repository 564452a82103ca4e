"""Classification-gated F1 of SA-Co: scores of the masks predicted for all instances of a phrase."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agglo.decoders.sam3 import LEAST_SCORE
from agglo.extras import require
from agglo.sources.coco import mask_of
from agglo.types import ConfigError

THRESHOLDS = np.arange(50, 100, 5) / 100
"""IoU thresholds of a match: 0.50, 0.55, ..., 0.95."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and a phrase.

    Attributes:
        id: of the pair; ``image_id`` of predictions.
        file: of the image.
        phrase: the concept to segment.
        size: ``(H, W)`` of the image in pixels.
        exhaustive: whether every annotator marked every instance; only such pairs are scored.
        truths: per annotator, the segmentations of the instances as in the file.
    """

    id: int
    file: str
    phrase: str
    size: tuple[int, int]
    exhaustive: bool
    truths: tuple[tuple[Any, ...], ...]

    def masks(self, segmentations: Sequence[Any]) -> list[np.ndarray]:
        """``(H, W)`` bool of each segmentation."""
        return [decoded(each, self.size, f"pair {self.id} ({self.file})") for each in segmentations]


@dataclass(frozen=True, slots=True)
class Count:
    """Match counts of one pair.

    Attributes:
        hits: ``(10,)`` matched instances at each of :data:`THRESHOLDS`.
        found: number of predicted instances.
        true: number of annotated instances.
    """

    hits: np.ndarray
    found: int
    true: int

    @property
    def local(self) -> float:
        """F1 of this pair, the mean over the thresholds; 1 if nothing is annotated and nothing predicted."""
        both = self.found + self.true
        return float((2 * self.hits / both).mean()) if both else 1.0


# --- the score --------------------------------------------------------------------------------------------------------


def overlaps(found: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> np.ndarray:
    """Intersection over union ``(len(found), len(true))`` float64; 0 for two empty masks."""
    areas = [[np.count_nonzero(mask) for mask in masks] for masks in (found, true)]
    boxes = [[_box(mask) for mask in masks] for masks in (found, true)]
    both = np.zeros((len(found), len(true)))
    for i, (a, (y0, x0, y1, x1)) in enumerate(zip(found, boxes[0], strict=True)):
        for j, (b, (v0, u0, v1, u1)) in enumerate(zip(true, boxes[1], strict=True)):
            top, left, bottom, right = max(y0, v0), max(x0, u0), min(y1, v1), min(x1, u1)
            if top < bottom and left < right:  # most instances do not touch and are small
                part = np.s_[top:bottom, left:right]
                both[i, j] = np.count_nonzero(a[part] & b[part])
    either = np.add.outer(*(np.array(each, np.float64) for each in areas)) - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """``(top, left, bottom, right)`` of a mask, ends exclusive; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1) if len(rows) else (0, 0, 0, 0)


def count(found: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> Count:
    """Match predicted to annotated masks ``(H, W)`` bool one to one, maximising the sum of their IoU."""
    hits = np.zeros(len(THRESHOLDS), np.int64)
    if found and true:
        iou = overlaps(found, true)
        matched = iou[require("scipy.optimize", "eval").linear_sum_assignment(iou, maximize=True)]
        hits = (matched[:, None] >= THRESHOLDS).sum(0)
    return Count(hits, len(found), len(true))


def favourable(found: Sequence[np.ndarray], truths: Sequence[Sequence[np.ndarray]]) -> Count:
    """Counts against the annotator with the highest :attr:`Count.local`; ties: the first."""
    return max((count(found, true) for true in truths), key=lambda each: each.local)


def measures(counts: Sequence[Count]) -> dict[str, float]:
    """``cgf1``, ``pmf1`` and ``il_mcc`` of all pairs.

    - ``pmf1``, in [0, 1]: F1 over the instances of all pairs that have any; the mean over the thresholds.
    - ``il_mcc``, in [-1, 1]: Matthews correlation, over pairs, of "an instance is predicted" and "an instance is
      annotated"; 0 where it is undefined because one of the two is constant.
    - ``cgf1``: their product.
    """
    positive = [each for each in counts if each.true]
    hits = sum((each.hits for each in positive), np.zeros(len(THRESHOLDS), np.int64))
    every = sum(each.found + each.true for each in positive)
    pmf1 = float((2 * hits / every).mean()) if every else 0.0
    tp = sum(each.found > 0 for each in positive)
    fn = len(positive) - tp
    fp = sum(each.found > 0 for each in counts) - tp
    tn = len(counts) - tp - fn - fp
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    mcc = (tp * tn - fp * fn) / below if below else 0.0
    return {"cgf1": pmf1 * mcc, "pmf1": pmf1, "il_mcc": mcc}


# --- masks ------------------------------------------------------------------------------------------------------------


def decoded(segmentation: Any, size: tuple[int, int], name: str) -> np.ndarray:
    """Decode polygons, run lengths or COCO's compressed run lengths to ``(H, W)`` bool.

    Raises:
        ConfigError: none of these, or the size differs from the image's.
    """
    try:
        if isinstance(segmentation, Mapping) and isinstance(segmentation["counts"], str):
            segmentation = {**segmentation, "counts": runs(segmentation["counts"])}
        return mask_of(segmentation, size, name)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{name}: {str(segmentation)[:60]!r} is not a mask ({error!r}): expected polygons [[x, y, ...]] "
            'or run lengths {"size": [H, W], "counts": ...}'
        ) from error


def runs(text: str) -> list[int]:
    """Decode COCO's compressed run lengths.

    Each number is written in groups of five bits from the lowest, one character (from "0") per group; the sixth bit is
    set if another group follows, and the fifth of the last one is the sign. From the fourth on, numbers are differences
    to the one two before.
    """
    found: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is not a character of run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            found.append(value + found[-2] if len(found) > 2 else value)
            value = shift = 0
    if shift or min(found, default=0) < 0:
        raise ValueError("the run lengths are truncated or damaged")
    return found


# --- files ------------------------------------------------------------------------------------------------------------

_PHRASES = ("text_input", "phrase")


def read_pairs(paths: Sequence[str | Path]) -> list[Pair]:
    """Pairs of the first annotator's file, in its order, with the instances of all annotators.

    Each file is an object with ``images``, of which each is a *pair*: ``id``, ``file_name``, ``text_input`` (or
    ``phrase``), ``height``, ``width``, ``is_instance_exhaustive``; and with ``annotations``: ``image_id`` (of a pair)
    and ``segmentation``.

    Raises:
        ConfigError: a missing key, or files of different pairs.
    """
    files = [_annotations(Path(path)) for path in paths]
    first = files[0][0]
    for path, (pairs, _) in zip(paths[1:], files[1:], strict=True):
        lacking = [name for name in first if name not in pairs]
        if lacking:
            raise ConfigError(
                f"{path} lacks {len(lacking)} of the pairs of {paths[0]}, such as {lacking[0]}: use the files of all "
                "annotators of one subset"
            )
        other = next((name for name, own in first.items() if _facts(own) != _facts(pairs[name])), None)
        if other is not None:
            raise ConfigError(
                f"pair {other} is {_facts(first[other])} in {paths[0]} and {_facts(pairs[other])} in {path}: use the "
                "files of all annotators of one subset"
            )
    return [
        Pair(
            name, str(own["file_name"]), _phrase(own), (int(own["height"]), int(own["width"])),
            all(bool(pairs[name]["is_instance_exhaustive"]) for pairs, _ in files),
            tuple(tuple(marked.get(name, ())) for _, marked in files),
        )
        for name, own in first.items()
    ]  # fmt: skip


def read_predictions(path: str | Path, pairs: Sequence[Pair]) -> dict[int, list[Any]]:
    """Segmentations by pair from COCO results ``[{"image_id", "segmentation", "score"}, ...]``.

    Those with a score below :data:`LEAST_SCORE` are dropped.

    Raises:
        ConfigError: another file format, or predictions for pairs that are not annotated.
    """
    entries, found = _json(Path(path)), {pair.id: [] for pair in pairs}
    if not isinstance(entries, list):
        raise ConfigError(f"{path} is not a list of COCO results, {{image_id, segmentation, score}} each")
    for index, entry in enumerate(entries):
        _need(entry, ("image_id", "segmentation", "score"), f"{path}: result {index}")
        if entry["image_id"] not in found:
            raise ConfigError(
                f"{path}: result {index} is of pair {entry['image_id']}, which is not annotated: image_id is the id of "
                "a pair of image and phrase; use the annotations of the same subset"
            )
        if not isinstance(entry["score"], int | float) or not math.isfinite(entry["score"]):
            raise ConfigError(f"{path}: result {index} has score {entry['score']!r}; expected a number")
        if entry["score"] >= LEAST_SCORE:
            found[entry["image_id"]].append(entry["segmentation"])
    return found


def _annotations(path: Path) -> tuple[dict[int, Any], dict[int, list[Any]]]:
    """Pairs by id, and the instances of each."""
    whole = _json(path)
    _need(whole, ("images", "annotations"), str(path))
    pairs: dict[int, Any] = {}
    for index, each in enumerate(whole["images"]):
        _need(each, ("id", "file_name", "height", "width", "is_instance_exhaustive"), f"{path}: images[{index}]")
        if not any(key in each for key in _PHRASES):
            raise ConfigError(f"{path}: images[{index}] lacks {' or '.join(_PHRASES)}, the phrase")
        if each["id"] in pairs:
            raise ConfigError(f"{path}: images[{index}] repeats pair id {each['id']}: the file is damaged")
        pairs[each["id"]] = each
    if not pairs:
        raise ConfigError(f"{path} contains no pair of image and phrase")
    marked: dict[int, list[Any]] = {}
    for index, each in enumerate(whole["annotations"]):
        _need(each, ("image_id", "segmentation"), f"{path}: annotations[{index}]")
        if each["image_id"] not in pairs:
            raise ConfigError(f"{path}: annotations[{index}] is of pair {each['image_id']}, which is not in images")
        marked.setdefault(each["image_id"], []).append(each["segmentation"])
    return pairs, marked


def _phrase(pair: Mapping[str, Any]) -> str:
    return str(next(pair[key] for key in _PHRASES if key in pair))


def _facts(pair: Mapping[str, Any]) -> str:
    return f"{_phrase(pair)!r} on {pair['file_name']} of {pair['height']}x{pair['width']} pixels"


def _need(entry: Any, keys: Sequence[str], where: str) -> None:
    lacking = [key for key in keys if not isinstance(entry, Mapping) or key not in entry]
    if lacking:
        raise ConfigError(f"{where} lacks {', '.join(lacking)}; required are {', '.join(keys)}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): use an existing JSON file") from error
