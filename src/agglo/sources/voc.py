"""Pascal VOC 2012 for segmentation: 20 classes and background."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from agglo.sources._dataset import Files, Layout, read_mask
from agglo.types import ConfigError

LAYOUT = Layout(
    "voc",
    "host.robots.ox.ac.uk/pascal/VOC/voc2012 (VOCtrainval_11-May-2012.tar, 2 GB)",
    "VOCdevkit/VOC2012 with JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/{train,val}.txt",
    ("VOCdevkit/VOC2012", "VOC2012"),
    ("ImageSets/Segmentation", "SegmentationClass"),
)
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


class Voc(Files):
    """Pascal VOC 2012 with its segmentation masks (Everingham et al. 2012); background is 0, borders have no class.

    Args:
        path: the folder ``VOC2012``, or one around it.
        split: ``train`` (1464 images), ``val`` (1449), ``trainval``, or ``train_aug``: the list of 10 582 images in
            ``ImageSets/Segmentation/train_aug.txt`` with masks in ``SegmentationClassAug``, where they were added.

    Raises:
        ConfigError: it is not there, or images or masks are missing: they are counted.
    """

    def __init__(self, *, path: str, split: str = "val") -> None:
        root = LAYOUT.root(path)
        LAYOUT.split(split, ("train", "val", "trainval", "train_aug"))
        file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not file.is_file():
            raise ConfigError(f"source voc: {file} is missing; it must look like this: {LAYOUT.looks}")
        names = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        names = [Path(name).stem for name in names]
        if not names:
            raise LAYOUT.nothing(file)
        masks = "SegmentationClassAug" if split == "train_aug" else "SegmentationClass"
        super().__init__("voc", root, [f"JPEGImages/{name}.jpg" for name in names])
        self._masks = [root / masks / f"{name}.png" for name in names]
        LAYOUT.whole((self.file(i) for i in range(len(self))), "images")
        LAYOUT.whole(self._masks, "masks")
        self.classes = CLASSES

    def annotation_files(self, index: int) -> tuple[Path, ...]:
        """Where the mask lies."""
        return (self._masks[index],)

    def annotation(self, index: int) -> SimpleNamespace:
        """``semantic``, ``(H, W)`` uint8: 0 background, class index + 1, 255 along borders."""
        return SimpleNamespace(semantic=read_mask(self._masks[index]).astype(np.uint8))
