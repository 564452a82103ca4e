"""The contract of a student: one encoder that learns from several teachers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from agglo.types import Features, FeatureSpec


class Student(nn.Module, ABC):
    """An image encoder to be trained.

    A kind's constructor takes ``tokens`` positionally: one class token is wanted for each of these teacher names.
    A student that cannot hold several (a ConvNet) sets ``spec.slots == 1``, and every head reads the one summary.

    Attributes:
        mean, std: per-channel constants of the input conditioner that belongs before this student.
        spec: what :meth:`forward` returns.
        windows: whether :meth:`forward` takes ``window``, the side in patches of ViTDet's windows.
        depth: number of blocks that :meth:`visit` can show; 0 where there are none.
    """

    windows: bool = False
    builds_on_meta: bool = True
    """Whether the constructor needs no values, so that weights can be loaded without being drawn first."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    spec: FeatureSpec

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Encode conditioned images ``(B, 3, H, W)``.

        Returns:
            ``summary (B, slots * D)``, slots in the order of ``tokens``; ``spatial (B, D', H / stride, W / stride)``.

        Raises:
            ValueError: a side is no multiple of ``spec.step``; the message names the nearest legal sizes.
        """

    def forward_list(self, images: Sequence[Tensor], *, window: int | None = None) -> list[Features]:
        """Encode conditioned images ``(1, 3, H_i, W_i)`` of any legal sizes; as many features, in the same order.

        A student that can holds them in one pass without padding; here, images of one size share a batch.

        Args:
            images: each a batch of one.
            window: as in :meth:`forward`, where the student has windows.
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
        """Number of blocks that :meth:`visit` can show."""
        return 0

    def visit(
        self,
        images: Tensor,
        blocks: Collection[int],
        see: Callable[[int, Features], None],
        *,
        norm: bool = False,
        window: int | None = None,
    ) -> None:
        """Call ``see(index, features)`` after each of these blocks, in ascending order; nothing runs after the last.

        Args:
            images: conditioned, ``(B, 3, H, W)``.
            blocks: indices from 0.
            see: gets what :meth:`forward` would return if the model ended with that block (without the final norm).
            norm: apply the final norm, if there is one.
            window: as in :meth:`forward`.

        Raises:
            TypeError: this student is no stack of blocks.
        """
        raise TypeError(f"{type(self).__name__} is no stack of equal blocks: it has no intermediate features to show")

    def set_clip_length(self, frames: int) -> None:
        """Announce that this many successive images of a training batch are frames of one clip."""

    def deploy(self) -> None:
        """Fold what can be folded for inference; a student with nothing to fold stays as it is."""

    def settings(self) -> dict[str, object]:
        """Keys of the constructor that were set to something else since: a saved model keeps them.

        Raises:
            ValueError: it was changed in a way that no constructor's keys can express.
        """
        return {}

    def copy_from(self, other: Student, mine: Sequence[str], theirs: Sequence[str]) -> None:
        """Take over the weights of a student of the same kind and size, which may know other teachers.

        Args:
            other: whose weights are copied.
            mine, theirs: the teachers' names behind the class tokens of each.

        Raises:
            ValueError: it is of another size; names the first tensors that do not fit.
        """
        del mine, theirs
        copy_state(self, other.state_dict())

    def initialize(self) -> None:
        """Load the weights training starts from, if the recipe names some. Never called when a model is loaded."""

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """``(weight (classes, D), bias (classes,))`` of the classifier that came with the initial weights, if any."""
        return None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone, besides biases and norms."""
        return set()


def copy_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state that must fit.

    Raises:
        ValueError: it does not; names the first tensors that differ.
    """
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"its weights are of another architecture: {', '.join(wrong[:5])}")
    module.load_state_dict(dict(state))
