"""Base of the affine normalizers: buffers, statistics, forward and inverse."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from agglo import dist
from agglo.nn.linalg import Moments
from agglo.normalizers.base import Normalizer

# Ratio of mean variance to mean squared mean below which features count as constant (float32 eps² = 1.4e-14).
_CONSTANT = 1e-13


class AffineNormalizer(Normalizer):
    """Collects :class:`Moments`, from which a kind's :meth:`solve` computes ``(whiten, unwhiten)``."""

    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor
    frozen: Tensor

    def __init__(self, channels: int, /) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be positive, got {channels}")
        self.channels = channels
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("whiten", torch.eye(channels))
        self.register_buffer("unwhiten", torch.eye(channels))
        self.register_buffer("frozen", torch.tensor(False))
        self._moments: Moments | None = None
        self._ready = False

    @abstractmethod
    def solve(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """``(whiten, unwhiten)``, float64 ``(C, C)`` on the CPU, from the non-zero scatter around ``centre``."""

    def centre(self, mean: Tensor) -> Tensor:
        """Subtracted before ``whiten``, ``(C,)``; by default the mean of each channel."""
        return mean

    def check_count(self, count: int) -> None:
        """Raise a ValueError or warn if ``count >= 2`` positions are too few for this kind."""

    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """See the base class.

        Raises:
            RuntimeError: frozen already.
            ValueError: wrong shapes, or an unmasked position is not finite.
        """
        if self._is_frozen():
            raise RuntimeError("this normalizer is frozen: build a new one for other statistics")
        self._check(features)
        rows = features.detach().movedim(1, -1)
        if mask is not None:
            if mask.shape != (features.shape[0], 1, *features.shape[2:]):
                raise ValueError(
                    f"mask {tuple(mask.shape)} does not fit features {tuple(features.shape)}: it must be (B, 1, H, W)"
                )
            rows = rows[mask[:, 0].bool()]
        if self._moments is None:
            self._moments = Moments(self.channels)
        self._moments.update(rows.reshape(-1, self.channels))

    def freeze(self) -> None:
        """See the base class.

        Raises:
            RuntimeError: frozen already, or fewer than two positions.
            ValueError: the features are constant, or there are too few positions for this kind.
        """
        if self._is_frozen():
            raise RuntimeError("this normalizer is frozen already")
        moments = self._moments
        if moments is None or moments.count < 2:
            raise RuntimeError("no statistics yet: call update() on batches of teacher features before freeze()")
        moments.all_reduce()
        mean, covariance = moments.mean.cpu(), moments.covariance().cpu()
        if covariance.diagonal().mean() <= _CONSTANT * mean.square().mean():
            raise ValueError(
                f"the teacher's features are equal at all {moments.count} positions: check that its weights are loaded "
                "and that the images differ, or set `normalizer: {kind: identity}`"
            )
        self.check_count(moments.count)
        if dist.is_main():  # eigen-solvers differ between machines
            centre = self.centre(mean)
            offset = mean - centre
            whiten, unwhiten = self.solve(covariance + torch.outer(offset, offset))
            self.mean.copy_(centre)
            self.whiten.copy_(whiten)
            self.unwhiten.copy_(unwhiten)
            self.frozen.fill_(True)
        dist.broadcast(self)
        self._moments = None

    def forward(self, features: Tensor) -> Tensor:
        self._check_map(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.multiply(self.whiten, features.float() - self.mean.view(-1, 1, 1))

    def inverse(self, features: Tensor) -> Tensor:
        """See the base class; float32.

        Raises:
            RuntimeError: not frozen yet.
        """
        self._check_map(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.multiply(self.unwhiten, features.float()) + self.mean.view(-1, 1, 1)

    def multiply(self, matrix: Tensor, features: Tensor) -> Tensor:
        """``matrix (C, C)`` times the channel vector at each position of ``(B, C, H, W)``."""
        return torch.matmul(matrix, features.flatten(2)).view_as(features)

    def _check(self, features: Tensor) -> None:
        if features.ndim != 4 or features.shape[1] != self.channels:
            raise ValueError(f"expected features (B, {self.channels}, H, W), got {tuple(features.shape)}")

    def _check_map(self, features: Tensor) -> None:
        self._check(features)
        if not self._is_frozen():
            raise RuntimeError("this normalizer is not frozen: call update() on teacher features, then freeze()")

    def _is_frozen(self) -> bool:
        # Reading the buffer synchronises the device; a True never changes back.
        self._ready = self._ready or bool(self.frozen)
        return self._ready

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False
