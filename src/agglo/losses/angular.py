"""Squared angle, normalised by the angular dispersion of the teacher."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from agglo import dist
from agglo.losses._reduce import Pointwise
from agglo.nn.linalg import unit

ENOUGH = 8
"""Fewest targets for a usable dispersion: fitting their mean direction makes it too small by 1/N."""

# Targets that `fit` converts to float64 at once.
_CHUNK = 8192

# Mean squared angle, in square radians, of equal directions with float32 rounding.
_CONSTANT = 1e-12


class Angular(Pointwise):
    """Squared angle over the teacher's dispersion, the summary loss of C-RADIOv4 (arXiv:2601.17237, eq. 3-7).

    In the paper's notation::

        L = Θ(x, y)² / Disp,    Θ(x, y) = arccos(x·y / |x||y|),    Disp = E[Θ(y, μ)²],    μ = E[y] / |E[y]|

    Teachers' summaries differ in angular spread; dividing by the dispersion gives their losses one scale (predicting
    the mean direction costs 1). The angle is computed as ``2 atan2(|x̂ - ŷ|, |x̂ + ŷ|)``, whose square, unlike that of
    arccos, has a finite gradient everywhere. A zero vector gets no gradient.

    Args:
        dispersion: divide by ``Disp``, estimated by :meth:`fit` before training; False gives square radians.
    """

    dispersion: Tensor

    def __init__(self, *, dispersion: bool = True) -> None:
        super().__init__()
        self.needs_statistics = dispersion
        self.register_buffer("dispersion", torch.tensor(0.0))  # 0: not fitted
        self._ready = False

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See the base class.

        Raises:
            RuntimeError: the dispersion was not fitted.
        """
        if self.needs_statistics:
            # Reading the buffer synchronises the device: once only.
            self._ready = self._ready or bool(self.dispersion > 0)
            if not self._ready:
                raise RuntimeError(
                    "the dispersion of the targets is not fitted: call fit(targets) first, or set `dispersion: false`"
                )
        squared = _angle(prediction, target).square()
        return squared / self.dispersion if self.needs_statistics else squared

    @torch.no_grad()
    def fit(self, targets: Tensor) -> None:
        """Estimate the dispersion from teacher summaries ``(N, D)`` of all ranks, in float64.

        Raises:
            ValueError: not ``(N, D)``, fewer than 2, not finite, or all of one direction.
        """
        if targets.ndim != 2 or 0 in targets.shape:
            raise ValueError(f"expected targets (N, D) with N and D positive, got {tuple(targets.shape)}")
        count = int(dist.total(torch.tensor(len(targets))))
        if count < 2:
            raise ValueError(
                f"a dispersion needs at least 2 targets and {ENOUGH} for a usable estimate, got {count}: raise "
                "`targets.estimate_images`"
            )
        if not bool(torch.isfinite(targets).all()):
            raise ValueError("the targets contain NaN or infinity: run the teacher in float32, or check its input")
        chunks = targets.detach().cpu().split(_CHUNK)
        mean = dist.total(torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0)[None]) / count
        squares = torch.stack([_angle(chunk.double(), mean).square().sum() for chunk in chunks]).sum()
        squared = float(dist.total(squares))
        if squared <= _CONSTANT * count:
            raise ValueError(
                f"all {count} targets have the same direction: check that the teacher's weights are "
                "loaded and that the images differ, or set `dispersion: false`"
            )
        if count < ENOUGH:
            warnings.warn(
                f"the dispersion was estimated from {count} targets and is about 1/{count} too small: use at least "
                f"{ENOUGH}, better hundreds; raise `targets.estimate_images`",
                stacklevel=2,
            )
        self.dispersion.fill_(squared / count)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """Angle in [0, π] between vectors along dim 1; π/2 to a zero vector, 0 between two of them."""
    x, y = unit(x), unit(y)
    difference = torch.linalg.vector_norm(x - y, dim=1)
    total = torch.linalg.vector_norm(x + y, dim=1)
    # torch's subgradient of a norm at 0 is 0, so an infinite gradient of atan2 has no effect.
    return 2 * torch.atan2(difference, total)
