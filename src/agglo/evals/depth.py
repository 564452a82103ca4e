"""Monocular depth by a probe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
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

BINS = 256


class Depth(Eval):
    """Depth by a probe on frozen spatial features: linear, or the DPT head of Probe3d (El Banani et al. 2024).

    ``probe: linear`` is ridge regression of log depth, cell by cell, in closed form:

    - features are standardised per channel by the training cells' mean and standard deviation;
    - a cell's target ``y`` is the mean log depth (metres) of its valid pixels, its weight ``w`` their share; a pixel is
      valid when its depth is finite and positive;
    - ``W, b = argmin sum_i w_i (W x_i + b - y_i)^2 / sum_i w_i + ridge ||W||^2``, solved exactly in float64;
    - ``ridge`` is the one whose RMSE on ``val`` is lowest; equal ones: the stronger;
    - predicted log depth is upsampled bilinearly to the depth map, exponentiated, and kept within twice the range of
      depths seen in training.

    ``probe: dpt`` (METHOD 7) reads the maps of ``layers`` blocks, final norm applied (a model that shows no blocks: its
    last map alone), standardised too, through a DPT head with 256 evenly spaced depth bins, trained by AdamW on
    ``10 SigLog(0.85) + 0.5 gradient``: warm-up, then a cosine to zero, no augmentation. ``val`` is not used, and the
    same seed gives the same numbers.

    Metrics, over all valid pixels of ``test`` at full resolution, ``d`` true and ``p`` predicted: ``delta1``,
    ``delta2``, ``delta3``, the share with ``max(p/d, d/p) < 1.25^k`` (Eigen et al. 2014), and ``delta``, their mean,
    which RADIO reports; ``rmse`` in metres and ``abs_rel``, the mean of ``|p - d| / d``, both better when lower;
    ``si_delta`` and ``si_rmse``, the same after the best scale and shift of each image's prediction (least squares).

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
        train: a source with ``annotation(index).depth``, fitted on.
        val: the same; chooses the penalty.
        test: the same; measured.
    """

    lower_is_better = frozenset({"rmse", "abs_rel", "si_rmse"})

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
            raise ConfigError(f"evals.depth: ridge is a list of positive numbers; got {list(ridge)}")
        check_probe("depth", probe, layers, hidden, epochs, lr, batch)
        self.probe = probe
        self.size = size
        self.ridge = tuple(sorted(ridge, reverse=True))
        self.layers = layers
        self.training = Training(hidden=hidden, epochs=epochs, lr=lr, batch=batch, seed=seed)
        self.train = train
        self.val = val
        self.test = test

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        need_spatial(model, "depth")
        if self.probe == "dpt":
            return self._dpt(model, context)
        train, val, test = (
            load(model, options, self.size, "depth", context) for options in (self.train, self.val, self.test)
        )
        standard = Standard.of(train.features)
        targets = [cell_log_depth(depth, train.features.shape[-2:]) for depth in train.truth]
        y, w = (torch.cat(parts) for parts in zip(*targets, strict=True))
        limits = depth_limits(train.truth)
        context.report("depth probe")
        probes = fit_ridge(rows(standard(train.features)), y, w, self.ridge)
        scores = [
            measure(_linear(val, standard, probe, limits))["rmse"] if len(probes) > 1 else 0.0 for probe in probes
        ]
        return measure(_linear(test, standard, probes[scores.index(min(scores))], limits), test.names, context.records)

    def _dpt(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        seen, layers = layered(model, self.layers)
        train, test = (load(seen, options, self.size, "depth", context) for options in (self.train, self.test))
        low, high = depth_limits(train.truth)
        bins = torch.linspace(low, high, BINS)

        def loss(found: Tensor, depth: Tensor) -> Tensor | None:
            return depth_loss(from_bins(found, bins.to(found.device)), depth)

        head, standard = fit_dpt(train, layers, BINS, loss, self.training, "depth", device_of(model), context)
        found = predict(head, standard, test, self.training.batch)
        return measure(((from_bins(logits, bins), depth) for logits, depth in found), test.names, context.records)


def _linear(
    split: Labelled, standard: Standard, probe: tuple[Tensor, Tensor], limits: tuple[float, float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each image's predicted and true depth ``(H, W)``, metres."""
    low, high = (math.log(limit) for limit in limits)
    for log, depth in predictions(standard(split.features), *probe, split.truth):
        # clamp keeps NaN, which measure() refuses
        yield from zip(log[:, 0].clamp(low, high).exp(), depth, strict=True)


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
    pairs: Iterable[tuple[Tensor, Tensor]], names: Sequence[str] = (), records: Records | None = None
) -> dict[str, float]:
    """All metrics of predicted and true depth maps ``(H, W)``, metres.

    Args:
        pairs: prediction and truth of each image.
        names: of the images.
        records: receives the ``delta1`` of each image.

    Raises:
        ProbeError: there is no valid pixel, or a prediction is not finite.
    """
    plain, aligned = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    count, own = 0, []
    for found, depth in pairs:
        if not bool(torch.isfinite(found).all()):
            raise ProbeError("the depth probe diverged: a prediction is not finite")
        part, pixels = _sums(found, depth)
        own.append(float(part[0]) / pixels if pixels else math.nan)
        if pixels:
            plain, count = plain + part, count + pixels
            aligned += _sums(scaled(found, depth), depth)[0]
    if not count:
        raise ProbeError("no valid depth to measure on")
    if records is not None:
        seen = [i for i, value in enumerate(own) if not math.isnan(value)]
        records.add_images("delta1", [names[i] for i in seen], [own[i] for i in seen])
    deltas = (plain[:3] / count).tolist()
    return {
        **{f"delta{k}": value for k, value in enumerate(deltas, 1)},
        "delta": sum(deltas) / 3,
        "rmse": math.sqrt(float(plain[3]) / count),
        "abs_rel": float(plain[4]) / count,
        "si_delta": float(aligned[:3].mean()) / count,
        "si_rmse": math.sqrt(float(aligned[3]) / count),
    }


def _sums(found: Tensor, depth: Tensor) -> tuple[Tensor, int]:
    """Sums over valid pixels of ``[ratio < 1.25, < 1.25^2, < 1.25^3, squared, relative error]``, and their number."""
    sums, count = metrics(found, depth)
    valid = _valid(depth)
    p, d = found[valid].double(), depth[valid].double()
    ratio = torch.maximum(p / d, d / p)
    further = [(ratio < 1.25**k).sum().double() for k in (2, 3)]
    return torch.stack((sums[0], *further, sums[1], sums[2])), count


def scaled(found: Tensor, depth: Tensor) -> Tensor:
    """``a p + b`` with the scale and shift that fit the image's valid pixels best; at least 1e-6 metres."""
    valid = _valid(depth)
    p, d = found[valid].double(), depth[valid].double()
    variance = (p - p.mean()).square().mean()
    covariance = ((p - p.mean()) * (d - d.mean())).mean()
    scale = covariance / variance if float(variance) > 1e-12 else torch.zeros_like(variance)
    return (scale * (found.double() - p.mean()) + d.mean()).clamp_min(1e-6)


def from_bins(logits: Tensor, bins: Tensor) -> Tensor:
    """``(K, H, W)`` of a head to the expected depth ``(H, W)``: weights ``relu(x) + 0.1``, divided by their sum."""
    weights = logits.relu() + 0.1
    return (weights * bins[:, None, None]).sum(0) / weights.sum(0)


def depth_loss(found: Tensor, depth: Tensor) -> Tensor | None:
    """``10 SigLog(0.85) + 0.5 gradient`` of one image; None where it has no valid pixel.

    With ``g = log p - log d``: ``SigLog = sqrt(mean g^2 - 0.85 (mean g)^2)``; ``gradient`` is the mean of ``|dg|``
    between neighbours, summed over the map and three coarser samplings of it.
    """
    valid = _valid(depth)
    if not bool(valid.any()):
        return None
    g = torch.where(valid, found.clamp_min(1e-6).log() - torch.where(valid, depth, 1.0).log(), 0.0)
    known = g[valid]
    # Never below zero but for rounding; the root's slope at 0 is infinite.
    siglog = (known.square().mean() - 0.85 * known.mean().square()).clamp_min(1e-12).sqrt()
    gradient = g.new_zeros(())
    for step in (1, 2, 4, 8):
        part, seen = g[::step, ::step], valid[::step, ::step]
        down, right = seen[1:] & seen[:-1], seen[:, 1:] & seen[:, :-1]
        slopes = torch.cat(((part[1:] - part[:-1])[down], (part[:, 1:] - part[:, :-1])[right]))
        gradient = gradient + (slopes.abs().mean() if slopes.numel() else 0.0)
    return 10 * siglog + 0.5 * gradient


def _valid(depth: Tensor) -> Tensor:
    return torch.isfinite(depth) & (depth > 0)
