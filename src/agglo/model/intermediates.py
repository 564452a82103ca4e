"""Features after chosen blocks, per block or averaged over the blocks in between."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from agglo.types import ConfigError, Features

if TYPE_CHECKING:
    from agglo.nn.feature_norm import IntermediateNormalizer
    from agglo.students.base import Student

Aggregation = Literal["sparse", "dense"]
Alpha = Literal["post-alpha", "pre-alpha", "none"]


def choose(blocks: int | Sequence[int], depth: int) -> list[int]:
    """Indices of blocks, ascending and unique.

    Args:
        blocks: number of last blocks; or indices, negative ones from the end.
        depth: number of blocks of the student.

    Raises:
        ConfigError: no block, one that does not exist, or not a number.
    """
    has = f"this model has {depth} blocks, 0 to {depth - 1} (or -{depth} to -1)"
    try:
        if isinstance(blocks, Iterable):
            wanted = [operator.index(index) for index in blocks]
            found = sorted({index + depth if index < 0 else index for index in wanted})
        else:
            found = list(range(depth - operator.index(blocks), depth))
    except TypeError:
        raise ConfigError(f"blocks: {blocks!r} is neither a count of last blocks nor indices; {has}") from None
    if not found or found[0] < 0 or found[-1] >= depth:
        raise ConfigError(f"blocks {blocks}: {has}")
    return found


def collect(
    student: Student,
    images: Tensor,
    blocks: Sequence[int],
    normalizer: IntermediateNormalizer | None = None,
    *,
    aggregation: Aggregation = "sparse",
    alpha: Alpha = "post-alpha",
    norm: bool = False,
    window: int | None = None,
) -> list[Features]:
    """Run a student and collect features after the chosen blocks.

    With ``y_i`` the centred and rotated map of block ``i``, and ``n`` the number of blocks since the previous chosen
    one: ``sparse`` gives ``alpha_i y_i``; ``dense`` with ``post-alpha`` ``(sum alpha_i / n) (sum y_i) / n``, with
    ``pre-alpha`` ``sum(alpha_i y_i) / n`` (docs/checkpoints.md, 1.6). Class tokens are averaged, never normalised.

    Args:
        student: a stack of blocks.
        images: conditioned, ``(B, 3, H, W)``.
        blocks: chosen indices, ascending.
        normalizer: the checkpoint's own, or None.
        aggregation: ``sparse`` or ``dense``.
        alpha: where the scales are applied; ``none``: neither scales nor rotation.
        norm: apply the student's final norm to every block's tokens.
        window: as in the student's ``forward``.

    Returns:
        One per chosen block; summaries hold all class tokens.
    """
    for key, value, legal in (("aggregation", aggregation, Aggregation), ("alpha", alpha, Alpha)):
        if value not in get_args(legal):
            raise ConfigError(f"{key}: {value!r} is not one of {', '.join(get_args(legal))}")
    active = normalizer if alpha != "none" else None
    gathered: list[Features] = []
    group = _Group()

    def collect_block(index: int, features: Features) -> None:
        group.add(features, index, active, scaled=alpha == "pre-alpha")
        if index in blocks:
            gathered.append(group.finish(index, active, scaled=alpha == "post-alpha"))

    visited = blocks if aggregation == "sparse" else range(blocks[-1] + 1)
    student.visit(images, visited, collect_block, norm=norm, window=window)
    return gathered


class _Group:
    """Running sums over the blocks of one group: the memory of one map for any number of blocks."""

    def __init__(self) -> None:
        self.count, self.scale = 0, 0.0
        self.spatial: Tensor | None = None
        self.summary: Tensor | None = None

    def add(self, features: Features, index: int, normalizer: IntermediateNormalizer | None, *, scaled: bool) -> None:
        spatial, summary = features.spatial, features.summary
        if normalizer is not None and spatial is not None:
            spatial = normalizer.centre(spatial, index)
            self.scale = self.scale + normalizer.alphas[index]
            if scaled:
                spatial = spatial * normalizer.alphas[index].to(spatial)
        self.count += 1
        self.spatial, self.summary = _sum(self.spatial, spatial), _sum(self.summary, summary)

    def finish(self, index: int, normalizer: IntermediateNormalizer | None, *, scaled: bool) -> Features:
        spatial = None if self.spatial is None else self.spatial / self.count
        summary = None if self.summary is None else self.summary / self.count
        if normalizer is not None and spatial is not None:
            spatial = normalizer.rotate(spatial, index)
            if scaled:
                spatial = spatial * torch.as_tensor(self.scale / self.count).to(spatial)
        self.__init__()
        return Features(summary, spatial)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part
    return total + part
