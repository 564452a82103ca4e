"""What is asked of a segmentation model: texts, boxes, points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agglo.types import ConfigError

Box = Sequence[float]
Point = Sequence[float]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Checked prompts.

    Attributes:
        texts: concepts; each is segmented by itself.
        boxes: ``(x0, y0, x1, y1, label)`` in pixels of the image; label 1 for an example of what to segment, 0 for an
            example of what not to.
        points: ``(x, y, label)`` in pixels, of one object; label 1 inside it, 0 outside.
    """

    texts: tuple[str, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    points: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(
        cls, text: str | Sequence[str] | None = None, boxes: Sequence[Box] = (), points: Sequence[Point] = ()
    ) -> Prompts:
        """Check prompts.

        Raises:
            ConfigError: no prompt, a wrong type, an empty text or box, a label other than 0 and 1, or a combination
                that SAM 3 does not take.
        """
        texts = (text,) if isinstance(text, str) else tuple(text or ())
        for each in texts:
            if not isinstance(each, str):
                raise ConfigError(f"text: {each!r} is a {type(each).__name__}; give strings")
            if not each.strip():
                raise ConfigError("text: a text is empty; write the concept to segment, such as 'shoe'")
        found = cls(
            tuple(each.strip() for each in texts),
            tuple(_numbers("boxes", box, 4, "x0,y0,x1,y1") for box in _rows("boxes", boxes)),
            tuple(_numbers("points", point, 2, "x,y") for point in _rows("points", points)),
        )
        for x0, y0, x1, y1, _ in found.boxes:
            if x1 <= x0 or y1 <= y0:
                raise ConfigError(
                    f"boxes: {x0:g},{y0:g},{x1:g},{y1:g} is empty; give x0,y0,x1,y1 with x0 < x1 and y0 < y1, in pixels"
                )
        if not (found.texts or found.boxes or found.points):
            raise ConfigError("nothing to segment: give a text, boxes or points")
        if found.points and (found.texts or found.boxes):
            raise ConfigError("points select one object and do not combine with texts or boxes: give them alone")
        if found.boxes and len(found.texts) > 1:
            raise ConfigError(f"boxes are examples of one concept: give one text with them, not {len(found.texts)}")
        if found.points and not any(label for *_, label in found.points):
            raise ConfigError("points: all have label 0 (outside); give at least one with label 1")
        return found

    def check_inside(self, size: tuple[int, int], name: str) -> None:
        """Check that boxes and points lie in an image.

        Args:
            size: ``(H, W)`` of the image in pixels.
            name: of the image.

        Raises:
            ConfigError: a box or a point lies outside.
        """
        height, width = size
        for x0, y0, x1, y1, _ in self.boxes:
            if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
                raise ConfigError(
                    f"box {x0:g},{y0:g},{x1:g},{y1:g} is not inside {name}, {width} pixels wide and {height} high"
                )
        for x, y, _ in self.points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise ConfigError(f"point {x:g},{y:g} is not inside {name}, {width} pixels wide and {height} high")


def _rows(what: str, rows: Any) -> Sequence[Any]:
    if hasattr(rows, "tolist"):
        rows = rows.tolist()
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise ConfigError(f"{what}: {rows!r} is a {type(rows).__name__}; give a list with one entry per prompt")
    return rows


def _numbers(what: str, row: Any, count: int, form: str) -> tuple[float, ...]:
    """``count`` coordinates and a label, 1 if it is left out."""
    if isinstance(row, str) or not isinstance(row, Sequence) or len(row) not in (count, count + 1):
        raise ConfigError(f"{what}: {row!r} is not {form} in pixels, with an optional label 1 or 0 at the end")
    if not all(isinstance(each, int | float) and math.isfinite(each) for each in row):
        raise ConfigError(f"{what}: {list(row)!r} has an entry that is not a finite number")
    label = row[count] if len(row) > count else 1
    if label not in (0, 1):
        raise ConfigError(f"{what}: label {label!r} of {list(row)!r} is neither 1 (inside) nor 0 (outside)")
    return (*(float(each) for each in row[:count]), float(label))


def parse(text: str, what: str) -> tuple[float, ...]:
    """Numbers of one option, such as ``"12,30,1"``.

    Raises:
        ConfigError: not numbers separated by commas.
    """
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise ConfigError(f"--{what} {text!r}: give numbers separated by commas, such as 12,30,1") from None
