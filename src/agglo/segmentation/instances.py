"""Instance masks of one image, and the files they are written to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from agglo.files import replacing

_COLOURS = (
    (230, 60, 60), (60, 130, 240), (60, 180, 75), (250, 190, 40), (160, 80, 220), (40, 200, 200), (240, 120, 190),
    (150, 110, 60),
)  # fmt: skip
_OPACITY = 0.5


@dataclass(frozen=True, slots=True)
class Instances:
    """Instances in one image, by falling score within each prompt.

    Attributes:
        name: of the image.
        size: ``(H, W)`` in pixels.
        masks: ``(N, H, W)`` bool.
        scores: ``(N,)`` float32 in [0, 1].
        boxes: ``(N, 4)`` float32 ``xyxy`` in pixels: of the mask.
        labels: the text of each instance's prompt; ``box`` or ``points`` without one.
        tracks: of a frame of a video: the number of each object, the same in all frames.
    """

    name: str
    size: tuple[int, int]
    masks: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    labels: tuple[str, ...]
    tracks: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def titles(self) -> tuple[str, ...]:
        """The labels, with the numbers of tracked objects: ``shoe 0``, ``shoe 1``."""
        if self.tracks is None:
            return self.labels
        return tuple(f"{label} {track}" for label, track in zip(self.labels, self.tracks, strict=True))

    def coco(self, image_id: int, categories: dict[str, int]) -> list[dict[str, Any]]:
        """COCO results: run lengths, ``bbox`` as ``[x, y, width, height]``, ``score``; ``track_id`` in a video.

        Args:
            image_id: of the image.
            categories: label → ``category_id``; new labels are added.
        """
        rows = []
        for index, (mask, score, label) in enumerate(zip(self.masks, self.scores, self.labels, strict=True)):
            x0, y0, x1, y1 = self.boxes[index]
            track = {} if self.tracks is None else {"track_id": self.tracks[index]}
            rows.append(
                {
                    "image_id": image_id,
                    "file_name": self.name,
                    "category_id": categories.setdefault(label, len(categories) + 1),
                    "category": label,
                    "score": round(float(score), 6),
                    "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                    "segmentation": {"size": list(self.size), "counts": run_lengths(mask)},
                    **track,
                }
            )
        return rows

    def write_masks(self, folder: Path) -> list[Path]:
        """Write each mask as an 8-bit PNG, 255 inside, named by number, label and score."""
        written = []
        for index, (mask, score, label) in enumerate(zip(self.masks, self.scores, self.titles, strict=True)):
            path = folder / f"{index:03d}-{_word(label)}-{score:.2f}.png"
            with replacing(path) as partial:
                Image.fromarray(mask.astype(np.uint8) * 255).save(partial, format="PNG")
            written.append(path)
        return written

    def overlay(self, image: Image.Image) -> Image.Image:
        """The image under its masks: one colour per label, or per tracked object, an outline, label and score."""
        canvas = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
        colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(dict.fromkeys(self.titles))}
        for mask, label in zip(self.masks, self.titles, strict=True):
            colour = np.array(colours[label], np.float32)
            canvas[mask] = canvas[mask] * (1 - _OPACITY) + colour * _OPACITY
        for mask, label in zip(self.masks, self.titles, strict=True):
            canvas[_outline(mask)] = colours[label]
        picture = Image.fromarray(canvas.round().astype(np.uint8))
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(11, min(self.size) // 32))
        for (x0, y0, _, _), score, label in zip(self.boxes, self.scores, self.titles, strict=True):
            text = f"{label} {score:.2f}"
            left, top, right, bottom = draw.textbbox((x0 + 2, y0 + 1), text, font=font)
            draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colours[label])
            draw.text((x0 + 2, y0 + 1), text, fill=(255, 255, 255), font=font)
        return picture


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Bounding boxes ``(N, 4)`` float32 ``xyxy`` of masks ``(N, H, W)``, ends exclusive; zeros for an empty mask."""
    found = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(found, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return found


def run_lengths(mask: np.ndarray) -> str:
    """A mask ``(H, W)`` in COCO's compressed run lengths: column-major, each run less the one two before it.

    A run is written in groups of five bits, lowest first; bit 6 of a character states that another group follows.
    """
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    counts = [0, *runs.tolist()] if flat.size and flat[0] else runs.tolist()
    text = []
    for index, count in enumerate(counts):
        rest = count - counts[index - 2] if index > 2 else count
        while True:
            group, rest = rest & 31, rest >> 5
            last = (rest == 0 and not group & 16) or (rest == -1 and bool(group & 16))
            text.append(chr(48 + group + (0 if last else 32)))
            if last:
                break
    return "".join(text)


def _outline(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask with a neighbour outside it."""
    inside = np.pad(mask, 1)
    core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return mask & ~core


def _word(label: str) -> str:
    return re.sub(r"[^\w]+", "_", label).strip("_")[:40] or "object"
