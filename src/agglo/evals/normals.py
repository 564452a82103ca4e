"""Surface normals by a probe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._dpt import Training, check_probe, fit_dpt, predict
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
    Records,
    device_of,
)
from agglo.nn.geometry import resample
from agglo.types import ConfigError

THRESHOLDS = (11.25, 22.5, 30.0)


class Normals(Eval):
    """Surface normals by a probe on frozen spatial features: linear, or the DPT head of Probe3d.

    ``probe: linear`` is ridge regression of the unit normal, cell by cell, in closed form: features standardised, a
    cell's target the mean normal of its valid pixels and its weight their share (a pixel is valid when its normal is
    finite and about of length 1); ``ridge`` is the one whose mean angle on ``val`` is least; the prediction is
    upsampled bilinearly and brought to length 1.

    ``probe: dpt`` (METHOD 7) reads ``layers`` blocks through the head that the depth probe has, with four outputs: the
    normal and its concentration kappa, trained on the likelihood of the angle ``t`` between prediction and truth,
    ``kappa t - log(kappa^2 + 1) + log(1 + exp(-kappa pi))`` (Bae et al. 2021). ``val`` is not used.

    Metrics, over all valid pixels of ``test``: ``within_11``, ``within_22``, ``within_30``, the share of pixels less
    than 11.25, 22.5 and 30 degrees off; ``recall``, the mean of the three, which RADIO reports; ``mean_angle``,
    ``median_angle`` and ``rms_angle`` in degrees, better when lower.

    Args:
        probe: ``linear`` or ``dpt``.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        ridge: penalties of the linear probe to choose from.
        layers: blocks that the DPT probe reads.
        hidden: its channels.
        epochs: of its training.
        lr: its peak learning rate.
        batch: images a step.
        seed: of its first weights and the order of its images.
        train: a source with ``annotation(index).normals`` ``(3, H, W)``, fitted on.
        val: the same; chooses the penalty.
        test: the same; measured.
    """

    lower_is_better = frozenset({"mean_angle", "median_angle", "rms_angle"})

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
        if not ridge or min(ridge) <= 0:
            raise ConfigError(f"evals.normals: ridge is a list of positive numbers; got {list(ridge)}")
        check_probe("normals", probe, layers, hidden, epochs, lr, batch)
        self.probe = probe
        self.size = size
        self.ridge = tuple(sorted(ridge, reverse=True))
        self.layers = layers
        self.training = Training(hidden=hidden, epochs=epochs, lr=lr, batch=batch, seed=seed)
        self.train = train
        self.val = val
        self.test = test

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        need_spatial(model, "normals")
        if self.probe == "dpt":
            return self._dpt(model, context)
        train, val, test = (
            load(model, options, self.size, "normals", context) for options in (self.train, self.val, self.test)
        )
        standard = Standard.of(train.features)
        targets = [cell_normals(normals, train.features.shape[-2:]) for normals in train.truth]
        y, w = (torch.cat(parts) for parts in zip(*targets, strict=True))
        context.report("normals probe")
        probes = fit_ridge(rows(standard(train.features)), y, w, self.ridge, "normals")
        angles = [measure(_linear(val, standard, one))["mean_angle"] if len(probes) > 1 else 0.0 for one in probes]
        return measure(_linear(test, standard, probes[angles.index(min(angles))]), test.names, context.records)

    def _dpt(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        seen, layers = layered(model, self.layers)
        train, test = (load(seen, options, self.size, "normals", context) for options in (self.train, self.test))
        head, standard = fit_dpt(train, layers, 4, normal_loss, self.training, "normals", device_of(model), context)
        found = predict(head, standard, test, self.training.batch)
        return measure(((one[:3], normals) for one, normals in found), test.names, context.records)


def _linear(split: Labelled, standard: Standard, probe: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for found, normals in predictions(standard(split.features), *probe, split.truth):
        yield from zip(found, normals, strict=True)


def cell_normals(normals: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean normal ``(h*w, 3)`` of each cell's valid pixels, and their share ``(h*w,)``, of a map ``(3, H, W)``."""
    valid = _valid(normals)
    both = torch.cat((torch.where(valid, normals, 0.0), valid.to(normals)[None]))[None]
    found = resample(both, (grid[0], grid[1]))[0].flatten(1)
    total, share = found[:3], found[3]
    return torch.where(share > 0, total / share.clamp_min(1e-12), 0.0).T, share


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Radians between vectors along axis 0, accurate at 0 and at pi; float of the inputs."""
    a, b = a / _length(a), b / _length(b)
    # Not acos: its slope is infinite where the answer is right.
    return 2 * torch.atan2(_length(a - b), _length(a + b))


def _length(x: Tensor) -> Tensor:
    """Norm along axis 0 with a slope of 0 at 0."""
    return x.square().sum(0).clamp_min(1e-24).sqrt()


def normal_loss(found: Tensor, normals: Tensor) -> Tensor | None:
    """Negative log likelihood of one image's normals under the predicted mean and concentration; None without any.

    Args:
        found: ``(4, H, W)``, the normal and what ``elu + 1`` turns into kappa.
        normals: ``(3, H, W)``.
    """
    valid = _valid(normals)
    if not bool(valid.any()):
        return None
    kappa = F.elu(found[3][valid]) + 1.01
    angle = angle_between(found[:3][:, valid], normals[:, valid])
    return (kappa * angle - (kappa.square() + 1).log() + F.softplus(-kappa * math.pi)).mean()


def measure(
    pairs: Iterable[tuple[Tensor, Tensor]], names: Sequence[str] = (), records: Records | None = None
) -> dict[str, float]:
    """All metrics of predicted and true normals ``(3, H, W)``.

    Args:
        pairs: prediction, of any length, and truth of each image.
        names: of the images.
        records: receives the ``recall`` of each image.

    Raises:
        ProbeError: there is no valid pixel, or a prediction is not finite.
    """
    angles: list[Tensor] = []
    own: list[float] = []
    seen: list[int] = []
    for i, (found, normals) in enumerate(pairs):
        if not bool(torch.isfinite(found).all()):
            raise ProbeError("the normals probe diverged: a prediction is not finite")
        valid = _valid(normals)
        degrees = angle_between(found[:, valid].double(), normals[:, valid].double()).rad2deg()
        if degrees.numel():
            angles.append(degrees)
            seen.append(i)
            own.append(sum(float((degrees < limit).double().mean()) for limit in THRESHOLDS) / len(THRESHOLDS))
    if not angles:
        raise ProbeError("no valid normals to measure on")
    if records is not None:
        records.add_images("recall", [names[i] for i in seen], own)
    every = torch.cat(angles)
    within = [float((every < limit).double().mean()) for limit in THRESHOLDS]
    return {
        **{f"within_{int(limit)}": share for limit, share in zip(THRESHOLDS, within, strict=True)},
        "recall": sum(within) / len(within),
        "mean_angle": float(every.mean()),
        "median_angle": float(every.quantile(0.5) if len(every) < 2**24 else every.median()),
        "rms_angle": float(every.square().mean().sqrt()),
    }


def _valid(normals: Tensor) -> Tensor:
    length = normals.square().sum(0).sqrt()  # vector_norm along the first axis takes ten times as long
    return torch.isfinite(length) & ((length - 1).abs() < 0.1)
