"""RADIO's Vision Transformer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from torch import Tensor, nn

from agglo.nn.blocks import NORM_EPS, Block, MlpKind
from agglo.nn.packing import Layout
from agglo.nn.windows import check_window_divides, check_window_value, windowed_blocks
from agglo.preprocess import check_size
from agglo.students._patches import PatchGenerator, Position
from agglo.students.base import Student, copy_state
from agglo.types import ConfigError, Features, FeatureSpec

PACK_TOKENS = 16_384
"""Tokens per pass when a list of images is packed; more is not faster and needs more memory."""


class ViT(Student):
    """The RADIO ViT: linear patch embedding, cropped position embeddings over a large grid, a class token per teacher.

    AM-RADIO (arXiv:2312.06709); docs/method.md, 1.2 and 2.8; docs/checkpoints.md, 2 to 4. Keys from ``num_windowed``
    on differ between the generations of released models.

    Args:
        tokens: names of the teachers that get a class token; one token when empty.
        width: C.
        depth: number of blocks.
        heads: attention heads; divides ``width``.
        mlp_ratio: hidden width of the MLP over ``width``.
        patch: P, side of a patch in pixels; image sides must be multiples of it.
        max_grid: R, side of the position table in patches (2048 / 16 = 128 in the released models).
        registers: further prefix tokens, not used by heads.
        cls_per_teacher: one class token per teacher, else one for all.
        pos_dropout: probability that a training sample gets no position embedding.
        window: side, in patches, of ViTDet's attention windows; None for global attention in every block.
        num_global: number of blocks with global attention where ``window`` is set.
        num_windowed: windowed blocks between two global ones; replaces ``num_global``.
        mlp_hidden: hidden width of the MLP in channels; replaces ``mlp_ratio``.
        mlp: ``gelu`` or ``swiglu``.
        mlp_norm: LayerNorm inside the MLP.
        qkv_bias: a bias in the projections to queries, keys and values.
        layer_scale: initial value of the layer scales, or None for none.
        final_norm: LayerNorm after the last block.
        patch_bias: a bias in the patch projection.
        position: how the position table is cropped to a grid, ``cropped`` or ``corner``.
        align_corners: of the table's resize at inference (True in releases before July 2025).
        pool: source of the summary: ``token``, or ``avg``, the mean of the patches (class tokens are kept).
    """

    windows = True

    def __init__(
        self,
        tokens: tuple[str, ...] = (),
        /,
        *,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        patch: int = 16,
        max_grid: int = 128,
        registers: int = 4,
        cls_per_teacher: bool = True,
        pos_dropout: float = 0.1,
        window: int | None = None,
        num_global: int = 4,
        num_windowed: int | None = None,
        mlp_hidden: int | None = None,
        mlp: MlpKind = "gelu",
        mlp_norm: bool = False,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        final_norm: bool = False,
        patch_bias: bool = False,
        position: Position = "cropped",
        align_corners: bool = False,
        pool: Literal["token", "avg"] = "token",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"student.heads: {heads} does not divide width {width}")
        check_window_value(window)
        if mlp == "swiglu" and mlp_norm:
            raise ConfigError("student.mlp_norm: needs `mlp: gelu`")
        if pool == "avg" and cls_per_teacher and len(tokens) > 1:
            raise ConfigError("student.pool: avg gives one summary for all teachers: set cls_per_teacher: false")
        slots = max(1, len(tokens)) if cls_per_teacher else 1
        self.registers, self.window, self.pool = registers, window, pool
        self.windowed = windowed_blocks(depth, num_windowed=num_windowed, num_global=num_global)
        self.spec = FeatureSpec(summary=slots * width, spatial=width, stride=patch, step=patch, slots=slots)
        self.patch_generator = PatchGenerator(
            width, patch, max_grid, slots + registers, pos_dropout,
            bias=patch_bias, position=position, align_corners=align_corners,
        )  # fmt: skip
        hidden = mlp_hidden or int(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, qkv_bias=qkv_bias, layer_scale=layer_scale, mlp=mlp, mlp_norm=mlp_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS) if final_norm else nn.Identity()
        self.apply(_initialize)

    def forward(
        self,
        images: Tensor,
        *,
        window: int | None = None,
        blocks: Collection[int] = (),
        into: dict[int, Features] | None = None,
    ) -> Features:
        """See :meth:`Student.forward`; ``window`` as in the constructor, 0 for none, None for the constructor's.

        The features after each of ``blocks``, with the final norm, are stored in ``into`` by index in the same pass.
        """
        if blocks:
            into, last = {} if into is None else into, len(self.blocks) - 1
            self.visit(images, {*blocks, last}, into.__setitem__, norm=True, window=window)
            return into[last]
        layout = Layout(self.patch_generator.tokens, (self._grid(images),), packed=False)
        return self._features(self.norm(self._run(self.patch_generator(images), layout, window)), layout.grids[0])

    def forward_list(self, images: Sequence[Tensor], *, window: int | None = None) -> list[Features]:
        """See :meth:`Student.forward_list`; images are packed into passes of at most :data:`PACK_TOKENS` tokens."""
        grids = [self._grid(image) for image in images]
        order = sorted(range(len(images)), key=lambda index: grids[index][0] * grids[index][1])
        result: dict[int, Features] = {}
        for members in _passes(order, [self.patch_generator.tokens + h * w for h, w in grids]):
            layout = Layout(self.patch_generator.tokens, tuple(grids[m] for m in members), packed=True)
            x = self.patch_generator.pack([images[m] for m in members])
            parts = layout.images(self.norm(self._run(x, layout, window)))
            result |= {m: self._features(part, grids[m]) for m, part in zip(members, parts, strict=True)}
        return [result[index] for index in range(len(images))]

    def visit(
        self,
        images: Tensor,
        blocks: Collection[int],
        callback: Callable[[int, Features], None],
        *,
        norm: bool = False,
        window: int | None = None,
    ) -> None:
        """See :meth:`Student.visit`."""
        layout = Layout(self.patch_generator.tokens, (self._grid(images),), packed=False)

        def after_block(index: int, x: Tensor) -> None:
            callback(index, self._features(self.norm(x) if norm else x, layout.grids[0]))

        self._run(self.patch_generator(images), layout, window, frozenset(blocks), after_block)

    def _run(
        self,
        x: Tensor,
        layout: Layout,
        window: int | None,
        visited: frozenset[int] = frozenset(),
        after_block: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Run all blocks, or those up to the last visited one; the prefix skips blocks with windows."""
        check_window_value(window)
        window = self.window if window is None else window
        for grid in layout.grids if window else ():
            check_window_divides(grid, window or 0, self.spec.stride)
        last = max(visited) if visited else len(self.blocks) - 1
        prefixes, packing = None, layout.packing()
        for index, block in enumerate(self.blocks[: last + 1]):
            if window and self.windowed[index]:
                if prefixes is None:
                    prefixes, x = layout.split_windows(x, window)
                x = block(x)
            else:
                if prefixes is not None:
                    prefixes, x = None, layout.join_windows(prefixes, x, window or 0)
                x = block(x, packing)
            if after_block is not None and index in visited:
                after_block(index, x if prefixes is None else layout.join_windows(prefixes, x, window or 0))
        return x

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        check_size(height, width, self.spec.step)
        return height // self.spec.stride, width // self.spec.stride

    def _features(self, x: Tensor, grid: tuple[int, int]) -> Features:
        spatial = x[:, self.spec.slots + self.registers :].transpose(1, 2).unflatten(2, grid)
        summary = spatial.mean((2, 3)) if self.pool == "avg" else x[:, : self.spec.slots].flatten(1)
        return Features(summary=summary, spatial=spatial)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def settings(self) -> dict[str, object]:
        """The current window."""
        return {"window": self.window}

    def set_clip_length(self, frames: int) -> None:
        """See :meth:`Student.set_clip_length`; frames of a clip share one random viewport of the position table."""
        self.patch_generator.clip_length = frames

    def copy_from(self, other: Student, tokens: Sequence[str], other_tokens: Sequence[str]) -> None:
        """See :meth:`Student.copy_from`; class tokens are matched by teacher name, registers by index."""
        state = other.state_dict()
        key = "patch_generator.token"
        token, source, slots = self.patch_generator.token.detach().clone(), state[key], other.spec.slots
        if token.shape[1] != source.shape[1]:
            raise ValueError(f"its width is {source.shape[1]}, this one's {token.shape[1]}: another architecture")
        if self.spec.slots == slots == 1:
            token[0] = source[0]
        for index, name in enumerate(tokens[: self.spec.slots] if self.spec.slots > 1 else ()):
            if name in other_tokens[:slots]:
                token[index] = source[list(other_tokens).index(name)]
        registers = min(len(token) - self.spec.slots, len(source) - slots)
        token[self.spec.slots : self.spec.slots + registers] = source[slots : slots + registers]
        copy_state(self, {**state, key: token})

    def no_weight_decay(self) -> set[str]:
        """The position table and the tokens."""
        return {"patch_generator.pos_embed", "patch_generator.token"}


def _passes(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Group images, in order, into passes of at most :data:`PACK_TOKENS` tokens, with at least one image."""
    passes: list[list[int]] = []
    room = 0
    for index in order:
        if not passes or lengths[index] > room:
            passes.append([])
            room = PACK_TOKENS
        passes[-1].append(index)
        room -= lengths[index]
    return passes


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
