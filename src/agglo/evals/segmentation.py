"""Semantic segmentation by a linear probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import need_spatial, open_source
from agglo.evals._probe import Labelled, ProbeError, Standard, load, predictions, rows
from agglo.evals.base import Backbone, Eval, Progress
from agglo.nn.geometry import resample
from agglo.types import ConfigError

SCENES_TRAIN: dict[str, Any] = {"kind": "scenes", "split": "train"}
SCENES_VAL: dict[str, Any] = {"kind": "scenes", "split": "val"}
SCENES_TEST: dict[str, Any] = {"kind": "scenes", "split": "test"}

IGNORE = 255


class Segmentation(Eval):
    """Linear segmentation: multinomial logistic regression on frozen spatial features, cell by cell.

    The field's protocol (METHOD 7: frozen features, batch norm, 1x1 convolution, bilinear upsampling) with the training
    by SGD replaced by a convex problem that has one answer:

    - features are standardised per channel by the training cells' mean and standard deviation;
    - a cell's target is the histogram of the classes of its pixels, its weight the share of pixels that have a class;
    - minimised over ``W (K, D)``, ``b (K)`` by full-batch L-BFGS from zero:
      ``sum_i w_i CE(y_i, W x_i + b) / sum_i w_i + decay / 2 ||W||^2``; no bias decay; no augmentation, no seed;
    - ``decay`` is the one whose mIoU on ``val`` is best; equal ones: the stronger;
    - logits are upsampled bilinearly (``align_corners=False``) to the mask, and the largest wins.

    Background is a class. Pixels of value 255 have no class and count nowhere. mIoU is over the classes that occur in
    the truth or the predictions of ``test``, from one confusion matrix of all its pixels.

    Metrics: ``miou``, ``pixel_accuracy``, in [0, 1].

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        decay: L2 penalties to choose from.
        steps: L-BFGS iterations at most, for each penalty.
        train: a source with ``classes`` and ``annotation(index).semantic``, fitted on.
        val: the same; chooses the penalty.
        test: the same; measured.
    """

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 128,
        decay: list[float] | tuple[float, ...] = (0.1, 0.01, 0.001),
        steps: int = 60,
        train: Mapping[str, Any] = SCENES_TRAIN,
        val: Mapping[str, Any] = SCENES_VAL,
        test: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if not decay or min(decay) < 0:
            raise ConfigError(f"evals.segmentation: decay is a list of numbers, none negative; got {list(decay)}")
        if steps < 1:
            raise ConfigError(f"evals.segmentation: steps is at least 1, got {steps}")
        self.size = size
        self.decay = tuple(sorted(decay, reverse=True))
        self.steps = steps
        self.train = train
        self.val = val
        self.test = test

    def run(self, model: Backbone, progress: Progress | None = None) -> dict[str, float]:
        need_spatial(model, "segmentation")
        classes = 1 + len(_classes(open_source(self.train)))
        train, val, test = (
            load(model, options, self.size, "semantic", progress) for options in (self.train, self.val, self.test)
        )
        standard = Standard.of(train.features)
        x = rows(standard(train.features))
        y = rows(torch.cat([_histogram(mask, train.features.shape[-2:], classes) for mask in train.truth]))
        probe: tuple[Tensor, Tensor] | None = None
        best: tuple[float, tuple[Tensor, Tensor]] | None = None
        for decay in self.decay:  # from strong to weak: each solution starts the next
            if progress is not None:
                progress(f"segmentation probe, decay {decay:g}")
            probe = fit_logistic(x, y, decay, self.steps, start=probe)
            # With one penalty there is nothing to choose.
            score = miou(_confusion(val, standard, probe, classes)) if len(self.decay) > 1 else 0.0
            if best is None or score > best[0]:
                best = score, probe
        if best is None:
            raise ProbeError("no penalty was tried")
        matrix = _confusion(test, standard, best[1], classes)
        return {"miou": miou(matrix), "pixel_accuracy": float(matrix.trace() / matrix.sum())}


def fit_logistic(
    x: Tensor, y: Tensor, decay: float, steps: int, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with soft labels.

    Args:
        x: ``(n, D)`` standardised features.
        y: ``(n, K)`` non-negative; a row's sum is its weight.
        decay: L2 penalty on the weights.
        steps: L-BFGS iterations at most.
        start: weight and bias to start from; zeros otherwise.

    Returns:
        weight ``(K, D)`` and bias ``(K,)``.

    Raises:
        ProbeError: no labelled cell, or the loss is not finite or above that of a probe that knows nothing.
    """
    total = float(y.sum())
    if total <= 0:
        raise ProbeError("the training split has no labelled pixel: nothing to fit a probe on")
    zeros = x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1])
    weight, bias = (tensor.clone() for tensor in start or zeros)
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def loss() -> Tensor:
        ce = -(y * F.log_softmax(x @ weight.T + bias, 1)).sum() / total
        return ce + 0.5 * decay * weight.square().sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(closure)
    with torch.no_grad():
        final = float(loss())
    ignorant = math.log(y.shape[1])  # the loss of zeros
    if not math.isfinite(final) or final > ignorant * (1 + 1e-6):
        raise ProbeError(f"the segmentation probe diverged: loss {final:.4g}, where guessing has {ignorant:.4g}")
    return weight.detach(), bias.detach()


def confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """Counts ``(K, K)`` float64 of pixels by true (row) and found (column) class; truth 255 is left out.

    Raises:
        ConfigError: a true class outside 0 .. K-1.
    """
    keep = truth != IGNORE
    truth, found = truth[keep].long(), found[keep].long()
    if truth.numel() and int(truth.max()) >= classes:
        raise ConfigError(f"a mask holds class {int(truth.max())}, but the source names {classes - 1} and background")
    return torch.bincount(truth * classes + found, minlength=classes**2).view(classes, classes).double()


def miou(matrix: Tensor) -> float:
    """Mean intersection over union of the classes with a pixel in truth or prediction.

    Raises:
        ProbeError: there is no pixel at all.
    """
    hit = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hit
    if not bool((union > 0).any()):
        raise ProbeError("no labelled pixel to measure segmentation on")
    return float((hit[union > 0] / union[union > 0]).mean())


def _confusion(split: Labelled, standard: Standard, probe: tuple[Tensor, Tensor], classes: int) -> Tensor:
    matrix = torch.zeros(classes, classes, dtype=torch.float64)
    for logits, truth in predictions(standard(split.features), *probe, split.truth):
        matrix += confusion(truth, logits.argmax(1), classes)
    return matrix


def _histogram(mask: Tensor, grid: Sequence[int], classes: int) -> Tensor:
    """Share of each class among the pixels of each cell, ``(1, K, h, w)``; pixels without a class add to none."""
    mask = mask.long()
    legal = mask != IGNORE
    highest = int((mask * legal).max())
    if highest >= classes:
        raise ConfigError(f"a mask holds class {highest}, but the source names {classes - 1} and background")
    onehot = F.one_hot(mask * legal, classes).float() * legal[..., None]
    return resample(onehot.permute(2, 0, 1)[None], (grid[0], grid[1]))


def _classes(source: object) -> Sequence[str]:
    classes = getattr(source, "classes", None)
    if not classes:
        raise ConfigError(
            f"{type(source).__name__} names no classes: segmentation needs a source such as {{kind: scenes}}"
        )
    return classes
