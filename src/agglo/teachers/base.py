"""The contract of a teacher: a frozen model whose features the student learns to predict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agglo.config import build, check_options, find
from agglo.types import ConfigError, Features, FeatureSpec

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The class names behind a text-aligned teacher.

    Args:
        names: V class names.
        text: ``(V, D)`` unit-norm text embeddings of the names.
    """

    names: tuple[str, ...]
    text: Tensor


class NoBlocksError(ConfigError, TypeError):
    """Features of intermediate blocks were requested of a teacher that is not a stack of blocks."""


class Teacher(nn.Module, ABC):
    """A frozen model that normalises its own input and always stays in eval mode.

    Attributes:
        spec: what :meth:`forward` returns. ``spec.summary is None``: no summary loss. ``spec.spatial is None``: no
            spatial loss.
        licence: licence of the weights, for the model cards of its students.
        patch: side of a token in pixels of the teacher's input; None for teachers without tokens of one scale
            (pyramids, histograms, pooled vectors), which get views at the student's own size.
        native: side in pixels of the square images its weights were made for, or None if unknown.
        canvas: side in pixels of the fixed square input for every view, whatever the student's size; None for teachers
            that follow the student.
        fill: RGB colour in [0, 1] that its normalisation maps to zero, used for padding.
        processor: preprocessing stated by the files beside its weights: ``mean`` and ``std`` for pixels in [0, 1],
            ``size`` in pixels or None; empty without such files.
        text_options: kind and keys of the text tower that belongs to the summary, or None.
    """

    spec: FeatureSpec
    licence: str = ""
    patch: int | None = None
    native: int | None = None
    canvas: int | None = None
    fill: tuple[float, float, float] = (0.5, 0.5, 0.5)
    processor: Mapping[str, Any] = MappingProxyType({})
    text_options: Mapping[str, Any] | None = None
    _tower: tuple[Any, ...] = ()  # a tuple, so that the tower is not registered as a submodule

    @property
    def fixed(self) -> bool:
        """Whether every view is placed in a square input of one size."""
        return self.canvas is not None

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1]; the teacher normalises them itself."""

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode: no batch statistics, no dropout."""
        del mode
        return super().train(False)

    def begin_step(self, seed: int, step: int) -> None:
        """Called before the batches of a training step; a teacher whose input is random draws it from both numbers."""

    def intermediates(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Maps ``(B, C, H, W)``, float32, after each of these blocks, in the order given.

        Args:
            images: as for :meth:`forward`.
            blocks: indices from 0.

        Raises:
            ConfigError: no such block; lists the legal ones.
            NoBlocksError: this teacher is not a stack of blocks.
        """
        raise NoBlocksError(f"{type(self).__name__} is not a stack of blocks: it has no intermediate features")

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """Input ``(H, W)`` of this teacher for a view of ``size`` and a student of ``stride``.

        The fixed size, if there is one; else :meth:`matched_size`, snapped to its step.
        """
        if self.canvas is not None:
            return self.canvas, self.canvas
        return snap(self.matched_size(size, stride), self.spec.step)

    def matched_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """The ``(H, W)`` at which teacher and student have equally many tokens, of fixed size or not.

        ``r_T = r_S P_T / P_S``, in whole tokens (docs/method.md, 3.2): 432 pixels at patch 16 are 378 at patch 14. It
        is also the side of one tile if several views share a fixed input. Without tokens: the student's own size.
        """
        if self.patch is None:
            return snap(size, self.spec.step)
        scale = self.patch / stride
        return snap((size[0] * scale, size[1] * scale), self.patch)

    def vocabulary(self) -> Vocabulary | None:
        """The classes behind a text-aligned summary, if this teacher has them."""
        return None

    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit-norm ``(N, D)`` embeddings of N sentences, comparable with the summary.

        The default builds the text tower of :attr:`text_options` at the first call.

        Raises:
            TypeError: this teacher is not text-aligned, or its recipe names no text tower.
            ConfigError: width of the tower and of the summary differ.
            AssetError: the tower's weights or tokenizer are missing.
        """
        if self.text_options is None:
            raise TypeError(
                f"{type(self).__name__} has no text tower: zero-shot and search need a text-aligned teacher"
            )
        if not self._tower:
            tower = build("text", self.text_options, where="teachers.text")
            if tower.width != self.spec.summary:
                raise ConfigError(
                    f"teachers.text: its vectors have {tower.width} channels, the summary has {self.spec.summary}; "
                    "use the text tower of the same checkpoint"
                )
            self._tower = (tower,)
        return self._tower[0].to(next(self.parameters()).device).encode(texts)

    @classmethod
    def spec_of(cls, **keys: Any) -> FeatureSpec:
        """What a teacher with these recipe keys returns, without reading weights if possible.

        The default builds the teacher, which suits kinds that are cheap to build.
        """
        with torch.device("cpu"):  # also inside a caller's `meta`: weights that are read need storage
            return cls(**keys).spec


def check_blocks(blocks: Sequence[int], count: int, where: str) -> None:
    """Check block indices against the number of blocks.

    Raises:
        ConfigError: one is not a block; lists the legal ones.
    """
    wrong = [block for block in blocks if not 0 <= block < count]
    if wrong:
        raise ConfigError(f"{where}: {wrong[0]} is not a block; the blocks are 0 to {count - 1}")


def spec_of(options: Mapping[str, Any], where: str = "teachers") -> FeatureSpec:
    """What a teacher of a recipe returns, without its weights.

    Enough to build a student and its heads, also on the meta device: published models need no network, any other model
    only its small configuration file.

    Args:
        options: ``{"kind": ..., **keys}``, as in a recipe.
        where: dotted path in the recipe, for messages.

    Raises:
        ConfigError: the options do not fit the kind.
        AssetError: the configuration of a model that is not published is missing.
    """
    keys = check_options("teachers", options, where)
    return find("teachers", str(keys.pop("kind"))).spec_of(**keys)


# --- input sizes ------------------------------------------------------------------------------------------------------


def snap(size: tuple[float, float], step: int) -> tuple[int, int]:
    """``(H, W)`` rounded to the nearest positive multiples of ``step``."""
    return max(step, round(size[0] / step) * step), max(step, round(size[1] / step) * step)


def scaled_size(size: tuple[int, int], side: int, step: int) -> tuple[int, int]:
    """``(H, W)`` scaled so that the shorter side is ``side``, snapped to ``step``."""
    scale = side / min(size)
    return snap((size[0] * scale, size[1] * scale), step)


def check_size(size: int | None, step: int, where: str, model: str) -> None:
    """Raise :class:`ConfigError` if a recipe's ``size`` is not a positive multiple of ``step``; None is legal."""
    if size is not None and (size < 1 or size % step):
        raise ConfigError(
            f"{where}.size: {size} is not a multiple of {step} pixels, the step of {model}; the nearest is "
            f"{snap((size, size), step)[0]}"
        )


def check_images(images: Tensor, step: int, canvas: int | None = None) -> None:
    """Check that a batch is ``(B, 3, H, W)`` with sides that are multiples of ``step``, or equal to ``canvas``.

    Raises:
        ConfigError: names the nearest legal size.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"expected RGB images (B, 3, H, W), got a tensor of shape {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if canvas is not None and (height, width) != (canvas, canvas):
        raise ConfigError(f"images are {height}x{width}, but this teacher runs at {canvas}x{canvas} only")
    if height % step or width % step or not height or not width:
        legal = snap((height, width), step)
        raise ConfigError(
            f"images are {height}x{width}, but this teacher takes sides that are multiples of {step}: "
            f"the nearest legal size is {legal[0]}x{legal[1]}"
        )


# --- half precision ---------------------------------------------------------------------------------------------------


def halve(net: nn.Module, dtype: Precision) -> None:
    """Store the weights of linear layers in half precision, in place.

    Norms, position tables, class tokens, layer scales, rotary phases and the first convolution stay float32, and so
    does the residual stream if the network runs under :func:`autocast`. It then computes bit for bit what autocast
    computes from float32 weights, in half the memory and without casting them in every call. Casting a whole teacher
    can collapse its targets (docs/method.md, 1.5).
    """
    if dtype == "float32":
        return
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.to(getattr(torch, dtype))


def autocast(dtype: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a network of that precision runs."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype), cache_enabled=False)
