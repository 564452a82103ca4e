"""Semantic segmentation by a linear probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import need_spatial
from agglo.evals._pixels import IGNORE, PixelTraining, Probe, Split, check_mask, check_masks, fit_pixels
from agglo.evals._probe import Standard, best_logistic, load, rows
from agglo.evals._windows import Windows
from agglo.evals.base import (
    SCENES_TEST,
    SCENES_TRAIN,
    SCENES_VAL,
    Backbone,
    Eval,
    EvalContext,
    ProbeError,
    device_of,
    input_size,
)
from agglo.nn.geometry import resample
from agglo.types import ConfigError


class Segmentation(Eval):
    """Linear segmentation: batch norm without affine part and a 1x1 convolution on frozen spatial features.

    ``probe: logistic`` replaces the usual SGD training by a convex problem with one solution:

    - features are standardised per channel by the training cells' mean and standard deviation;
    - a cell's target is the histogram of the classes of its pixels, its weight the share of pixels that have a class;
    - minimised over ``W (K, D)``, ``b (K)`` by full-batch L-BFGS from zero:
      ``sum_i w_i CE(y_i, W x_i + b) / sum_i w_i + decay / 2 ||W||^2``; no bias decay; no augmentation, no seed;
    - ``decay`` maximises the mIoU on ``val``; ties: the stronger.

    ``probe: adamw`` trains the probe as AM-RADIO does (arXiv:2312.06709, 5.3): AdamW (betas 0.9, 0.999) on the
    cross-entropy of every pixel, logits upsampled to the mask; linear warm-up from 1e-6 of the peak learning rate,
    then linear decay to 0. Images are not augmented, because features are computed once; ``val`` is not used.

    The prediction is the argmax of the logits, upsampled bilinearly (``align_corners=False``) to the mask. With
    ``inference: whole`` the input is the image cropped to the aspect of ``size``. With ``inference: slide`` its shorter
    side is scaled to ``short``, the inputs are windows of ``size`` every ``stride`` pixels, in training too, and the
    logits of overlapping windows are averaged.

    Background is a class. Pixels of value 255 are unlabelled and ignored. Metrics, from one confusion matrix of all
    pixels of ``test`` with ``TP``, ``FP`` and ``FN`` per class: ``miou``, the mean of ``TP / (TP + FP + FN)`` over the
    classes that occur in the ground truth or the predictions; ``pixel_accuracy``, the share of correct pixels. Both in
    [0, 1].

    Args:
        probe: ``logistic`` or ``adamw``.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        inference: ``whole`` or ``slide``.
        stride: of the windows, in pixels; two thirds of the window's shorter side when None.
        short: shorter side of the scaled image, in pixels; the window's longer side when None.
        decay: candidate L2 penalties of the logistic probe; AdamW uses the first as weight decay.
        steps: maximum number of L-BFGS iterations per penalty; or AdamW steps.
        warmup: warm-up steps of AdamW.
        lr: peak learning rate of AdamW.
        batch: images per AdamW step.
        seed: of the order of the images in AdamW training.
        train: a source with ``classes`` and ``annotation(index).semantic``, for fitting.
        val: the same; chooses the penalty.
        test: the same; measured.
    """

    def __init__(
        self,
        *,
        probe: Literal["logistic", "adamw"] = "logistic",
        size: int | tuple[int, int] = 128,
        inference: Literal["whole", "slide"] = "whole",
        stride: int | None = None,
        short: int | None = None,
        decay: list[float] | tuple[float, ...] = (0.1, 0.01, 0.001),
        steps: int = 60,
        warmup: int = 0,
        lr: float = 1e-3,
        batch: int = 16,
        seed: int = 0,
        train: Mapping[str, Any] = SCENES_TRAIN,
        val: Mapping[str, Any] = SCENES_VAL,
        test: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if not decay or min(decay) < 0:
            raise ConfigError(f"evals.segmentation: decay must be a list of non-negative numbers; got {list(decay)}")
        if probe not in ("logistic", "adamw"):
            raise ConfigError(f"evals.segmentation: probe must be logistic or adamw, not {probe!r}")
        if inference not in ("whole", "slide"):
            raise ConfigError(f"evals.segmentation: inference must be whole or slide, not {inference!r}")
        for key, value in (("steps", steps), ("batch", batch), ("stride", stride or 1), ("short", short or 1)):
            if value < 1:
                raise ConfigError(f"evals.segmentation: {key} must be at least 1, got {value}")
        self.adamw = PixelTraining(steps, warmup, lr, decay[0], batch, seed) if probe == "adamw" else None
        self.size = size
        self.inference = inference
        self.stride = stride
        self.short = short
        self.decay = tuple(sorted(decay, reverse=True))
        self.steps = steps
        self.train = train
        self.val = val
        self.test = test

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        need_spatial(model, "segmentation")
        names = ("background", *_classes(context.sources.open(self.train)))
        train = self._split(model, self.train, context)
        if self.adamw is not None:
            check_masks(train, len(names))
            probe = fit_pixels(train, len(names), self.adamw, device_of(model), context.report)
            test = self._split(model, self.test, context)
            return self._measure(test, probe, names, context)
        val, test = (self._split(model, options, context) for options in (self.val, self.test))
        standard, grid = Standard.of(train.labelled.features), train.labelled.features.shape[-2:]
        x = rows(standard(train.labelled.features))
        masks = zip(train.labelled.truth, train.labelled.names, strict=True)
        y = rows(torch.cat([_histogram(mask, grid, len(names), name) for mask, name in masks]))

        def score(probe: tuple[Tensor, Tensor]) -> float:
            return miou(torch.stack(list(self._confusions(val, Probe(standard, *probe), len(names)))).sum(0))

        probe = best_logistic(x, y, self.decay, self.steps, score, "segmentation", context.report)
        return self._measure(test, Probe(standard, *probe), names, context)

    def _split(self, model: Backbone, options: Mapping[str, Any], context: EvalContext) -> Split:
        if self.inference == "whole":
            return Split(load(model, options, self.size, "semantic", context))
        view = input_size(model, self.size)
        source = context.sources.open(options)
        stride = min(self.stride or max(1, min(view) * 2 // 3), min(view))
        key = ("windows", id(source), view, stride, self.short)
        read, short = context.sources.reader(source), self.short or max(view)
        windows: Windows = context.features.once(key, lambda: Windows(source, view, stride, short, read))
        return Split(load(model, windows, view, "semantic", context), windows)

    def _confusions(self, split: Split, probe: Probe, classes: int) -> Iterator[Tensor]:
        """The confusion matrix of each image."""
        for name, (found, truth) in zip(split.names(), split.predict(probe), strict=True):
            yield confusion(truth, found, classes, name)

    def _measure(self, test: Split, probe: Probe, names: Sequence[str], context: EvalContext) -> dict[str, float]:
        matrices = list(self._confusions(test, probe, len(names)))
        matrix = torch.stack(matrices).sum(0)
        iou, occurs = iou_of(matrix)
        context.records.add_classes(
            "iou", [name for name, seen in zip(names, occurs.tolist(), strict=True) if seen], iou[occurs]
        )
        seen = [i for i, one in enumerate(matrices) if float(one.sum())]
        context.records.add_images("miou", [test.names()[i] for i in seen], [miou(matrices[i]) for i in seen])
        return {"miou": miou(matrix), "pixel_accuracy": float(matrix.trace() / matrix.sum())}


def confusion(truth: Tensor, found: Tensor, classes: int, name: str = "a mask") -> Tensor:
    """Pixel counts ``(K, K)`` float64 by true (row) and predicted (column) class; truth 255 is ignored.

    Raises:
        ConfigError: a true class outside 0 .. K-1.
    """
    check_mask(truth, classes, name)
    keep = truth != IGNORE
    truth, found = truth[keep].long(), found[keep].long()
    return torch.bincount(truth * classes + found, minlength=classes**2).view(classes, classes).double()


def iou_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union per class, and which classes occur in truth or prediction: two ``(K,)``."""
    hit = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hit
    return hit / union.clamp_min(1), union > 0


def miou(matrix: Tensor) -> float:
    """Mean intersection over union of the classes that occur in truth or prediction.

    Raises:
        ProbeError: no pixel is labelled.
    """
    iou, occurs = iou_of(matrix)
    if not bool(occurs.any()):
        raise ProbeError("no labelled pixel to measure segmentation on")
    return float(iou[occurs].mean())


def _histogram(mask: Tensor, grid: Sequence[int], classes: int, name: str = "a mask") -> Tensor:
    """Share of each class among the pixels of each cell, ``(1, K, h, w)``; unlabelled pixels add to none."""
    check_mask(mask, classes, name)
    mask = mask.long()
    legal = mask != IGNORE
    onehot = F.one_hot(mask * legal, classes).float() * legal[..., None]
    return resample(onehot.permute(2, 0, 1)[None], (grid[0], grid[1]))


def _classes(source: object) -> Sequence[str]:
    classes = getattr(source, "classes", None)
    if not classes:
        raise ConfigError(
            f"{type(source).__name__} has no classes: segmentation needs a source such as {{kind: scenes}}"
        )
    return classes
