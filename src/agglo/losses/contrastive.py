"""Contrastive distillation: similarities within a batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from agglo.losses._reduce import Relation, check_positions
from agglo.nn.linalg import unit

Targets = Literal["soft", "hard"]


class Contrastive(Relation):
    """Cross-entropy between student-teacher similarities and their targets within a batch (docs/method.md, 10b).

    With x, y the L2-normalised vectors of student and teacher and ``q_i = softmax_j(x_i·y_j / temperature)``::

        soft:  L = mean_i KL(p_i || q_i),   p_i = softmax_j(y_i·y_j / teacher_temperature)
        hard:  L = mean_i -log q_ii                          (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748)

    Hard targets separate images that the teacher finds similar; soft ones (SEED, Fang et al. 2021, arXiv:2101.04731,
    without its queue) do not. With equal temperatures the soft loss is 0 at the target; the minimum of the hard loss is
    above 0 and not at the target. Vectors are the summaries of this rank's batch, or the positions of one image.

    Args:
        targets: ``soft`` or ``hard``.
        temperature: of the student's distribution; positive.
        teacher_temperature: of the soft targets; the student's when None.
        tokens: largest number of positions compared per map.

    Raises:
        ValueError: a temperature is not positive, or fewer than 2 tokens.
    """

    def __init__(
        self,
        *,
        targets: Targets = "soft",
        temperature: float = 0.07,
        teacher_temperature: float | None = None,
        tokens: int = 256,
    ) -> None:
        super().__init__()
        self.targets, self.temperature = targets, temperature
        self.teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        for name in ("temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        self.tokens = check_positions(tokens)

    def relate(self, x: Tensor, y: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence per member ``(G, N)``; 0 for a single vector."""
        x, y = unit(x, dim=2), unit(y, dim=2)
        student = _log_softmax(x @ y.mT / self.temperature, valid)
        if self.targets == "hard":
            return -student.diagonal(dim1=1, dim2=2), valid
        teacher = _log_softmax(y @ y.mT / self.teacher_temperature, valid)
        return (teacher.exp() * (teacher - student)).sum(2), valid


def _log_softmax(logits: Tensor, valid: Tensor) -> Tensor:
    """Log-softmax over the valid members; about -1e9, and finite, at the others."""
    return torch.where(valid[:, None, :], logits, -1e9).log_softmax(2)
