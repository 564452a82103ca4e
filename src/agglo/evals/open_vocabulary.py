"""Semantic segmentation by class names, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from agglo.decoders.dense import Cells, cell_scores, image_cells
from agglo.evals._features import check, encode_texts, read_batches, report_unusable
from agglo.evals._pixels import IGNORE
from agglo.evals.base import (
    SCENES_TEST,
    Backbone,
    Eval,
    EvalContext,
    Inapplicable,
    ProbeError,
    device_of,
    frozen,
    input_size,
)
from agglo.evals.segmentation import confusion, iou_of, miou
from agglo.evals.zero_shot import class_bank
from agglo.model.model import Model
from agglo.preprocess import fit
from agglo.types import ConfigError, ImageError


class OpenVocabulary(Eval):
    """Open-vocabulary segmentation: each pixel gets the class whose name, as text, is most similar to its cell.

    A cell's vector is that of the text-aligned head applied to the cell (:func:`agglo.model.cells.text_cells`;
    MaskCLIP, arXiv:2112.01071, does so with CLIP); of a backbone that is not a :class:`agglo.Model`, its spatial
    features, which must have the texts' width. The measured scores are refined without training
    (:func:`agglo.decoders.dense.cell_scores`). Scores are upsampled bilinearly to the mask.

    Metrics, from one confusion matrix of all pixels: ``miou``, over the classes that occur in the ground truth or the
    predictions, and ``pixel_accuracy``; ``miou_plain``, of plain cosines; ``miou_chance``, the expected mIoU of classes
    drawn uniformly. All in [0, 1].

    Args:
        background: texts that stand for class 0, pixels of no class; with an empty list those pixels are not measured.
        templates: sentences with ``{}`` for the class name, whose embeddings are averaged.
        size: longer side of the input in pixels.
        slide: side of sliding windows in pixels; None for one pass. For a :class:`agglo.Model` only.
        outliers: see :func:`agglo.decoders.dense.without_outliers`.
        affinity: see :func:`agglo.decoders.dense.cell_scores`.
        centre: see :func:`agglo.decoders.dense.cell_scores`.
        head: the text-aligned head; None for the first. For a :class:`agglo.Model` only.
        source: images with ``classes`` and ``annotation(index).semantic``, 0 for no class and 255 for unlabelled:
            ``scenes``, ``camvid``, ``ade20k``, ``voc``, ``coco``.
    """

    needs_text = True

    def __init__(
        self,
        *,
        background: list[str] | tuple[str, ...] = ("background", "floor", "wall"),
        templates: list[str] | tuple[str, ...] = ("{}",),
        size: int = 448,
        slide: int | None = None,
        outliers: float | None = None,
        affinity: float | None = 0.1,
        centre: float = 0.5,
        head: str | None = None,
        source: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        where = "evals.open_vocabulary"
        wrong = next((template for template in templates if "{}" not in template), None)
        if not templates or wrong is not None:
            raise ConfigError(f"{where}: templates need {{}} for the class name; got {wrong or list(templates)!r}")
        if any(not text.strip() for text in background):
            raise ConfigError(f"{where}: background holds an empty text; use [] to leave such pixels out")
        for key, value in (("size", size), ("slide", slide), ("outliers", outliers), ("affinity", affinity)):
            if value is not None and not value > 0:
                raise ConfigError(f"{where}: {key} must be positive, got {value}")
        if slide is not None and slide > size:
            raise ConfigError(f"{where}: slide {slide} exceeds size {size}; use a smaller window, or null for one pass")
        if not 0 <= centre <= 1:
            raise ConfigError(f"{where}: centre must be in [0, 1], got {centre}")
        self.background = tuple(background)
        self.templates = tuple(templates)
        self.size = size
        self.slide = slide
        self.refined = {"outliers": outliers, "affinity": affinity, "centre": centre}
        self.head = head
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        source: Any = context.sources.open(self.source)
        classes = list(getattr(source, "classes", None) or ())
        if not classes or not hasattr(source, "annotation"):
            raise ConfigError(
                f"{type(source).__name__} has no classes or no masks: open_vocabulary needs a source such as scenes"
            )
        texts = [name.replace("_", " ").strip().lower() for name in (*classes, *self.background)]
        repeated = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
        if repeated is not None:  # the second could never win
            raise ConfigError(
                f"evals.open_vocabulary: {repeated!r} occurs twice among classes and texts; leave it out of background"
            )
        bank = self._bank(model, classes)
        names: list[str] = []
        refined: list[Tensor] = []
        plain: list[Tensor] = []
        unusable: list[ImageError] = []
        with frozen(model):
            for index, batch, images in read_batches(source, [], context):
                for i, name, image in zip(index, batch, images, strict=True):
                    try:
                        truth = self._truth(source.annotation(i))
                    except ImageError as error:
                        unusable.append(error)
                        continue
                    cells = self._cells(model, image, bank.shape[1])
                    check(cells.text, "text-aligned cells", [name], 4)
                    names.append(name)
                    for found, keys in ((refined, self.refined), (plain, {"affinity": None, "centre": 0.0})):
                        scores = cell_scores(cells, bank.to(cells.text), **keys).cpu()
                        labels = _labels(scores, tuple(truth.shape), len(classes))
                        found.append(confusion(truth, labels, len(classes) + 1, name))
        report_unusable(unusable, len(names))
        if not names:
            raise ProbeError("no image to measure on")
        return self._metrics(names, ["background", *classes], refined, plain, context)

    def _metrics(
        self, names: list[str], classes: list[str], refined: list[Tensor], plain: list[Tensor], context: EvalContext
    ) -> dict[str, float]:
        matrix = torch.stack(refined).sum(0)
        iou, occurs = iou_of(matrix)
        context.records.add_classes(
            "iou", [name for name, seen in zip(classes, occurs.tolist(), strict=True) if seen], iou[occurs]
        )
        seen = [i for i, one in enumerate(refined) if float(one.sum())]
        context.records.add_images("miou", [names[i] for i in seen], [miou(refined[i]) for i in seen])
        return {
            "miou": miou(matrix),
            "pixel_accuracy": float(matrix.trace() / matrix.sum()),
            "miou_plain": miou(torch.stack(plain).sum(0)),
            "miou_chance": chance(matrix),
        }

    def _bank(self, model: Backbone, classes: Sequence[str]) -> Tensor:
        """Text embeddings of the classes, then of the background."""
        if isinstance(model, Model) and self.head is not None:
            try:
                model.text_head(self.head)
            except TypeError as error:
                raise Inapplicable(f"open_vocabulary: {error}") from None
            texts = [t.replace("{}", n.replace("_", " ")) for n in (*classes, *self.background) for t in self.templates]
            found = model.encode_text(texts, self.head).float().unflatten(0, (-1, len(self.templates)))
            return F.normalize(found.mean(1), dim=1)
        encode_texts(model, ["thing"], "open_vocabulary")  # raises for a model without a text tower
        return class_bank(model, [*classes, *self.background], self.templates)

    def _truth(self, annotation: Any) -> Tensor:
        truth = torch.as_tensor(annotation.semantic).long()
        return truth if self.background else torch.where(truth == 0, IGNORE, truth)

    def _cells(self, model: Backbone, image: Image.Image, width: int) -> Cells:
        if isinstance(model, Model):
            try:
                return image_cells(model, image, size=self.size, head=self.head, slide=self.slide)
            except ConfigError as error:
                raise Inapplicable(f"open_vocabulary: {error}") from None
        scale = self.size / max(image.size)
        view = input_size(model, (max(1, round(image.height * scale)), max(1, round(image.width * scale))))
        spatial = model(fit(image, view, "stretch")[None].to(device_of(model))).spatial
        if spatial is None or spatial.shape[1] != width:
            found = "no spatial features" if spatial is None else f"{spatial.shape[1]} channels"
            raise Inapplicable(
                f"open_vocabulary needs a map of the texts' {width} channels; {type(model).__name__}: {found}"
            )
        return Cells(spatial.float(), spatial.float())


def chance(matrix: Tensor) -> float:
    """Expected mIoU of classes drawn uniformly per pixel, over the true classes of a confusion matrix ``(K, K)``.

    Of a class with share ``s`` of the pixels, drawn with probability ``d``: ``s d / (s + d - s d)``.
    """
    share = matrix.sum(1) / matrix.sum()
    share = share[share > 0]
    draw = 1 / len(share)
    return float((share * draw / (share + draw - share * draw)).mean())


def _labels(scores: Tensor, size: tuple[int, ...], classes: int) -> Tensor:
    """Class 1 to K of each pixel of a mask ``(H, W)``; 0 where a background text scores highest."""
    best = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[0].argmax(0)
    return torch.where(best < classes, best + 1, 0)
