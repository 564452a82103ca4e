"""The contract of a head: maps student features to one teacher's feature space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import Tensor, nn


class HasClassifier(Protocol):
    """The part of a student that heads start from."""

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """``(weight (classes, D), bias (classes,))`` of the initial weights' classifier, if any."""


class HasVocabulary(Protocol):
    """The part of a teacher that heads start from."""

    def vocabulary(self) -> Any:
        """Class names and their text embeddings, ``.names`` and ``.text (V, D)``, or None."""


class Head(nn.Module, ABC):
    """Maps ``source`` channels to ``target`` channels, of vectors and of maps.

    A kind's constructor takes ``source`` and ``target`` positionally.

    Attributes:
        follows_student: trained with the student's learning rate instead of the heads', because it starts from
            pretrained weights.
    """

    follows_student: bool = False

    source: int
    target: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``(B, source)`` to ``(B, target)``, or ``(B, source, H, W)`` to ``(B, target, H, W)``."""

    @abstractmethod
    def fold(self, matrix: Tensor, mean: Tensor) -> None:
        """Fold the de-normalisation ``y = matrix @ y_hat + mean`` into the head, in place (docs/method.md, 2.2).

        Args:
            matrix: ``(target, target)`` de-normalizer.
            mean: ``(target,)``.

        Raises:
            ValueError: this kind's last layer is not linear.
        """

    def initialize(self, student: HasClassifier, teacher: HasVocabulary) -> None:
        """Start from the student's classifier and the teacher's vocabulary. Called once, before training."""
