"""The contract of a student: one encoder that learns from several teachers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from agglo.types import Features, FeatureSpec


class Student(nn.Module, ABC):
    """An image encoder to be trained.

    A kind's constructor takes ``tokens`` positionally: one class token is wanted for each of these teacher names.
    A student that cannot hold several (a ConvNet) sets ``spec.slots == 1``, and every head reads the one summary.

    Attributes:
        mean, std: per-channel constants of the input conditioner that belongs before this student.
        spec: what :meth:`forward` returns.
    """

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    spec: FeatureSpec

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Encode conditioned images ``(B, 3, H, W)``.

        Returns:
            ``summary (B, slots * D)``, slots in the order of ``tokens``; ``spatial (B, D', H / stride, W / stride)``.

        Raises:
            ValueError: a side is no multiple of ``spec.step``; the message names the nearest legal sizes.
        """

    def initialize(self) -> None:
        """Load the weights training starts from, if the recipe names some. Never called when a model is loaded."""

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """``(weight (classes, D), bias (classes,))`` of the classifier that came with the initial weights, if any."""
        return None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone, besides biases and norms."""
        return set()
