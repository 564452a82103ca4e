"""Semantic segmentation by a linear probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import need_spatial
from agglo.evals._pixels import IGNORE, PixelTraining, Probe, Split, check_mask, check_masks, fit_pixels
from agglo.evals._probe import Standard, fit_logistic, load, rows
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
    """Linear segmentation: batch norm without affine part and a 1x1 convolution on frozen spatial features (METHOD 7).

    ``probe: logistic`` replaces the field's training by SGD by a convex problem that has one answer:

    - features are standardised per channel by the training cells' mean and standard deviation;
    - a cell's target is the histogram of the classes of its pixels, its weight the share of pixels that have a class;
    - minimised over ``W (K, D)``, ``b (K)`` by full-batch L-BFGS from zero:
      ``sum_i w_i CE(y_i, W x_i + b) / sum_i w_i + decay / 2 ||W||^2``; no bias decay; no augmentation, no seed;
    - ``decay`` is the one whose mIoU on ``val`` is best; equal ones: the stronger.

    ``probe: adamw`` trains as published: a batch norm and a 1x1 convolution by AdamW (betas 0.9, 0.999) on the
    cross-entropy of every pixel, logits upsampled to the mask; linear warm-up from 1e-6 of the rate, then linear to 0.
    The images are not augmented, for the features are computed once; ``val`` is not used.

    Logits are upsampled bilinearly (``align_corners=False``) to the mask, and the largest wins. ``inference: whole``
    shows the model the image, cropped to the aspect of ``size``. ``inference: slide`` scales its shorter side to
    ``short``, shows windows of ``size`` every ``stride`` pixels, in training too, and averages the logits of those that
    see a pixel.

    Background is a class. Pixels of value 255 have no class and count nowhere. mIoU is over the classes that occur in
    the truth or the predictions of ``test``, from one confusion matrix of all its pixels.

    Metrics: ``miou``, ``pixel_accuracy``, in [0, 1].

    Args:
        probe: ``logistic`` or ``adamw``.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        inference: ``whole`` or ``slide``.
        stride: pixels between windows; two thirds of the window's shorter side when None.
        short: shorter side of the image that windows slide over; the window's longer side when None.
        decay: L2 penalties of the logistic probe to choose from; the weight decay of AdamW is the first.
        steps: L-BFGS iterations at most, for each penalty; or steps of AdamW.
        warmup: steps of AdamW's warm-up.
        lr: its peak learning rate.
        batch: its images a step.
        seed: of the order of its images.
        train: a source with ``classes`` and ``annotation(index).semantic``, fitted on.
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
            raise ConfigError(f"evals.segmentation: decay is a list of numbers, none negative; got {list(decay)}")
        if probe not in ("logistic", "adamw"):
            raise ConfigError(f"evals.segmentation: probe is logistic or adamw, not {probe!r}")
        if inference not in ("whole", "slide"):
            raise ConfigError(f"evals.segmentation: inference is whole or slide, not {inference!r}")
        for key, value in (("steps", steps), ("batch", batch), ("stride", stride or 1), ("short", short or 1)):
            if value < 1:
                raise ConfigError(f"evals.segmentation: {key} is at least 1, got {value}")
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
            probe = fit_pixels(train, len(names), self.adamw, device_of(model), context)
            test = self._split(model, self.test, context)
            return self._measure(test, probe, names, context)
        val, test = (self._split(model, options, context) for options in (self.val, self.test))
        standard, grid = Standard.of(train.labelled.features), train.labelled.features.shape[-2:]
        x = rows(standard(train.labelled.features))
        y = rows(
            torch.cat(
                [
                    _histogram(mask, grid, len(names), name)
                    for mask, name in zip(train.labelled.truth, train.labelled.names, strict=True)
                ]
            )
        )
        fitted: tuple[Tensor, Tensor] | None = None
        best: tuple[float, Probe] | None = None
        for decay in self.decay:  # from strong to weak: each solution starts the next
            context.report(f"segmentation probe, decay {decay:g}")
            fitted = fit_logistic(x, y, decay, self.steps, start=fitted)
            probe = Probe(standard, *fitted)
            # With one penalty there is nothing to choose.
            score = (
                miou(torch.stack(list(self._confusions(val, probe, len(names)))).sum(0)) if len(self.decay) > 1 else 0.0
            )
            if best is None or score > best[0]:
                best = score, probe
        if best is None:
            raise ProbeError("no penalty was tried")
        return self._measure(test, best[1], names, context)

    def _split(self, model: Backbone, options: Mapping[str, Any], context: EvalContext) -> Split:
        if self.inference == "whole":
            return Split(load(model, options, self.size, "semantic", context))
        view = input_size(model, self.size)
        source = context.sources.open(options)
        stride = min(self.stride or max(1, min(view) * 2 // 3), min(view))
        key = ("windows", id(source), view, stride, self.short)
        windows: Windows = context.features.once(key, lambda: Windows(source, view, stride, self.short or max(view)))
        return Split(load(model, windows, view, "semantic", context), windows)

    def _confusions(self, split: Split, probe: Probe, classes: int) -> Iterator[Tensor]:
        """The confusion matrix of each image."""
        for name, (found, truth) in zip(split.names(), split.answers(probe), strict=True):
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
    """Counts ``(K, K)`` float64 of pixels by true (row) and found (column) class; truth 255 is left out.

    Raises:
        ConfigError: a true class outside 0 .. K-1.
    """
    check_mask(truth, classes, name)
    keep = truth != IGNORE
    truth, found = truth[keep].long(), found[keep].long()
    return torch.bincount(truth * classes + found, minlength=classes**2).view(classes, classes).double()


def iou_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of each class, and which classes have a pixel in truth or prediction: two ``(K,)``."""
    hit = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hit
    return hit / union.clamp_min(1), union > 0


def miou(matrix: Tensor) -> float:
    """Mean intersection over union of the classes with a pixel in truth or prediction.

    Raises:
        ProbeError: there is no pixel at all.
    """
    iou, occurs = iou_of(matrix)
    if not bool(occurs.any()):
        raise ProbeError("no labelled pixel to measure segmentation on")
    return float(iou[occurs].mean())


def _histogram(mask: Tensor, grid: Sequence[int], classes: int, name: str = "a mask") -> Tensor:
    """Share of each class among the pixels of each cell, ``(1, K, h, w)``; pixels without a class add to none."""
    check_mask(mask, classes, name)
    mask = mask.long()
    legal = mask != IGNORE
    onehot = F.one_hot(mask * legal, classes).float() * legal[..., None]
    return resample(onehot.permute(2, 0, 1)[None], (grid[0], grid[1]))


def _classes(source: object) -> Sequence[str]:
    classes = getattr(source, "classes", None)
    if not classes:
        raise ConfigError(
            f"{type(source).__name__} names no classes: segmentation needs a source such as {{kind: scenes}}"
        )
    return classes
