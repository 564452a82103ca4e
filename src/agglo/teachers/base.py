"""The contract of a teacher: a frozen model whose features the student learns to predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from agglo.types import Features, FeatureSpec


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The named classes behind a text-aligned teacher.

    Args:
        names: V class names.
        text: ``(V, D)`` unit-norm text embeddings of the names.
    """

    names: tuple[str, ...]
    text: Tensor


class Teacher(nn.Module, ABC):
    """A frozen model. It conditions its own input, and stays in eval mode whatever its parent is put in.

    Attributes:
        spec: what :meth:`forward` returns. ``spec.summary is None``: no summary loss. ``spec.spatial is None``: no
            spatial loss.
        licence: licence of the weights, for the cards of the students that learn from them.
    """

    spec: FeatureSpec
    licence: str = ""

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1]; the teacher normalises them itself."""

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode: batch statistics and dropout of a teacher are never those of training."""
        del mode
        return super().train(False)

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """The ``(H, W)`` at which this teacher should see a view of ``size`` of a student with ``stride``.

        The default shows it the student's own size, snapped to the teacher's step.
        """
        del stride
        step = self.spec.step
        return max(step, round(size[0] / step) * step), max(step, round(size[1] / step) * step)

    def vocabulary(self) -> Vocabulary | None:
        """The classes behind a text-aligned summary, if this teacher has them."""
        return None

    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit-norm ``(N, D)`` embeddings comparable with the summary.

        Raises:
            TypeError: this teacher is not text-aligned.
        """
        raise TypeError(f"{type(self).__name__} has no text tower: zero-shot and search need a text-aligned teacher")
