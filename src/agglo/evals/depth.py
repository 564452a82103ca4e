"""Monocular depth by a linear probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agglo.evals._features import need_spatial
from agglo.evals._probe import Labelled, ProbeError, Standard, load, predictions, rows
from agglo.evals.base import Backbone, Eval, Progress
from agglo.nn.geometry import resample
from agglo.types import ConfigError

SCENES_TRAIN: dict[str, Any] = {"kind": "scenes", "split": "train"}
SCENES_VAL: dict[str, Any] = {"kind": "scenes", "split": "val"}
SCENES_TEST: dict[str, Any] = {"kind": "scenes", "split": "test"}


class Depth(Eval):
    """Linear depth: ridge regression of log depth on frozen spatial features, cell by cell, in closed form.

    - features are standardised per channel by the training cells' mean and standard deviation;
    - a cell's target ``y`` is the mean log depth (metres) of its valid pixels, its weight ``w`` their share; a pixel is
      valid when its depth is finite and positive;
    - ``W, b = argmin sum_i w_i (W x_i + b - y_i)^2 / sum_i w_i + ridge ||W||^2``, solved exactly in float64;
    - ``ridge`` is the one whose RMSE on ``val`` is lowest; equal ones: the stronger;
    - predicted log depth is upsampled bilinearly to the depth map, exponentiated, and kept within twice the range of
      depths seen in training.

    Metrics, over all valid pixels of ``test`` at full resolution, ``d`` true and ``p`` predicted: ``delta1``, the share
    with ``max(p/d, d/p) < 1.25`` (Eigen et al. 2014); ``rmse`` in metres and ``abs_rel``, the mean of ``|p - d| / d``,
    both better when lower.

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        ridge: penalties to choose from.
        train: a source with ``annotation(index).depth``, fitted on.
        val: the same; chooses the penalty.
        test: the same; measured.
    """

    lower_is_better = frozenset({"rmse", "abs_rel"})

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 128,
        ridge: list[float] | tuple[float, ...] = (10.0, 1.0, 0.1, 0.01, 0.001),
        train: Mapping[str, Any] = SCENES_TRAIN,
        val: Mapping[str, Any] = SCENES_VAL,
        test: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if not ridge or min(ridge) <= 0:
            raise ConfigError(f"evals.depth: ridge is a list of positive numbers; got {list(ridge)}")
        self.size = size
        self.ridge = tuple(sorted(ridge, reverse=True))
        self.train = train
        self.val = val
        self.test = test

    def run(self, model: Backbone, progress: Progress | None = None) -> dict[str, float]:
        need_spatial(model, "depth")
        train, val, test = (
            load(model, options, self.size, "depth", progress) for options in (self.train, self.val, self.test)
        )
        standard = Standard.of(train.features)
        targets = [cell_log_depth(depth, train.features.shape[-2:]) for depth in train.truth]
        y, w = (torch.cat(parts) for parts in zip(*targets, strict=True))
        limits = depth_limits(train.truth)
        if progress is not None:
            progress("depth probe")
        probes = fit_ridge(rows(standard(train.features)), y, w, self.ridge)
        scores = [measure(val, standard, probe, limits)["rmse"] if len(probes) > 1 else 0.0 for probe in probes]
        return measure(test, standard, probes[scores.index(min(scores))], limits)


def fit_ridge(x: Tensor, y: Tensor, w: Tensor, ridges: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Weighted ridge regression with a free bias, for several penalties from one eigendecomposition.

    Args:
        x: ``(n, D)``.
        y: ``(n,)`` targets; only looked at where ``w > 0``.
        w: ``(n,)`` weights, none negative.
        ridges: penalties on ``||W||^2``, each beside the weighted *mean* squared error.

    Returns:
        For each penalty weight ``(1, D)`` and bias ``(1,)``, float32.

    Raises:
        ProbeError: no weight at all, or a solution that is not finite.
    """
    total = w.double().sum()
    if not float(total) > 0:
        raise ProbeError("the training split has no valid depth: nothing to fit a probe on")
    share = w.double() / total
    y = torch.where(w > 0, y, torch.zeros_like(y)).double()
    x_mean, y_mean = share @ x.double(), share @ y
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    cross = torch.zeros(x.shape[1], dtype=torch.float64)
    for rows_, target, weight in zip(x.split(8192), y.split(8192), share.split(8192), strict=True):
        centred = rows_.double() - x_mean
        gram += centred.T @ (centred * weight[:, None])
        cross += centred.T @ ((target - y_mean) * weight)
    values, vectors = torch.linalg.eigh(gram)
    rotated = vectors.T @ cross
    probes = []
    for ridge in ridges:
        weight = vectors @ (rotated / (values.clamp_min(0) + ridge))
        bias = y_mean - weight @ x_mean
        if not bool(torch.isfinite(weight).all() and torch.isfinite(bias)):
            raise ProbeError(f"the depth probe is not finite at ridge {ridge:g}")
        probes.append((weight.float()[None], bias.float()[None]))
    return probes


def cell_log_depth(depth: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean log depth of each cell's valid pixels, and their share: two ``(h*w,)`` of a map ``(H, W)`` in metres."""
    valid = _valid(depth)
    log = torch.where(valid, depth, torch.ones_like(depth)).log()
    both = torch.stack((log * valid, valid.to(log)))[None]
    total, share = resample(both, (grid[0], grid[1]))[0].flatten(1)
    return torch.where(share > 0, total / share.clamp_min(1e-12), torch.zeros_like(total)), share


def depth_limits(truth: Sequence[Tensor]) -> tuple[float, float]:
    """Half the least and twice the greatest valid depth, metres.

    Raises:
        ProbeError: no valid pixel.
    """
    valid = torch.cat([depth[_valid(depth)] for depth in truth])
    if not valid.numel():
        raise ProbeError("the training split has no valid depth: nothing to fit a probe on")
    return float(valid.min()) / 2, float(valid.max()) * 2


def metrics(found: Tensor, depth: Tensor) -> tuple[Tensor, int]:
    """Sums over valid pixels of ``[ratio < 1.25, squared error, relative error]``, float64, and the pixels' number."""
    valid = _valid(depth)
    p, d = found[valid].double(), depth[valid].double()
    error = p - d
    sums = torch.stack(((torch.maximum(p / d, d / p) < 1.25).sum(), error.square().sum(), (error.abs() / d).sum()))
    return sums, int(valid.sum())


def measure(
    split: Labelled, standard: Standard, probe: tuple[Tensor, Tensor], limits: tuple[float, float]
) -> dict[str, float]:
    """A probe's metrics on a split.

    Raises:
        ProbeError: the split has no valid pixel, or a prediction is not finite.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    low, high = (math.log(limit) for limit in limits)
    for log, depth in predictions(standard(split.features), *probe, split.truth):
        if not bool(torch.isfinite(log).all()):
            raise ProbeError("the depth probe diverged: a prediction is not finite")
        part, pixels = metrics(log[:, 0].clamp(low, high).exp(), depth)
        sums, count = sums + part, count + pixels
    if not count:
        raise ProbeError("no valid depth to measure on")
    delta1, squared, relative = (float(value) / count for value in sums)
    return {"delta1": delta1, "rmse": math.sqrt(squared), "abs_rel": relative}


def _valid(depth: Tensor) -> Tensor:
    return torch.isfinite(depth) & (depth > 0)
