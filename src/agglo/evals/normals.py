"""Surface normals by a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._dense import DenseProbe, DptTask
from agglo.evals.base import ProbeError, Records
from agglo.nn.geometry import resample

THRESHOLDS = (11.25, 22.5, 30.0)


class Normals(DenseProbe):
    """Surface normals by a probe on frozen spatial features: linear, or the DPT head of Probe3d (arXiv:2404.08636).

    ``probe: linear`` is ridge regression of the unit normal per cell, in closed form, as in ``depth``: a cell's target
    is the mean normal of its valid pixels, its weight their share (a pixel is valid when its normal is finite and of
    length 1 ± 0.1); ``ridge`` minimises the mean angle on ``val``; predictions are upsampled bilinearly and normalised.

    ``probe: dpt`` reads ``layers`` blocks through the DPT head of ``depth`` with four outputs, the normal and its
    concentration kappa, trained on the negative log likelihood of the angle ``t`` between prediction and truth,
    ``kappa t - log(kappa^2 + 1) + log(1 + exp(-kappa pi))`` (Bae et al. 2021, arXiv:2109.09881). ``val`` is not used.

    Metrics, over all valid pixels of ``test``: ``within_11``, ``within_22``, ``within_30``, the share of pixels with an
    error below 11.25, 22.5 and 30 degrees; ``recall``, the mean of the three, which RADIO reports; ``mean_angle``,
    ``median_angle`` and ``rms_angle`` in degrees, lower is better.

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
        train: a source with ``annotation(index).normals`` ``(3, H, W)``, for fitting.
        val: the same; chooses the penalty.
        test: the same; measured.
    """

    kind = "normals"
    chooser = "mean_angle"
    lower_is_better = frozenset({"mean_angle", "median_angle", "rms_angle"})

    def cells(self, truth: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        return cell_normals(truth, grid)

    def ridge_decoder(self, truth: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda found: found  # measure() takes vectors of any length

    def dpt_task(self, truth: Sequence[Tensor]) -> DptTask:
        return DptTask(4, normal_loss, lambda found: found[:3])

    def score(
        self, pairs: Iterable[tuple[Tensor, Tensor]], names: Sequence[str] = (), records: Records | None = None
    ) -> dict[str, float]:
        return measure(pairs, names, records)


def cell_normals(normals: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean normal ``(h*w, 3)`` of the valid pixels of each cell, and their share ``(h*w,)``, from ``(3, H, W)``."""
    valid = _valid(normals)
    both = torch.cat((torch.where(valid, normals, 0.0), valid.to(normals)[None]))[None]
    found = resample(both, (grid[0], grid[1]))[0].flatten(1)
    total, share = found[:3], found[3]
    return torch.where(share > 0, total / share.clamp_min(1e-12), 0.0).T, share


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Radians between vectors along axis 0, accurate at 0 and at pi, in the inputs' dtype."""
    a, b = a / _length(a), b / _length(b)
    # Not acos: its gradient at angle 0 is infinite.
    return 2 * torch.atan2(_length(a - b), _length(a + b))


def _length(x: Tensor) -> Tensor:
    """Norm along axis 0 with gradient 0 at 0."""
    return x.square().sum(0).clamp_min(1e-24).sqrt()


def normal_loss(found: Tensor, normals: Tensor) -> Tensor | None:
    """Negative log likelihood of one image's normals (Bae et al. 2021); None without a valid pixel.

    Args:
        found: ``(4, H, W)``, the normal and x of kappa ``elu(x) + 1.01``.
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
    """Metrics of :class:`Normals` from predicted and true normals ``(3, H, W)``.

    Args:
        pairs: prediction, a vector of any length, and ground truth of each image.
        names: of the images.
        records: receives the ``recall`` of each image.

    Raises:
        ProbeError: no valid pixel, or a prediction is not finite.
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
