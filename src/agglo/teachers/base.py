"""The contract of a teacher: a frozen model whose features the student learns to predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from agglo.config import check_options, find
from agglo.teachers._sizes import snap
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
        patch: side of a token in pixels of the teacher's input; None for teachers that have no tokens of one scale
            (pyramids, histograms, pooled vectors), which see a view at the student's own size.
        native: side in pixels of the square images its weights were made for, or None where nobody says.
        canvas: side in pixels of the square canvas on which it sees every view, whatever the student sees; None for
            teachers that follow the student.
        fill: the RGB colour in [0, 1] that its normalisation turns into zero: what empty canvas is painted with.
        processor: what the files beside its weights say of preprocessing: ``mean`` and ``std`` for pixels in [0, 1],
            ``size`` in pixels or None; empty for teachers that come without such files.
    """

    spec: FeatureSpec
    licence: str = ""
    patch: int | None = None
    native: int | None = None
    canvas: int | None = None
    fill: tuple[float, float, float] = (0.5, 0.5, 0.5)
    processor: Mapping[str, Any] = MappingProxyType({})

    @property
    def fixed(self) -> bool:
        """Whether it sees every view on a square canvas of one size."""
        return self.canvas is not None

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1]; the teacher normalises them itself."""

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode: batch statistics and dropout of a teacher are never those of training."""
        del mode
        return super().train(False)

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """The ``(H, W)`` at which this teacher should see a view of ``size`` of a student with ``stride``.

        A fixed canvas is shown as it is; every other teacher sees :meth:`matched_size`, snapped to its step.
        """
        if self.canvas is not None:
            return self.canvas, self.canvas
        return snap(self.matched_size(size, stride), self.spec.step)

    def matched_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """The ``(H, W)`` at which teacher and student have equally many tokens, fixed canvas or not.

        ``r_T = r_S P_T / P_S``, in whole tokens (METHOD 3.2): 432 pixels at patch 16 are 378 at patch 14. It is also
        the side of one tile where several views share a fixed canvas. Without tokens: the student's own size.
        """
        if self.patch is None:
            return snap(size, self.spec.step)
        scale = self.patch / stride
        return snap((size[0] * scale, size[1] * scale), self.patch)

    def vocabulary(self) -> Vocabulary | None:
        """The classes behind a text-aligned summary, if this teacher has them."""
        return None

    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit-norm ``(N, D)`` embeddings comparable with the summary.

        Raises:
            TypeError: this teacher is not text-aligned.
        """
        raise TypeError(f"{type(self).__name__} has no text tower: zero-shot and search need a text-aligned teacher")

    @classmethod
    def spec_of(cls, **keys: Any) -> FeatureSpec:
        """What a teacher with these recipe keys returns, without its weights where that can be known.

        The default builds the teacher and asks it: right for kinds that cost nothing to build.
        """
        with torch.device("cpu"):  # also within a `meta` of the caller's: weights that are read need a place
            return cls(**keys).spec


def spec_of(options: Mapping[str, Any], where: str = "teachers") -> FeatureSpec:
    """What a teacher of a recipe returns, without its weights.

    Enough to make a student and its heads (on the meta device, say): the published models that recipes name are known
    without a network, and any other model needs its small configuration file only.

    Args:
        options: ``{"kind": ..., **keys}``, as in a recipe.
        where: dotted path in the recipe, for messages.

    Raises:
        ConfigError: the options do not fit the kind.
        AssetError: the model is not a published one, and its configuration cannot be had.
    """
    keys = check_options("teachers", options, where)
    return find("teachers", str(keys.pop("kind"))).spec_of(**keys)
