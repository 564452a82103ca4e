"""Promptable segmentation by SAM's decoder on the model's features."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.decoders.sam import embeddings, grid_side, load, masks, on_grid, widths
from agglo.evals._features import need_spatial, read_batches, report_unusable
from agglo.evals._sam import features_for
from agglo.evals.base import SCENES_TEST, Backbone, Eval, EvalContext, Place, ProbeError, device_of, frozen, input_size
from agglo.preprocess import fit
from agglo.sources.base import AnnotationError
from agglo.types import ConfigError, Features, ImageError


class Promptable(Eval):
    """SAM's decoder on the model's features, prompted with the true box of each instance (arXiv:2312.06709, 5.2).

    The image is scaled to a longer side of ``size`` and padded at the right and the bottom to a square. Features of the
    width of SAM's blocks pass through SAM's neck, those of the width of its decoder are used directly; both are resized
    bilinearly to the decoder's grid. The decoder predicts one mask per box; its logits are resized to the image and
    thresholded at 0.

    Metrics, over all instances: ``miou``, the mean IoU of the predicted with the true mask, and ``iou@0.50``, the share
    of instances with an IoU of at least 0.5.

    Args:
        decoder: a SAM of transformers: ``facebook/sam-vit-huge`` on the hub, or a folder. Its encoder is not used.
        head: to read features from; None for the one head that fits the decoder, or for the output of a model without
            heads (a SAM teacher, for example).
        size: side of the square input; that of the decoder's own images when None.
        least: minimum number of pixels of an instance.
        source: images with ``annotation(index).instances`` ``(H, W)``, 0 for background; or with ``masks``
            ``(N, H, W)`` that may overlap and the ``box`` of each of its ``objects``.
    """

    needs_heads = True
    bundled = False
    revision = 2
    places: ClassVar[Mapping[str, Place]] = {"decoder": "weights"}

    def __init__(
        self,
        *,
        decoder: str = "",
        head: str | None = None,
        size: int | None = None,
        least: int = 1,
        source: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if not decoder:
            raise ConfigError(
                "evals.promptable: set decoder to a SAM checkpoint, a folder or a name on the hub such as "
                "facebook/sam-vit-huge"
            )
        if (size is not None and size < 1) or least < 1:
            raise ConfigError(f"evals.promptable: size and least must be at least 1, got {size} and {least}")
        self.decoder = os.path.expanduser(decoder)
        self.head = head
        self.size = size
        self.least = least
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        need_spatial(model, "promptable")
        source = context.sources.open(self.source)
        annotation: Callable[[int], Any] | None = getattr(source, "annotation", None)
        if annotation is None:
            raise ConfigError(f"{type(source).__name__} has no annotation(): use a source such as scenes")
        sam = load(self.decoder, "evals.promptable").to(device_of(model))
        inside = int(sam.config.prompt_encoder_config.image_size)
        view = input_size(model, self.size or inside)
        names: list[str] = []
        means: list[float] = []
        every: list[Tensor] = []
        unusable: list[ImageError] = []
        with frozen(model, sam):
            for index, batch, images in read_batches(source, [], context):
                for i, name, image in zip(index, batch, images, strict=True):
                    try:
                        truth = instances(annotation(i), image, name, self.least)
                    except ImageError as error:
                        unusable.append(error)
                        continue
                    if truth is None:
                        continue
                    out = model(padded(image, view, model)[None].to(device_of(model)))
                    found = masks(sam, self._features(out, sam, name), truth.boxes, (image.height, image.width))
                    iou = overlap(found.cpu(), truth.masks)
                    names.append(name)
                    means.append(float(iou.mean()))
                    every.append(iou)
        report_unusable(unusable, len(every))
        if not every:
            raise ProbeError(f"no image has an instance of {self.least} pixels or more: nothing to measure on")
        context.records.add_images("miou", names, means)
        iou = torch.cat(every)
        return {"miou": float(iou.mean()), "iou@0.50": float((iou >= 0.5).double().mean())}

    def _features(self, out: Features, sam: Any, name: str) -> Tensor:
        """Image embeddings of SAM's decoder, ``(1, D, h, w)`` on its grid."""
        features = features_for(out, self.head, set(widths(sam.config)), "promptable", name)
        return embeddings(on_grid(features, grid_side(sam.config)), sam.vision_encoder.neck, widths(sam.config)[1])


class Truth(NamedTuple):
    """Instances of an image: masks ``(N, H, W)`` bool, and boxes ``(N, 4)`` ``xyxy`` in its pixels."""

    masks: Tensor
    boxes: Tensor


def instances(annotation: Any, image: Image.Image, name: str, least: int) -> Truth | None:
    """Instances of an annotation with at least ``least`` pixels; None if there are none.

    Raises:
        ConfigError: no instance mask, or its size differs from the image's.
    """
    whole = getattr(annotation, "masks", None)
    if whole is not None:
        return _whole(np.asarray(whole), [each.box for each in annotation.objects], image, name, least)
    array = getattr(annotation, "instances", None)
    if array is None:
        raise ConfigError(f"{name} has no instances: use a source such as {{kind: scenes}}")
    array = np.asarray(array)
    if array.shape != (image.height, image.width):
        raise AnnotationError(name, f"is {image.height}x{image.width} pixels (HxW) and its instances {array.shape}")
    found, boxes = [], []
    for value in np.unique(array[array > 0]):
        mask = array == value
        if mask.sum() >= least:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found.append(torch.from_numpy(mask))
            boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return Truth(torch.stack(found), torch.tensor(np.array(boxes), dtype=torch.float32)) if found else None


def _whole(
    found: np.ndarray, boxes: Sequence[Sequence[float]], image: Image.Image, name: str, least: int
) -> Truth | None:
    """Instances from masks ``(N, H, W)`` that may overlap, each with its annotated box."""
    if found.shape[1:] != (image.height, image.width):
        raise AnnotationError(name, f"is {image.height}x{image.width} pixels (HxW) and its masks {found.shape[1:]}")
    keep = [i for i, mask in enumerate(found) if int(mask.sum()) >= least]
    if not keep:
        return None
    return Truth(torch.from_numpy(found[keep]), torch.tensor([boxes[i] for i in keep], dtype=torch.float32))


def padded(image: Image.Image, view: tuple[int, int], model: object) -> Tensor:
    """An image scaled and padded, in the upper left corner, to ``view`` ``(H, W)``: ``(3, H, W)`` in [0, 1]."""
    return fit(image, view, "pad", fill=getattr(model, "fill", (0.5, 0.5, 0.5)))


def overlap(found: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union ``(N,)`` float64 of masks ``(N, H, W)``."""
    both, either = ((op(found, truth)).flatten(1).sum(1).double() for op in (torch.logical_and, torch.logical_or))
    return both / either.clamp_min(1)
