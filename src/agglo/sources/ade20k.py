"""ADE20K for scene parsing: 150 classes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from agglo.files import printable
from agglo.sources._dataset import IGNORE, Layout, MaskedFiles, list_files, read_text

LAYOUT = Layout(
    "ade20k",
    "sceneparsing.csail.mit.edu (ADEChallengeData2016.zip, 1 GB)",
    "images/training/*.jpg, images/validation/*.jpg, annotations/training/*.png, annotations/validation/*.png, "
    "objectInfo150.txt",
    ("ADEChallengeData2016", "ade/ADEChallengeData2016"),
    ("annotations", "images"),
)
FOLDERS = {"train": "training", "val": "validation"}


class Ade20k(MaskedFiles):
    """ADE20K with 150 classes (Zhou et al. 2017): 20 210 training and 2000 validation images.

    ``annotation(index).semantic`` holds class index + 1, 255 where nothing is annotated; background does not occur.
    Licence: images for non-commercial research and education only.

    Args:
        path: the unpacked archive, or its parent folder.
        split: ``train`` or ``val``.

    Raises:
        ConfigError: it is absent, or images have no mask (counted).
    """

    def __init__(self, *, path: str, split: str = "val") -> None:
        root = LAYOUT.root(path)
        part = FOLDERS[LAYOUT.check_split(split, tuple(FOLDERS))]
        names = list_files(root / "images" / part, ".jpg")
        masks = list_files(root / "annotations" / part, ".png")
        if not names and not masks:
            raise LAYOUT.no_images(root / "images" / part)
        files = [f"images/{part}/{name}" for name in names]
        super().__init__("ade20k", root, files, [root / "annotations" / part / f"{Path(n).stem}.png" for n in names])
        LAYOUT.require_files(self._masks, "masks")
        LAYOUT.require_files([root / "images" / part / f"{Path(name).stem}.jpg" for name in masks], "images")
        self.classes = _names(root / "objectInfo150.txt")

    def annotation(self, index: int) -> SimpleNamespace:
        """``semantic``, ``(H, W)`` uint8."""
        mask = self.class_map(index, len(self.classes))
        return SimpleNamespace(semantic=np.where(mask == 0, IGNORE, mask).astype(np.uint8))


def _names(path: Path) -> tuple[str, ...]:
    """First name of each class; numbers if the list is absent."""
    if path.is_file():
        lines = [re.split(r"\t+", line.strip()) for line in printable(read_text(path)).splitlines()]
        rows = [(int(line[0]), line[-1].split(",")[0].strip()) for line in lines if line and line[0].isdigit()]
        if len(rows) == 150:
            return tuple(name for _, name in sorted(rows))
    return tuple(f"class {number}" for number in range(1, 151))
