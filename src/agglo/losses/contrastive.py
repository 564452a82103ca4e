"""Contrastive distillation: which of the batch a sample is like."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from agglo.losses._reduce import Relation, check_positions
from agglo.nn.linalg import unit

Targets = Literal["soft", "hard"]


class Contrastive(Relation):
    """Cross-entropy of the student's similarities to the teacher's vectors of the batch (docs/method.md, 10b).

    With x, y the L2-normalised vectors of student and teacher and ``q_i = softmax_j(x_i·y_j / temperature)``::

        soft:  L = mean_i KL(p_i || q_i),   p_i = softmax_j(y_i·y_j / teacher_temperature)
        hard:  L = mean_i -log q_ii                          (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748)

    A batch holds near-duplicates for the teacher, which hard targets push apart and soft ones (as in SEED, Fang et al.
    2021, arXiv:2101.04731, without its queue) do not. With equal temperatures the soft loss is 0 at the target. Hard
    targets are the limit of a small teacher temperature; they have a floor above 0, which is not at the target.

    The vectors are the summaries of this device's batch, or the positions of one image.

    Args:
        targets: ``soft`` or ``hard``.
        temperature: of the student's distribution; positive.
        teacher_temperature: of the teacher's soft targets; as the student's when None.
        tokens: positions of a map that are compared, drawn where there are more.

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
        """A divergence a member ``(G, N)``; 0 for a single vector, which has nothing to be told from."""
        x, y = unit(x, dim=2), unit(y, dim=2)
        student = _log_softmax(x @ y.mT / self.temperature, valid)
        if self.targets == "hard":
            return -student.diagonal(dim1=1, dim2=2), valid
        teacher = _log_softmax(y @ y.mT / self.teacher_temperature, valid)
        return (teacher.exp() * (teacher - student)).sum(2), valid


def _log_softmax(logits: Tensor, valid: Tensor) -> Tensor:
    """Over the members that count; about -1e9 at the others, finite everywhere."""
    return torch.where(valid[:, None, :], logits, -1e9).log_softmax(2)
