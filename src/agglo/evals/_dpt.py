"""The dense probe of Probe3d: a small DPT head (Ranftl et al. 2021) on frozen maps, trained by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.evals._probe import Labelled, Standard
from agglo.evals.base import EvalContext, ProbeError
from agglo.types import ConfigError

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Grids of the pyramid, relative to the features' own."""

Loss = Callable[[Tensor, Tensor], Tensor | None]
"""Prediction ``(K, H, W)`` and truth of one image to a number; None where the image has nothing to learn from."""


@dataclass(frozen=True, slots=True)
class Training:
    """How a dense probe is trained.

    Args:
        hidden: channels inside the head.
        epochs: passes over the training images.
        warmup: epochs of linear warm-up; a cosine to zero follows.
        lr: peak learning rate of AdamW.
        decay: its weight decay.
        batch: images a step.
        seed: of the head's first weights and of the order of the images.
    """

    hidden: int = 512
    epochs: int = 10
    warmup: float = 1.5
    lr: float = 5e-4
    decay: float = 0.01
    batch: int = 8
    seed: int = 0


def check_probe(name: str, probe: str, layers: int, hidden: int, epochs: int, lr: float, batch: int) -> None:
    """Raise ConfigError unless an eval's keys of the DPT probe are legal."""
    if probe not in ("linear", "dpt"):
        raise ConfigError(f"evals.{name}: probe is linear or dpt, not {probe!r}")
    for key, value in (("layers", layers), ("hidden", hidden), ("epochs", epochs), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"evals.{name}: {key} is at least 1, got {value}")
    if not lr > 0:
        raise ConfigError(f"evals.{name}: lr must be positive, got {lr}; 5e-4 is Probe3d's")


class Dpt(nn.Module):
    """Maps of four depths, brought to four scales and fused from coarse to fine.

    Args:
        channels: of each map.
        layers: how many maps; with fewer than four the last ones serve several scales.
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
        for i in reversed(range(len(SCALES))):  # the last block makes the coarsest level
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
    out: int,
    loss: Loss,
    training: Training,
    what: str,
    device: torch.device,
    context: EvalContext,
) -> tuple[Dpt, Standard]:
    """Train a head on the split's features, standardised per channel.

    The same call gives the same head: first weights and order are drawn from ``training.seed`` alone.

    Args:
        split: features ``(N, layers * C, h, w)`` and truths.
        layers: maps side by side in the channels.
        out: channels to predict.
        loss: of one image, at its truth's resolution.
        training: how.
        what: whose probe this is, for errors.
        device: where to train.
        context: receives progress.

    Raises:
        ProbeError: the loss is not finite, the trained head does worse than the untrained one on the images it began
            with, or no image has anything to learn from.
    """
    standard = Standard.of(split.features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        head = Dpt(split.features.shape[1] // layers, layers, training.hidden, out)
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
                value = _mean_loss(found, [split.truth[i] for i in chosen.tolist()], loss)
            step += 1
            if value is None:
                continue
            if not bool(torch.isfinite(value)):
                raise ProbeError(f"the {what} probe diverged in epoch {epoch + 1}: its loss is {float(value.detach())}")
            began = began or (chosen, float(value.detach()))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        context.report(f"{what} probe, epoch {epoch + 1}/{training.epochs}")
    if began is None:
        raise ProbeError(f"the training split has no valid {what}: nothing to fit a probe on")
    head.eval()
    with torch.no_grad():
        found = head(standard(split.features[began[0]]).to(device))
        value = _mean_loss(found, [split.truth[i] for i in began[0].tolist()], loss)
    end = math.nan if value is None else float(value)
    if not end <= began[1] + 0.1 * abs(began[1]) + 0.1:
        raise ProbeError(
            f"the {what} probe diverged: its loss ends at {end:.4g}, where it began at {began[1]:.4g}; lower lr"
        )
    return head, standard


def _mean_loss(found: Tensor, truths: Sequence[Tensor], loss: Loss) -> Tensor | None:
    """Over the images of a batch that have something to learn from."""
    terms = []
    for one, truth in zip(found, truths, strict=True):
        term = loss(_resize(one[None], truth.shape[-2:])[0], truth.to(found.device))
        if term is not None:
            terms.append(term)
    return torch.stack(terms).mean() if terms else None


def predict(head: Dpt, standard: Standard, split: Labelled, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image's prediction ``(K, H, W)`` at its truth's resolution, and the truth; on the CPU."""
    device = next(head.parameters()).device
    with torch.no_grad():
        for start in range(0, len(split.truth), batch):
            found = head(standard(split.features[start : start + batch]).to(device))
            for one, truth in zip(found, split.truth[start : start + batch], strict=True):
                yield _resize(one[None], truth.shape[-2:])[0].cpu(), truth


def _rate(epoch: float, training: Training) -> float:
    """The learning rate's share of its peak, at a fraction of epochs."""
    if epoch < training.warmup:
        return (epoch + 1e-3) / training.warmup
    left = max(1e-9, training.epochs - training.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - training.warmup) / left)))


def _resize(x: Tensor, grid: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(grid):
        return x
    return F.interpolate(x, size=tuple(grid), mode="bilinear", align_corners=False)
