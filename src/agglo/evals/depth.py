"""Monocular depth by a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from agglo.evals._dense import DenseProbe, DptTask
from agglo.evals.base import ProbeError, Records
from agglo.nn.geometry import resample

BINS = 256


class Depth(DenseProbe):
    """Depth by a probe on frozen spatial features: linear, or the DPT head of Probe3d (arXiv:2404.08636).

    ``probe: linear`` is ridge regression of log depth per cell, in closed form:

    - features are standardised per channel by the training cells' mean and standard deviation;
    - a cell's target ``y`` is the mean log depth (metres) of its valid pixels, its weight ``w`` their share; a pixel is
      valid when its depth is finite and positive;
    - ``W, b = argmin sum_i w_i (W x_i + b - y_i)^2 / sum_i w_i + ridge ||W||^2``, solved exactly in float64;
    - ``ridge`` minimises the RMSE on ``val``; ties: the stronger;
    - predicted log depth is upsampled bilinearly to the depth map, exponentiated, and clamped to half the minimum and
      twice the maximum training depth.

    ``probe: dpt`` reads the standardised maps of ``layers`` blocks, final norm applied (the last map alone for a model
    without accessible blocks), through a DPT head with 256 evenly spaced depth bins, trained by AdamW on
    ``10 SigLog(0.85) + 0.5 gradient`` with warm-up and a cosine to zero, without augmentation. ``val`` is not used, and
    the same seed gives the same numbers.

    Metrics, over all valid pixels of ``test`` at full resolution, with true depth ``d`` and prediction ``p``:

    - ``delta1``, ``delta2``, ``delta3``: share with ``max(p/d, d/p) < 1.25^k`` (Eigen et al. 2014, arXiv:1406.2283);
      ``delta``: their mean, which RADIO reports;
    - ``rmse`` in metres and ``abs_rel``, the mean of ``|p - d| / d``; lower is better;
    - ``si_delta`` and ``si_rmse``: ``delta`` and ``rmse`` after the least-squares scale and shift of each prediction.

    Args:
        probe: ``linear`` or ``dpt``.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        ridge: candidate penalties of the linear probe.
        layers: number of blocks that the DPT probe reads.
        hidden: channels of the DPT head.
        epochs: of the DPT training.
        lr: peak learning rate.
        batch: images per step.
        seed: of the DPT head's initial weights and the order of its images.
        train: a source with ``annotation(index).depth``, for fitting.
        val: the same; chooses the penalty.
        test: the same; measured.
    """

    kind = "depth"
    chooser = "rmse"
    lower_is_better = frozenset({"rmse", "abs_rel", "si_rmse"})

    def cells(self, truth: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        return cell_log_depth(truth, grid)

    def ridge_decoder(self, truth: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        low, high = (math.log(limit) for limit in depth_limits(truth))
        return lambda log: log[:, 0].clamp(low, high).exp()  # clamp keeps NaN, which measure() refuses

    def dpt_task(self, truth: Sequence[Tensor]) -> DptTask:
        bins = torch.linspace(*depth_limits(truth), BINS)
        return DptTask(
            BINS,
            lambda found, depth: depth_loss(from_bins(found, bins.to(found.device)), depth),
            lambda found: from_bins(found, bins),
        )

    def score(
        self, pairs: Iterable[tuple[Tensor, Tensor]], names: Sequence[str] = (), records: Records | None = None
    ) -> dict[str, float]:
        return measure(pairs, names, records)


def cell_log_depth(depth: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean log depth of the valid pixels of each cell, and their share: two ``(h*w,)`` from metres ``(H, W)``."""
    valid = _valid(depth)
    log = torch.where(valid, depth, torch.ones_like(depth)).log()
    both = torch.stack((log * valid, valid.to(log)))[None]
    total, share = resample(both, (grid[0], grid[1]))[0].flatten(1)
    return torch.where(share > 0, total / share.clamp_min(1e-12), torch.zeros_like(total)), share


def depth_limits(truth: Sequence[Tensor]) -> tuple[float, float]:
    """Half the minimum and twice the maximum valid depth, metres.

    Raises:
        ProbeError: no valid pixel.
    """
    valid = torch.cat([depth[_valid(depth)] for depth in truth])
    if not valid.numel():
        raise ProbeError("the training split has no valid depth: nothing to fit a probe on")
    return float(valid.min()) / 2, float(valid.max()) * 2


def metrics(found: Tensor, depth: Tensor) -> tuple[Tensor, int]:
    """Sums over valid pixels, float64, and their number.

    The sums are of ``max(p/d, d/p) < 1.25``, ``< 1.25^2``, ``< 1.25^3``, squared error and relative error.
    """
    valid = _valid(depth)
    p, d = found[valid].double(), depth[valid].double()
    ratio, error = torch.maximum(p / d, d / p), p - d
    deltas = [(ratio < 1.25**k).sum().double() for k in (1, 2, 3)]
    return torch.stack((*deltas, error.square().sum(), (error.abs() / d).sum())), int(valid.sum())


def measure(
    pairs: Iterable[tuple[Tensor, Tensor]], names: Sequence[str] = (), records: Records | None = None
) -> dict[str, float]:
    """Metrics of :class:`Depth` from predicted and true depth maps ``(H, W)``, metres.

    Args:
        pairs: prediction and ground truth of each image.
        names: of the images.
        records: receives the ``delta1`` of each image.

    Raises:
        ProbeError: no valid pixel, or a prediction is not finite.
    """
    plain, aligned = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    count, own = 0, []
    for found, depth in pairs:
        if not bool(torch.isfinite(found).all()):
            raise ProbeError("the depth probe diverged: a prediction is not finite")
        part, pixels = metrics(found, depth)
        own.append(float(part[0]) / pixels if pixels else math.nan)
        if pixels:
            plain, count = plain + part, count + pixels
            aligned += metrics(scaled(found, depth), depth)[0]
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


def scaled(found: Tensor, depth: Tensor) -> Tensor:
    """``a p + b`` with the least-squares scale and shift over the image's valid pixels; at least 1e-6 metres."""
    valid = _valid(depth)
    p, d = found[valid].double(), depth[valid].double()
    variance = (p - p.mean()).square().mean()
    covariance = ((p - p.mean()) * (d - d.mean())).mean()
    scale = covariance / variance if float(variance) > 1e-12 else torch.zeros_like(variance)
    return (scale * (found.double() - p.mean()) + d.mean()).clamp_min(1e-6)


def from_bins(logits: Tensor, bins: Tensor) -> Tensor:
    """Expected depth ``(H, W)`` of logits ``(K, H, W)``: bins weighted by ``relu(x) + 0.1``, normalised."""
    weights = logits.relu() + 0.1
    return (weights * bins[:, None, None]).sum(0) / weights.sum(0)


def depth_loss(found: Tensor, depth: Tensor) -> Tensor | None:
    """``10 SigLog(0.85) + 0.5 gradient`` of one image; None without a valid pixel.

    With ``g = log p - log d``: ``SigLog = sqrt(mean g^2 - 0.85 (mean g)^2)``; ``gradient`` is the mean of ``|dg|``
    between neighbouring pixels, summed over the map subsampled by 1, 2, 4 and 8.
    """
    valid = _valid(depth)
    if not bool(valid.any()):
        return None
    g = torch.where(valid, found.clamp_min(1e-6).log() - torch.where(valid, depth, 1.0).log(), 0.0)
    known = g[valid]
    # Below zero by rounding only; the gradient of the root at 0 is infinite.
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
