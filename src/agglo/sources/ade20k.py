"""ADE20K for scene parsing: 150 classes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from agglo.sources._dataset import NONE, Files, Layout, listed, read_mask

LAYOUT = Layout(
    "ade20k",
    "sceneparsing.csail.mit.edu (ADEChallengeData2016.zip, 1 GB)",
    "images/training/*.jpg, images/validation/*.jpg, annotations/training/*.png, annotations/validation/*.png, "
    "objectInfo150.txt",
    ("ADEChallengeData2016", "ade/ADEChallengeData2016"),
    ("annotations", "images"),
)
FOLDERS = {"train": "training", "val": "validation"}


class Ade20k(Files):
    """ADE20K with 150 classes (Zhou et al. 2017): 20 210 images to train on, 2000 to measure.

    ``annotation(index).semantic`` holds class index + 1, 255 where nothing is annotated. No pixel is background.

    Args:
        path: the folder that the archive unpacks to, or the one around it.
        split: ``train`` or ``val``.

    Raises:
        ConfigError: it is not there, or images have no mask: they are counted.
    """

    def __init__(self, *, path: str, split: str = "val") -> None:
        root = LAYOUT.root(path)
        part = FOLDERS[LAYOUT.split(split, tuple(FOLDERS))]
        names = listed(root / "images" / part, ".jpg")
        masks = listed(root / "annotations" / part, ".png")
        if not names and not masks:
            raise LAYOUT.nothing(root / "images" / part)
        super().__init__("ade20k", root, [f"images/{part}/{name}" for name in names])
        self._masks = [root / "annotations" / part / f"{Path(name).stem}.png" for name in names]
        LAYOUT.whole(self._masks, "masks")
        LAYOUT.whole([root / "images" / part / f"{Path(name).stem}.jpg" for name in masks], "images")
        self.classes = _names(root / "objectInfo150.txt")

    def annotation_files(self, index: int) -> tuple[Path, ...]:
        """Where the mask lies."""
        return (self._masks[index],)

    def annotation(self, index: int) -> SimpleNamespace:
        """``semantic``, ``(H, W)`` uint8."""
        mask = read_mask(self._masks[index])
        return SimpleNamespace(semantic=np.where(mask == 0, NONE, mask).astype(np.uint8))


def _names(path: Path) -> tuple[str, ...]:
    """The first word or words of each class; numbers where the list is not there."""
    if path.is_file():
        lines = [re.split(r"\t+", line.strip()) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [(int(line[0]), line[-1].split(",")[0].strip()) for line in lines if line and line[0].isdigit()]
        if len(rows) == 150:
            return tuple(name for _, name in sorted(rows))
    return tuple(f"class {number}" for number in range(1, 151))
