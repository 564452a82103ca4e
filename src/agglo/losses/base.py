"""The contract of a loss between a head's prediction and a teacher's target."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Loss(nn.Module, ABC):
    """A scalar distance over the channel axis (dim 1), averaged over everything else.

    Attributes:
        needs_statistics: :meth:`fit` must see a sample of targets before training.
        counts_positions: :meth:`forward` is the mean over the positions that count. Where several processes train, such
            means are then weighed by how many each has seen (docs/method.md, D-13); others are averaged as they are.
    """

    needs_statistics: bool = False
    counts_positions: bool = False

    @abstractmethod
    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float32 scalar; zero iff prediction equals target (up to what the loss ignores).

        Args:
            prediction: ``(B, D)`` or ``(B, D, H, W)``.
            target: the same shape; no gradient flows into it.
            mask: ``(B, 1)`` or ``(B, 1, H, W)``, True where the position counts. All False gives 0, never NaN.

        Raises:
            ValueError: the shapes differ.
        """

    def by_image(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Float32 ``(B,)``: the loss of each image, its own positions averaged; 0 for one of which nothing counts.

        Their mean is :meth:`forward` where every image has as many positions that count. The default asks
        :meth:`forward` for one image at a time, which is right for kinds that compare no image with another.

        Args:
            prediction, target, mask: as in :meth:`forward`.
        """
        rows = [slice(index, index + 1) for index in range(len(prediction))]
        return torch.stack([self(prediction[r], target[r], None if mask is None else mask[r]) for r in rows])

    def fit(self, targets: Tensor) -> None:
        """Estimate what the loss must know of the targets' distribution from ``(N, D)`` of them.

        Raises:
            ValueError: they are too few, constant, or not finite; says what to do.
        """
