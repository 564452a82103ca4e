"""Pascal VOC 2012 for segmentation: 20 classes and a background."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from agglo.sources._dataset import Layout, MaskedFiles, read_text
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


class Voc(MaskedFiles):
    """Pascal VOC 2012 with its segmentation masks (Everingham et al. 2012); background is 0, object borders are 255.

    Licence: images under Flickr terms.

    Args:
        path: the folder ``VOC2012``, or a parent folder.
        split: ``train`` (1464 images), ``val`` (1449), ``trainval``, or ``train_aug``: the list of 10 582 images in
            ``ImageSets/Segmentation/train_aug.txt`` with masks in ``SegmentationClassAug``, if added.

    Raises:
        ConfigError: it is absent, or images or masks are missing (counted).
    """

    def __init__(self, *, path: str, split: str = "val") -> None:
        root = LAYOUT.root(path)
        LAYOUT.check_split(split, ("train", "val", "trainval", "train_aug"))
        file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not file.is_file():
            raise ConfigError(f"source voc: {file} is missing; expected: {LAYOUT.structure}")
        names = [line.split()[0] for line in read_text(file).splitlines() if line.strip()]
        names = [Path(name).stem if name.lower().endswith((".jpg", ".png")) else Path(name).name for name in names]
        if not names:
            raise LAYOUT.no_images(file)
        masks = "SegmentationClassAug" if split == "train_aug" else "SegmentationClass"
        files = [f"JPEGImages/{name}.jpg" for name in names]
        super().__init__("voc", root, files, [root / masks / f"{name}.png" for name in names])
        LAYOUT.require_files((self.file(i) for i in range(len(self))), "images")
        LAYOUT.require_files(self._masks, "masks")
        self.classes = CLASSES

    def annotation(self, index: int) -> SimpleNamespace:
        """``semantic``, ``(H, W)`` uint8: 0 background, class index + 1, 255 along borders."""
        return SimpleNamespace(semantic=self.class_map(index, len(CLASSES)))
