"""What every affine normalizer shares: its buffers, the pre-pass, and the two directions of the map."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from agglo import dist
from agglo.nn.linalg import Moments
from agglo.normalizers.base import Normalizer

# Mean variance over mean squared mean below which features are constant up to float32 rounding (eps² = 1.4e-14).
_CONSTANT = 1e-13


class AffineNormalizer(Normalizer):
    """Statistics by :class:`Moments`, turned into ``(whiten, unwhiten)`` by a kind's :meth:`solve`."""

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
        """``(whiten, unwhiten)``, float64 ``(C, C)`` on the CPU, from the scatter around ``centre``, never all 0."""

    def centre(self, mean: Tensor) -> Tensor:
        """What is subtracted before ``whiten``, ``(C,)``; the mean of each channel unless a kind says otherwise."""
        return mean

    def check_count(self, count: int) -> None:
        """Raise ValueError or warn where ``count >= 2`` positions are too few for this kind, naming the next move."""

    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """See the base class.

        Raises:
            RuntimeError: frozen already.
            ValueError: wrong shapes, or a counted position is not finite.
        """
        if self._is_frozen():
            raise RuntimeError("this normalizer is frozen: build a new one to estimate other statistics")
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
            RuntimeError: frozen already, or fewer than two positions were seen.
            ValueError: the features do not vary at all, or too few positions were seen for this kind.
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
                f"the teacher's features are the same at all {moments.count} positions, so they have no scale: check "
                "that its weights are loaded and that the images differ, or set `normalizer: {kind: identity}`"
            )
        self.check_count(moments.count)
        if dist.is_main():  # eigen-solvers differ between machines, and one is enough
            centre = self.centre(mean)
            apart = mean - centre
            whiten, unwhiten = self.solve(covariance + torch.outer(apart, apart))
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
            raise RuntimeError("this normalizer is not frozen: update() it on teacher features, then freeze()")

    def _is_frozen(self) -> bool:
        # Reading the buffer waits for the device; a normalizer is never thawed, so one True is enough.
        self._ready = self._ready or bool(self.frozen)
        return self._ready

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False
