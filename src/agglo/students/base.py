"""The contract of a student: the encoder that is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from agglo.types import Features, FeatureSpec


class Student(nn.Module, ABC):
    """An image encoder to be trained.

    A kind's constructor takes ``tokens`` positionally: names of the teachers that get a class token. A student with a
    single summary (a ConvNet) has ``spec.slots == 1``, and every head reads that summary.

    Attributes:
        mean, std: per-channel constants of the input conditioner before this student.
        spec: shape of the features that :meth:`forward` returns.
        windows: whether :meth:`forward` takes ``window``, the side in patches of ViTDet's windows.
        builds_on_meta: whether the constructor runs on the meta device, so that loading skips random initialisation.
    """

    windows: bool = False
    builds_on_meta: bool = True
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    spec: FeatureSpec

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Encode conditioned images ``(B, 3, H, W)``.

        Returns:
            ``summary (B, slots * D)``, slots in the order of ``tokens``; ``spatial (B, D', H / stride, W / stride)``.

        Raises:
            ValueError: a side is not a multiple of ``spec.step``; the message has the nearest legal sizes.
        """

    def forward_list(self, images: Sequence[Tensor], *, window: int | None = None) -> list[Features]:
        """Encode conditioned images ``(1, 3, H_i, W_i)`` of any legal sizes, in order.

        By default images of equal size share a batch; a kind may pack all into one pass.

        Args:
            images: each a batch of one.
            window: as in :meth:`forward`, for students with windows.
        """
        options = {} if window is None else {"window": window}
        result: dict[int, Features] = {}
        shapes = {tuple(image.shape[-2:]): [] for image in images}
        for index, image in enumerate(images):
            shapes[tuple(image.shape[-2:])].append(index)
        for members in shapes.values():
            out = self(torch.cat([images[m] for m in members]), **options)
            result |= {m: out.map(lambda t, row=row: t[row : row + 1]) for row, m in enumerate(members)}
        return [result[index] for index in range(len(images))]

    @property
    def depth(self) -> int:
        """Number of blocks that :meth:`visit` supports; 0 for none."""
        return 0

    def visit(
        self,
        images: Tensor,
        blocks: Collection[int],
        callback: Callable[[int, Features], None],
        *,
        norm: bool = False,
        window: int | None = None,
    ) -> None:
        """Call ``callback(index, features)`` after each of these blocks, in ascending order; later blocks do not run.

        Args:
            images: conditioned, ``(B, 3, H, W)``.
            blocks: indices from 0.
            callback: gets the features that :meth:`forward` would return if the student ended with that block.
            norm: apply the final norm, if any, to these features.
            window: as in :meth:`forward`.

        Raises:
            TypeError: this student is not a stack of blocks.
        """
        raise TypeError(f"{type(self).__name__} is not a stack of equal blocks: it has no intermediate features")

    def set_clip_length(self, frames: int) -> None:
        """Set the number of successive images of a training batch that are frames of one clip."""

    def deploy(self) -> None:
        """Fold layers for inference, in place, where the kind supports it."""

    def settings(self) -> dict[str, object]:
        """Current values of constructor keys that can change after construction; saved with a model.

        Raises:
            ValueError: the student was changed in a way that the constructor's keys cannot express.
        """
        return {}

    def copy_from(self, other: Student, tokens: Sequence[str], other_tokens: Sequence[str]) -> None:
        """Copy the weights of a student of the same kind and size, which may have other teachers.

        Args:
            other: the source.
            tokens, other_tokens: teacher names of the class tokens of each.

        Raises:
            ValueError: ``other`` has another size; the message has the first tensors that differ.
        """
        del tokens, other_tokens
        copy_state(self, other.state_dict())

    def initialize(self) -> None:
        """Load the initial weights of training that the recipe names, if any. Not called when a model is loaded."""

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """``(weight (classes, D), bias (classes,))`` of the initial weights' classifier, if any."""
        return None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides biases and norms."""
        return set()


def copy_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict, or raise a ValueError with the first tensors that differ."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"its weights are of another architecture: {', '.join(wrong[:5])}")
    module.load_state_dict(dict(state))
