"""The contract of a loss between a head's prediction and a teacher's target."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Loss(nn.Module, ABC):
    """A scalar distance over the channel axis (dim 1), averaged over everything else.

    Attributes:
        needs_statistics: :meth:`fit` must be called with a sample of targets before training.
        counts_positions: :meth:`forward` is a mean over unmasked positions, which several processes must weight by
            their number (docs/method.md, D-13).
    """

    needs_statistics: bool = False
    counts_positions: bool = False

    @abstractmethod
    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float32 scalar; zero iff prediction equals target (up to what the loss ignores).

        Args:
            prediction: ``(B, D)`` or ``(B, D, H, W)``.
            target: the same shape; no gradient flows into it.
            mask: ``(B, 1)`` or ``(B, 1, H, W)``, False where a position is left out. All False gives 0.

        Raises:
            ValueError: the shapes differ.
        """

    def by_image(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float32 ``(B,)``: the loss of each image; 0 for one that is masked entirely.

        The default calls :meth:`forward` per image, which is correct for kinds that do not relate images.

        Args:
            prediction, target, mask: as in :meth:`forward`.
        """
        rows = [slice(index, index + 1) for index in range(len(prediction))]
        return torch.stack([self(prediction[r], target[r], None if mask is None else mask[r]) for r in rows])

    def fit(self, targets: Tensor) -> None:
        """Estimate statistics of the targets from a sample ``(N, D)``.

        Raises:
            ValueError: the sample is too small, constant or not finite.
        """
