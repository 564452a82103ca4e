"""The contract of a head: from a student's features to one teacher's space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from agglo.students.base import Student
    from agglo.teachers.base import Teacher


class Head(nn.Module, ABC):
    """Maps ``source`` channels to ``target`` channels, for vectors or for maps alike.

    A kind's constructor takes ``source`` and ``target`` positionally.

    Attributes:
        follows_student: learns at the student's rate instead of the heads', because it starts from weights as good as
            the student's own.
    """

    follows_student: bool = False

    source: int
    target: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``(B, source)`` to ``(B, target)``, or ``(B, source, H, W)`` to ``(B, target, H, W)``."""

    @abstractmethod
    def fold(self, matrix: Tensor, mean: Tensor) -> None:
        """Make the head answer in the teacher's own space (METHOD 2.2): ``y = matrix @ y_hat + mean``, in place.

        Args:
            matrix: ``(target, target)`` de-normalizer.
            mean: ``(target,)``.

        Raises:
            ValueError: this kind's last step is not linear, so nothing can be folded into it.
        """

    def initialize(self, student: Student, teacher: Teacher) -> None:
        """Start from what student and teacher know (a classifier, a vocabulary). Called once, before training."""
