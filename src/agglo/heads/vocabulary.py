"""A head of the same form as a ConSE teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agglo.heads.base import HasClassifier, HasVocabulary, Head
from agglo.types import ConfigError


class Vocabulary(Head):
    """``y = softmax(W x + b) T``: class logits, then the probability-weighted mean of fixed text embeddings.

    The teacher's own form (ConSE, Norouzi et al. 2013, arXiv:1312.5650): the student learns the classes, not the text
    space. When student and teacher share a class list, ``W, b`` start from the student's ImageNet classifier.

    Args:
        source: input channels.
        target: width of the text embeddings.
        classes: V, number of names in the teacher's vocabulary.
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
            return self._embed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._embed(x)

    def _embed(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(dim=-1).to(self.text.dtype) @ self.text

    def fold(self, matrix: Tensor, mean: Tensor) -> None:
        """Accept the identity only: the text matrix is the teacher's."""
        if not torch.equal(matrix, torch.eye(len(matrix)).to(matrix)) or mean.any():
            raise ValueError("a vocabulary head cannot be de-normalised: use `normalizer: {kind: identity}`")

    @torch.no_grad()
    def initialize(self, student: HasClassifier, teacher: HasVocabulary) -> None:
        """Copy the teacher's text matrix, and the student's classifier if it has the same size."""
        vocabulary = teacher.vocabulary()
        if vocabulary is None:
            raise ConfigError("a vocabulary head needs a teacher that has a vocabulary (kind conse)")
        if vocabulary.text.shape != self.text.shape:
            raise ConfigError(
                f"the teacher's vocabulary is {tuple(vocabulary.text.shape)}, the head's {tuple(self.text.shape)}: "
                f"set `classes: {len(vocabulary.names)}` in the head"
            )
        self.text.copy_(vocabulary.text)
        classifier = student.classifier()
        if classifier is not None and classifier[0].shape == self.logits.weight.shape:
            self.logits.weight.copy_(classifier[0])
            self.logits.bias.copy_(classifier[1])
