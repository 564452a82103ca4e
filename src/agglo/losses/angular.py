"""Squared angle, balanced by the angular dispersion of the teacher."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from agglo import dist
from agglo.losses._reduce import Pointwise
from agglo.nn.linalg import unit

ENOUGH = 8
"""Targets from which on a dispersion is believed: their mean direction is fitted to them, which takes 1/N of it."""

# Targets that are taken to float64 at once by `fit`.
_CHUNK = 8192

# Mean squared angle, in square radians, that float32 rounding alone may make of one direction.
_CONSTANT = 1e-12


class Angular(Pointwise):
    """Squared angle over the teacher's dispersion, the summary loss of C-RADIOv4 (arXiv:2601.17237, eq. 3-7).

    In the paper's letters::

        L = Θ(x, y)² / Disp,    Θ(x, y) = arccos(x·y / |x||y|),    Disp = E[Θ(y, μ)²],    μ = E[y] / |E[y]|

    Teachers differ in how wide a cone their summaries fill; dividing by the dispersion puts their losses on one scale
    (predicting the mean direction costs 1). The angle is taken as ``2 atan2(|x̂ - ŷ|, |x̂ + ŷ|)``, whose square has a
    finite gradient everywhere, where arccos has not. A zero vector has no direction: it gets no gradient.

    Args:
        dispersion: divide by ``Disp``, which :meth:`fit` estimates before training; False gives the squared angle in
            square radians.
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
            RuntimeError: the dispersion is wanted and was not fitted.
        """
        if self.needs_statistics:
            # Reading the buffer waits for the device; once is enough.
            self._ready = self._ready or bool(self.dispersion > 0)
            if not self._ready:
                raise RuntimeError(
                    "the angular loss does not know the dispersion of its targets: call fit(targets) first, or set "
                    "`dispersion: false`"
                )
        squared = _angle(prediction, target).square()
        return squared / self.dispersion if self.needs_statistics else squared

    @torch.no_grad()
    def fit(self, targets: Tensor) -> None:
        """Set the dispersion from raw teacher summaries ``(N, D)``, in float64, mean direction first.

        Where several processes train, those of all of them count.

        Raises:
            ValueError: not ``(N, D)``, fewer than 2, not finite, or all of one direction.
        """
        if targets.ndim != 2 or 0 in targets.shape:
            raise ValueError(f"expected targets (N, D) with N and D positive, got {tuple(targets.shape)}")
        count = int(dist.total(torch.tensor(len(targets))))
        if count < 2:
            raise ValueError(
                f"a dispersion needs at least 2 targets, {ENOUGH} to mean something and hundreds to be exact, got "
                f"{count}: raise `targets.estimate_images`"
            )
        if not bool(torch.isfinite(targets).all()):
            raise ValueError("the targets hold NaN or infinity: run the teacher in float32 or look at its input")
        chunks = targets.detach().cpu().split(_CHUNK)
        mean = dist.total(torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0)[None]) / count
        squares = torch.stack([_angle(chunk.double(), mean).square().sum() for chunk in chunks]).sum()
        squared = float(dist.total(squares))
        if squared <= _CONSTANT * count:
            raise ValueError(
                f"all {count} targets point the same way, so their dispersion is 0: check that the teacher's "
                "weights are loaded and that the images differ, or set `dispersion: false`"
            )
        if count < ENOUGH:
            warnings.warn(
                f"the dispersion was estimated from {count} targets and is about 1/{count} too small: at "
                f"least {ENOUGH} are needed, hundreds are better; raise `targets.estimate_images`",
                stacklevel=2,
            )
        self.dispersion.fill_(squared / count)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False


def _angle(x: Tensor, y: Tensor) -> Tensor:
    """Angle in [0, π] between vectors along dim 1; π/2 to a zero vector, 0 between two of them."""
    x, y = unit(x), unit(y)
    apart = torch.linalg.vector_norm(x - y, dim=1)
    along = torch.linalg.vector_norm(x + y, dim=1)
    # Where a norm is 0 its gradient is 0 (torch's choice among the subgradients), whatever atan2 sends into it.
    return 2 * torch.atan2(apart, along)
