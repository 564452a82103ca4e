"""A head with the form of a ConSE teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from agglo.heads.base import Head
from agglo.types import ConfigError

if TYPE_CHECKING:
    from agglo.students.base import Student
    from agglo.teachers.base import Teacher


class Vocabulary(Head):
    """``y = softmax(W x + b) T``: class logits, then the probability-weighted mean of fixed text embeddings.

    The teacher's own form (ConSE, Norouzi et al. 2013, arXiv 1312.5650): the student need not invent the text space, it
    only has to know the classes. When student and teacher share a class list, ``W, b`` start from the student's own
    ImageNet classifier.

    Args:
        source: input channels.
        target: width of the text embeddings.
        classes: V, how many names the teacher's vocabulary holds.
    """

    follows_student = True
    text: Tensor

    def __init__(self, source: int, target: int, /, *, classes: int = 1000) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.logits = nn.Linear(source, classes)
        self.register_buffer("text", torch.zeros(classes, target))

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Head.forward`."""
        if x.ndim == 4:
            return self._answer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._answer(x)

    def _answer(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(dim=-1).to(self.text.dtype) @ self.text

    def fold(self, matrix: Tensor, mean: Tensor) -> None:
        """Only the identity can be folded: the text matrix is the teacher's own."""
        if not torch.equal(matrix, torch.eye(len(matrix)).to(matrix)) or mean.any():
            raise ValueError("a vocabulary head answers in the teacher's space already: use the identity normalizer")

    @torch.no_grad()
    def initialize(self, student: Student, teacher: Teacher) -> None:
        """Take the teacher's text matrix, and the student's classifier where it has one of the same size."""
        vocabulary = teacher.vocabulary()
        if vocabulary is None:
            raise ConfigError("a vocabulary head needs a text-aligned teacher that has a vocabulary (kind conse)")
        if vocabulary.text.shape != self.text.shape:
            raise ConfigError(
                f"the teacher's vocabulary is {tuple(vocabulary.text.shape)}, the head's {tuple(self.text.shape)}: "
                f"set `classes: {len(vocabulary.names)}` in the head"
            )
        self.text.copy_(vocabulary.text)
        known = student.classifier()
        if known is not None and known[0].shape == self.logits.weight.shape:
            self.logits.weight.copy_(known[0])
            self.logits.bias.copy_(known[1])
