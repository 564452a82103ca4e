"""Dense probes: ridge regression, or the DPT head of Probe3d (arXiv:2404.08636), on frozen spatial features."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.evals._features import layered, need_spatial
from agglo.evals._probe import Labelled, Standard, fit_ridge, load, predictions, rows
from agglo.evals.base import (
    SCENES_TEST,
    SCENES_TRAIN,
    SCENES_VAL,
    Backbone,
    Eval,
    EvalContext,
    ProbeError,
    Progress,
    Records,
    device_of,
)
from agglo.types import ConfigError

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Grids of the DPT pyramid, relative to the features' own."""

Loss = Callable[[Tensor, Tensor], Tensor | None]
"""Prediction ``(K, H, W)`` and ground truth of one image to a scalar; None for an image without valid pixels."""


@dataclass(frozen=True, slots=True)
class Training:
    """How a DPT probe is trained.

    Args:
        hidden: channels inside the head.
        epochs: passes over the training images.
        warmup: epochs of linear warm-up, followed by a cosine to zero.
        lr: peak learning rate of AdamW.
        decay: weight decay.
        batch: images per step.
        seed: of the head's initial weights and of the order of the images.
    """

    hidden: int = 512
    epochs: int = 10
    warmup: float = 1.5
    lr: float = 5e-4
    decay: float = 0.01
    batch: int = 8
    seed: int = 0


class DptTask(NamedTuple):
    """What a DPT head predicts.

    Args:
        channels: outputs of the head.
        loss: of one image, at the resolution of its ground truth.
        decode: ``(channels, H, W)`` of the head to the prediction that is measured.
    """

    channels: int
    loss: Loss
    decode: Callable[[Tensor], Tensor]


class DenseProbe(Eval):
    """Evals of a dense quantity by a ridge probe or a DPT probe.

    Attributes:
        kind: of the eval, which is also the name of the ground truth in ``annotation(index)``.
        chooser: the metric on ``val`` that chooses the ridge penalty; lower is better.
    """

    kind: ClassVar[str]
    chooser: ClassVar[str]

    def __init__(
        self,
        *,
        probe: Literal["linear", "dpt"] = "linear",
        size: int | tuple[int, int] = 128,
        ridge: list[float] | tuple[float, ...] = (10.0, 1.0, 0.1, 0.01, 0.001),
        layers: int = 4,
        hidden: int = 512,
        epochs: int = 10,
        lr: float = 5e-4,
        batch: int = 8,
        seed: int = 0,
        train: Mapping[str, Any] = SCENES_TRAIN,
        val: Mapping[str, Any] = SCENES_VAL,
        test: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        where = f"evals.{self.kind}"
        if not ridge or min(ridge) <= 0:
            raise ConfigError(f"{where}: ridge must be a list of positive numbers; got {list(ridge)}")
        if probe not in ("linear", "dpt"):
            raise ConfigError(f"{where}: probe must be linear or dpt, not {probe!r}")
        for key, value in (("layers", layers), ("hidden", hidden), ("epochs", epochs), ("batch", batch)):
            if value < 1:
                raise ConfigError(f"{where}: {key} must be at least 1, got {value}")
        if not lr > 0:
            raise ConfigError(f"{where}: lr must be positive, got {lr}; Probe3d uses 5e-4")
        self.probe = probe
        self.size = size
        self.ridge = tuple(sorted(ridge, reverse=True))
        self.layers = layers
        self.training = Training(hidden=hidden, epochs=epochs, lr=lr, batch=batch, seed=seed)
        self.train = train
        self.val = val
        self.test = test

    @abstractmethod
    def cells(self, truth: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ridge targets ``(h*w,)`` or ``(h*w, K)`` of a ground truth map, and weights ``(h*w,)``."""

    @abstractmethod
    def ridge_decoder(self, truth: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """The function from upsampled ridge output ``(n, K, H, W)`` to predictions; ``truth`` is that of training."""

    @abstractmethod
    def dpt_task(self, truth: Sequence[Tensor]) -> DptTask:
        """What a DPT head predicts; ``truth`` is that of training."""

    @abstractmethod
    def score(
        self, pairs: Iterable[tuple[Tensor, Tensor]], names: Sequence[str] = (), records: Records | None = None
    ) -> dict[str, float]:
        """Metrics of pairs of prediction and ground truth."""

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        need_spatial(model, self.kind)
        if self.probe == "dpt":
            return self._dpt(model, context)
        train, val, test = (
            load(model, options, self.size, self.kind, context) for options in (self.train, self.val, self.test)
        )
        standard, grid = Standard.of(train.features), train.features.shape[-2:]
        y, w = (torch.cat(parts) for parts in zip(*(self.cells(each, grid) for each in train.truth), strict=True))
        decode = self.ridge_decoder(train.truth)

        def predicted(split: Labelled, probe: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
            for found, truth in predictions(standard(split.features), *probe, split.truth):
                yield from zip(decode(found), truth, strict=True)

        context.report(f"{self.kind} probe")
        probes = fit_ridge(rows(standard(train.features)), y, w, self.ridge, self.kind)
        scores = [self.score(predicted(val, one))[self.chooser] if len(probes) > 1 else 0.0 for one in probes]
        return self.score(predicted(test, probes[scores.index(min(scores))]), test.names, context.records)

    def _dpt(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        seen, layers = layered(model, self.layers)
        train, test = (load(seen, options, self.size, self.kind, context) for options in (self.train, self.test))
        task = self.dpt_task(train.truth)
        head, standard = fit_dpt(train, layers, task, self.training, self.kind, device_of(model), context.report)
        found = predict(head, standard, test, self.training.batch)
        return self.score(((task.decode(one), truth) for one, truth in found), test.names, context.records)


class Dpt(nn.Module):
    """DPT head (Ranftl et al. 2021): maps of four blocks, resized to four scales and fused from coarse to fine.

    Args:
        channels: of each map.
        layers: number of maps; with fewer than four the last one is used at several scales.
        hidden: channels inside.
        out: channels of the output.
    """

    def __init__(self, channels: int, layers: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = layers
        self.project = nn.ModuleList(nn.Conv2d(channels, hidden, 1) for _ in SCALES)
        self.before = nn.ModuleList(_Refine(hidden) for _ in SCALES)
        self.after = nn.ModuleList(_Refine(hidden) for _ in SCALES)
        half = max(1, hidden // 2)
        self.head = nn.Sequential(nn.Conv2d(hidden, half, 3, padding=1), nn.ReLU(), nn.Conv2d(half, out, 1))

    def forward(self, features: Tensor) -> Tensor:
        """``(B, layers * C, h, w)`` to ``(B, out, 4h, 4w)``."""
        maps = features.chunk(self.layers, 1)
        height, width = features.shape[-2:]
        fused = features.new_zeros(())
        for i in reversed(range(len(SCALES))):  # the last block is the coarsest level
            grid = max(1, round(height * SCALES[i])), max(1, round(width * SCALES[i]))
            level = self.before[i](_resize(self.project[i](maps[min(i, self.layers - 1)]), grid))
            fused = self.after[i](level + _resize(fused, grid) if fused.ndim else level)
        return self.head(fused)


class _Refine(nn.Module):
    """Two 3x3 convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


def fit_dpt(
    split: Labelled,
    layers: int,
    task: DptTask,
    training: Training,
    what: str,
    device: torch.device,
    progress: Progress,
) -> tuple[Dpt, Standard]:
    """Train a head on the split's features, standardised per channel; deterministic given ``training.seed``.

    Args:
        split: features ``(N, layers * C, h, w)`` and ground truth.
        layers: number of maps concatenated along the channels.
        task: what to predict.
        training: optimiser and schedule.
        what: name of the probe, for errors.
        device: of the training.
        progress: called after each epoch.

    Raises:
        ProbeError: the loss is not finite, the trained head has a higher loss than the untrained one on the first
            batch, or no image has valid pixels.
    """
    standard = Standard.of(split.features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        head = Dpt(split.features.shape[1] // layers, layers, training.hidden, task.channels)
    head = head.to(device)
    order = torch.Generator().manual_seed(training.seed)
    optimiser = torch.optim.AdamW(head.parameters(), lr=training.lr, weight_decay=training.decay)
    per_epoch = -(-len(split.truth) // training.batch)
    step = 0
    began: tuple[Tensor, float] | None = None
    for epoch in range(training.epochs):
        for chosen in torch.randperm(len(split.truth), generator=order).split(training.batch):
            for group in optimiser.param_groups:
                group["lr"] = training.lr * _rate(step / per_epoch, training)
            with torch.enable_grad():
                found = head(standard(split.features[chosen]).to(device))
                value = _mean_loss(found, [split.truth[i] for i in chosen.tolist()], task.loss)
            step += 1
            if value is None:
                continue
            if not bool(torch.isfinite(value)):
                raise ProbeError(f"the {what} probe diverged in epoch {epoch + 1}: its loss is {float(value.detach())}")
            began = began or (chosen, float(value.detach()))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        progress(f"{what} probe, epoch {epoch + 1}/{training.epochs}")
    if began is None:
        raise ProbeError(f"the training split has no valid {what}: nothing to fit a probe on")
    head.eval()
    with torch.no_grad():
        found = head(standard(split.features[began[0]]).to(device))
        value = _mean_loss(found, [split.truth[i] for i in began[0].tolist()], task.loss)
    end = math.nan if value is None else float(value)
    if not end <= began[1] + 0.1 * abs(began[1]) + 0.1:
        raise ProbeError(f"the {what} probe diverged: its loss went from {began[1]:.4g} to {end:.4g}; lower lr")
    return head, standard


def _mean_loss(found: Tensor, truths: Sequence[Tensor], loss: Loss) -> Tensor | None:
    """Mean over the images of a batch that have valid pixels; None if there are none."""
    terms = []
    for one, truth in zip(found, truths, strict=True):
        term = loss(_resize(one[None], truth.shape[-2:])[0], truth.to(found.device))
        if term is not None:
            terms.append(term)
    return torch.stack(terms).mean() if terms else None


def predict(head: Dpt, standard: Standard, split: Labelled, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Prediction ``(K, H, W)`` at the resolution of the ground truth, and the ground truth, per image; on the CPU."""
    device = next(head.parameters()).device
    with torch.no_grad():
        for start in range(0, len(split.truth), batch):
            found = head(standard(split.features[start : start + batch]).to(device))
            for one, truth in zip(found, split.truth[start : start + batch], strict=True):
                yield _resize(one[None], truth.shape[-2:])[0].cpu(), truth


def _rate(epoch: float, training: Training) -> float:
    """Learning rate relative to its peak, after a number of epochs."""
    if epoch < training.warmup:
        return (epoch + 1e-3) / training.warmup
    left = max(1e-9, training.epochs - training.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - training.warmup) / left)))


def _resize(x: Tensor, grid: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(grid):
        return x
    return F.interpolate(x, size=tuple(grid), mode="bilinear", align_corners=False)
