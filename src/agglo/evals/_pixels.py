"""Segmentation probes: per-pixel training, and inference on whole images or sliding windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._probe import Labelled, Standard, predictions, truth_of
from agglo.evals._windows import Windows
from agglo.evals.base import ProbeError, Progress
from agglo.types import ConfigError

IGNORE = 255
"""Value of pixels without a class."""


@dataclass(frozen=True, slots=True)
class PixelTraining:
    """How a 1x1 probe is trained by AdamW.

    Args:
        steps: number of steps.
        warmup: steps of linear warm-up from 1e-6 of the peak, followed by linear decay to 0.
        lr: peak learning rate.
        decay: weight decay.
        batch: images per step.
        seed: of the order of the images.
    """

    steps: int
    warmup: int
    lr: float
    decay: float
    batch: int
    seed: int

    def rate(self, step: int) -> float:
        """Learning rate relative to its peak."""
        if step < self.warmup:
            return 1e-6 + (1 - 1e-6) * step / self.warmup
        return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup))


@dataclass(frozen=True, slots=True)
class Probe:
    """A frozen batch norm and a 1x1 convolution.

    Args:
        standard: the batch norm.
        weight: ``(K, D)``.
        bias: ``(K,)``.
    """

    standard: Standard
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Split:
    """Features and masks of a split.

    Args:
        labelled: of whole images, or of windows.
        windows: the windows; None for whole images.
    """

    labelled: Labelled
    windows: Windows | None = None

    def names(self) -> list[str]:
        """Names of the images."""
        if self.windows is None:
            return list(self.labelled.names)
        return [self.windows.source.name(i) for i, _ in self._groups(self.windows)]

    def predict(self, probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted and true class of each pixel, two ``(H, W)`` per image."""
        if self.windows is not None:
            yield from self._slide(self.windows, probe)
            return
        features = probe.standard(self.labelled.features)
        for logits, truth in predictions(features, probe.weight, probe.bias, self.labelled.truth):
            yield from zip(logits.argmax(1), truth, strict=True)

    def _groups(self, windows: Windows) -> list[tuple[int, list[int]]]:
        """Each image and the rows of its readable windows."""
        known = {windows.name(i): i for i in range(len(windows))}
        groups: dict[int, list[int]] = {}
        for row, name in enumerate(self.labelled.names):
            groups.setdefault(windows.windows[known[name]].image, []).append(row)
        return list(groups.items())

    def _slide(self, windows: Windows, probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
        known = {windows.name(i): windows.windows[i] for i in range(len(windows))}
        for image, members in self._groups(windows):
            places = [known[self.labelled.names[row]] for row in members]
            size = places[0].scaled
            total, seen = torch.zeros(len(probe.weight), *size), torch.zeros(size)
            low = F.conv2d(probe.standard(self.labelled.features[members]), probe.weight[:, :, None, None], probe.bias)
            for logits, place in zip(low, places, strict=True):
                x0, y0, x1, y1 = place.box
                total[:, y0:y1, x0:x1] += _upsampled(logits, (y1 - y0, x1 - x0))
                seen[y0:y1, x0:x1] += 1
            truth = truth_of(windows.source, image, "semantic", places[0].full, places[0].full)
            yield _upsampled(total / seen, truth.shape).argmax(0), truth


def fit_pixels(split: Split, classes: int, training: PixelTraining, device: torch.device, progress: Progress) -> Probe:
    """Train a batch norm and a 1x1 convolution on the cross-entropy of every labelled pixel.

    The batch norm has the statistics of all training cells and no affine part, which the convolution would absorb.

    Raises:
        ProbeError: no labelled pixel, a loss that is not finite, or a final loss above chance level.
    """
    features, truth = split.labelled.features, split.labelled.truth
    standard = Standard.of(features)
    weight = torch.zeros(classes, features.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimiser = torch.optim.AdamW([weight, bias], lr=training.lr, betas=(0.9, 0.999), weight_decay=training.decay)
    order = torch.Generator().manual_seed(training.seed)
    waiting: list[int] = []
    shown: Tensor | None = None
    masks: list[Tensor] = []
    for step in range(training.steps):
        while len(waiting) < training.batch:
            waiting += torch.randperm(len(truth), generator=order).tolist()
        chosen, waiting = waiting[: training.batch], waiting[training.batch :]
        for group in optimiser.param_groups:
            group["lr"] = training.lr * training.rate(step)
        x = standard(features[chosen]).to(device)
        with torch.enable_grad():
            value = _cross_entropy(F.conv2d(x, weight[:, :, None, None], bias), [truth[i] for i in chosen])
        if value is None:
            continue
        if not bool(torch.isfinite(value)):
            raise ProbeError(f"the segmentation probe diverged at step {step + 1}: its loss is {float(value.detach())}")
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        shown, masks = x, [truth[i] for i in chosen]
        if step % 100 == 99:
            progress(f"segmentation probe, step {step + 1}/{training.steps}")
    if shown is None:
        raise ProbeError("the training split has no labelled pixel: nothing to fit a probe on")
    with torch.no_grad():  # on the last batch that had labels, after its step
        last = _cross_entropy(F.conv2d(shown, weight[:, :, None, None], bias), masks)
    chance = math.log(classes)
    if last is None or not float(last) <= 1.5 * chance + 1e-3:
        end = math.nan if last is None else float(last)
        raise ProbeError(f"the segmentation probe diverged: final loss {end:.4g}, chance level {chance:.4g}; lower lr")
    return Probe(standard, weight.detach().cpu(), bias.detach().cpu())


def check_mask(mask: Tensor, classes: int, name: str) -> None:
    """Raise ConfigError unless all values of a mask are 0 to ``classes`` - 1, or 255."""
    found = mask[mask != IGNORE].long()
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < classes:
        wrong = int(found.min()) if int(found.min()) < 0 else int(found.max())
        raise ConfigError(
            f"{name} contains class {wrong}, but the source has {classes - 1} classes beside background (0)"
        )


def check_masks(split: Split, classes: int) -> None:
    """:func:`check_mask` of every mask of a split."""
    for mask, name in zip(split.labelled.truth, split.labelled.names, strict=True):
        check_mask(mask, classes, name)


def _cross_entropy(low: Tensor, truth: Sequence[Tensor]) -> Tensor | None:
    """Mean over the labelled pixels of a batch, with logits at each mask's size; None without labelled pixels."""
    total, count = low.new_zeros(()), 0
    for logits, mask in zip(low, truth, strict=True):
        target = mask.long().to(low.device)
        pixels = int((target != IGNORE).sum())
        if pixels:
            full = _upsampled(logits, target.shape)[None]
            total = total + F.cross_entropy(full, target[None], ignore_index=IGNORE, reduction="sum")
            count += pixels
    return total / count if count else None


def _upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """``(K, h, w)`` to ``(K, H, W)``."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
