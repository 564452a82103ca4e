"""RADIO1D: a ViT that encodes an image to an ordered list of tokens, with a decoder to a map."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from agglo.nn.blocks import NORM_EPS, Block
from agglo.preprocess import check_size
from agglo.students._patches import PatchGenerator, Position
from agglo.students._vit_1d_grids import Decoder, Grid, Merge, check_levels, merged
from agglo.students.base import Student
from agglo.types import ConfigError, Features, FeatureSpec

Neck = Literal["decoder", "encoder"]


class ViT1D(Student):
    """NVIDIA's RADIO1D (docs/checkpoints.md, 9): merge tokens, keep the first ones, decode.

    A RADIO ViT merges its patch tokens 2x2 between blocks, which doubles width and heads. Of the resulting tokens, in
    row-major order, the first ``num_tokens`` are kept: the "1-D tokens". A decoder fills the rest with learned tokens
    and upsamples to the patch grid. :meth:`forward` returns one of two results ("necks"), described by ``spec``, with
    K class tokens and ``D = 2^merges C``:

    - ``decoder``: ``summary (B, K C)``, ``spatial (B, C, H / patch, W / patch)``, decoded from the kept tokens.
    - ``encoder``: ``summary (B, K D)``, ``spatial (B, D, 1, n)``: the 1-D tokens as a map of height 1, so that
      ``.tokens()`` is ``(B, n, D)``. ``spec.stride`` is that of the patches; not for heads or losses on positions.

    Args:
        tokens: names of the teachers that get a class token; one token when empty.
        width: C, before the first merge.
        depth: number of encoder blocks.
        heads: attention heads at ``width``, which they divide; also of the decoder's first blocks, at D.
        mlp_ratio: hidden width of the MLPs over the width of their block.
        patch: side of a patch in pixels; image sides must be multiples of it. Odd grids are padded and cropped.
        max_grid: side of the position table in patches.
        registers: further prefix tokens, not used by heads.
        class_tokens: number of class tokens; that of ``tokens`` when None.
        downscale_levels: encoder blocks (from 0) before which the grid is merged 2x2.
        decoder_depth: number of decoder blocks.
        decoder_upscale_levels: decoder blocks before which the grid is split 2x2; one per merge.
        filler_grid: side of the decoder's table of filler tokens (nominal image / patch / 2^merges).
        final_norm: LayerNorm after the encoder's last block. The decoder always ends in one.
        neck: which result :meth:`forward` returns.
        num_tokens: number of 1-D tokens kept in evaluation; null, or more than exist, keeps all.
        rate: number of tokens kept in training: ``uniform`` draws ``n ~ U{1 .. all}`` per forward pass for the whole
            batch, from torch's CPU generator, so that every prefix is trained; ``all`` keeps all. An argument of
            :meth:`forward` overrides both.
        pos_dropout: probability that a training sample gets no position embedding.
        align_corners: of the position table's resize at inference.
        position: ``cropped``, or ``corner`` if the nominal image is as large as the table (docs/checkpoints.md, 2).

    Raises:
        ConfigError: widths and heads that do not divide, invalid levels, or fewer than one token to keep.
    """

    def __init__(
        self,
        tokens: tuple[str, ...] = (),
        /,
        *,
        width: int = 64,
        depth: int = 4,
        heads: int = 2,
        mlp_ratio: float = 4.0,
        patch: int = 16,
        max_grid: int = 32,
        registers: int = 4,
        class_tokens: int | None = None,
        downscale_levels: tuple[int, ...] = (2,),
        decoder_depth: int = 2,
        decoder_upscale_levels: tuple[int, ...] = (1,),
        filler_grid: int = 7,
        final_norm: bool = False,
        neck: Neck = "decoder",
        num_tokens: int | None = None,
        rate: Literal["uniform", "all"] = "uniform",
        pos_dropout: float = 0.1,
        align_corners: bool = False,
        position: Position = "cropped",
    ) -> None:
        super().__init__()
        _check_choice("neck", neck, ("decoder", "encoder"))
        _check_choice("rate", rate, ("uniform", "all"))
        slots = max(1, len(tokens)) if class_tokens is None else class_tokens
        _check_counts(class_tokens=(slots, 1), registers=(registers, 0), filler_grid=(filler_grid, 1))
        _check_counts(depth=(depth, 1), decoder_depth=(decoder_depth, 1), patch=(patch, 1), max_grid=(max_grid, 1))
        self.levels = check_levels("student.downscale_levels", downscale_levels, depth)
        upscale_levels = check_levels("student.decoder_upscale_levels", decoder_upscale_levels, decoder_depth)
        _check_shape(width, heads, len(self.levels), len(upscale_levels))
        self.neck, self.num_tokens, self.rate, self.registers = neck, num_tokens, rate, registers
        self._check_num_tokens(num_tokens)
        prefix = slots + registers
        self.patch_generator = PatchGenerator(
            width, patch, max_grid, prefix, pos_dropout, align_corners=align_corners, position=position
        )
        blocks, merges, projections, wide = [], [], [], width
        for index in range(depth):
            if index in self.levels:
                merges.append(Merge(wide))
                projections.append(nn.Linear(wide, 2 * wide, bias=False))
                wide, heads = 2 * wide, 2 * heads
            blocks.append(Block(wide, heads, int(wide * mlp_ratio)))
        self.blocks = nn.ModuleList(blocks)
        self.downscale_blocks = nn.ModuleList(merges)
        self.prefix_proj_blocks = nn.ModuleList(projections)
        self.norm = nn.LayerNorm(wide, eps=NORM_EPS) if final_norm else nn.Identity()
        heads >>= len(self.levels)
        self.decoder = Decoder(wide, heads, decoder_depth, upscale_levels, mlp_ratio, prefix, filler_grid)
        channels = width if neck == "decoder" else wide
        self.spec = FeatureSpec(summary=slots * channels, spatial=channels, stride=patch, step=patch, slots=slots)
        _initialize(self, depth, decoder_depth)

    def forward(self, images: Tensor, num_tokens: int | None = None) -> Features:
        """Encode conditioned images to the chosen neck; the decoder runs only if needed.

        Args:
            images: ``(B, 3, H, W)``.
            num_tokens: number of 1-D tokens to keep, at least 1, at most all. None: the constructor's ``num_tokens`` in
                evaluation, its ``rate`` in training.

        Raises:
            ValueError: a side is not a multiple of the patch, or ``num_tokens`` is less than 1.
        """
        prefix, kept, grid = self._encode(images, num_tokens)
        return self._encoder_neck(prefix, kept) if self.neck == "encoder" else self._decoder_neck(kept, grid)

    def necks(self, images: Tensor, num_tokens: int | None = None) -> dict[str, Features]:
        """Results of both necks, ``encoder`` and ``decoder``, from the same tokens; arguments of :meth:`forward`."""
        prefix, kept, grid = self._encode(images, num_tokens)
        return {"encoder": self._encoder_neck(prefix, kept), "decoder": self._decoder_neck(kept, grid)}

    def settings(self) -> dict[str, object]:
        """Number of kept tokens in evaluation and in training."""
        return {"num_tokens": self.num_tokens, "rate": self.rate}

    def no_weight_decay(self) -> set[str]:
        """The position table and the tokens."""
        return {
            "patch_generator.pos_embed",
            "patch_generator.token",
            "decoder.filler_tokens",
            "decoder.prefix_tokens",
        }

    def _encode(self, images: Tensor, num_tokens: int | None) -> tuple[Tensor, Tensor, Grid]:
        """Prefix ``(B, K + R, D)``, kept tokens ``(B, n, D)``, and the grid of the patches."""
        height, width = images.shape[-2:]
        check_size(height, width, self.spec.step)
        keep = self._keep(num_tokens)
        grid = grid_now = (height // self.spec.stride, width // self.spec.stride)
        count = self.patch_generator.tokens
        x = self.patch_generator(images)
        for index, block in enumerate(self.blocks):
            if index in self.levels:
                level = self.levels.index(index)
                spatial = self.downscale_blocks[level](x[:, count:], grid_now)
                x = torch.cat([self.prefix_proj_blocks[level](x[:, :count]), spatial], dim=1)
                grid_now = merged(grid_now)
            x = block(x)
        x = self.norm(x)
        if keep == "uniform":
            keep = int(torch.randint(1, x.shape[1] - count + 1, ()))
        end = None if keep is None else count + keep  # a slice is clamped to the number of tokens
        return x[:, :count], x[:, count:end], grid

    def _keep(self, num_tokens: int | None) -> int | Literal["uniform"] | None:
        """Tokens to keep: a number, ``uniform``, or None for all."""
        if num_tokens is not None:
            return self._check_num_tokens(num_tokens)
        if self.training:
            return "uniform" if self.rate == "uniform" else None
        return self._check_num_tokens(self.num_tokens)

    @staticmethod
    def _check_num_tokens(num_tokens: int | None) -> int | None:
        if num_tokens is not None and num_tokens < 1:
            raise ConfigError(f"student.num_tokens: {num_tokens} is less than 1; use 1 or more, or null for all")
        return num_tokens

    def _encoder_neck(self, prefix: Tensor, kept: Tensor) -> Features:
        return Features(summary=prefix[:, : self.spec.slots].flatten(1), spatial=kept.transpose(1, 2).unsqueeze(2))

    def _decoder_neck(self, kept: Tensor, grid: Grid) -> Features:
        prefix, spatial = self.decoder(kept, grid)
        return Features(
            summary=prefix[:, : self.spec.slots].flatten(1), spatial=spatial.transpose(1, 2).unflatten(2, grid)
        )


def _check_choice(key: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ConfigError(f"student.{key}: {value!r} is not one of {', '.join(map(repr, legal))}")


def _check_counts(**counts: tuple[int, int]) -> None:
    """Raise for a ``key=(value, minimum)`` below its minimum."""
    for key, (value, least) in counts.items():
        if value < least:
            raise ConfigError(f"student.{key}: {value} is less than {least}")


def _check_shape(width: int, heads: int, merges: int, splits: int) -> None:
    """Raise unless heads divide the widths of all levels, and the decoder has one split per merge."""
    if heads < 1 or width % heads:
        near = min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - heads))
        raise ConfigError(f"student.heads: {heads} does not divide width {width}; the nearest that does is {near}")
    if splits != merges:
        raise ConfigError(
            f"student.decoder_upscale_levels: {splits} splits for {merges} merges in downscale_levels; use {merges}"
        )
    if heads % 2**splits:
        raise ConfigError(
            f"student.heads: {heads} is not divisible by {2**splits}, as {splits} splits need; the nearest "
            f"is {max(1, round(heads / 2**splits)) * 2**splits}"
        )


@torch.no_grad()
def _initialize(student: ViT1D, depth: int, decoder_depth: int) -> None:
    """Magneto's initialisation (Wang et al. 2022, arXiv:2210.06423).

    Xavier, with gain ``sqrt(ln(2 depth))`` on the value, output and MLP projections; biases zero.
    """
    for module in student.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for stack, blocks in ((student.blocks, depth), (student.decoder.blocks, decoder_depth)):
        gain = math.sqrt(math.log(2 * blocks))
        for block in stack.children():
            for name, layer in block.named_modules():
                if name == "attn.qkv" and isinstance(layer, nn.Linear):
                    # Three stacked projections: each has the fan-out of its own third.
                    for part, scale in zip(layer.weight.chunk(3), (1.0, 1.0, gain), strict=True):
                        nn.init.xavier_normal_(part, gain=scale)
                elif name in ("attn.proj", "mlp.fc1", "mlp.fc2") and isinstance(layer, nn.Linear):
                    nn.init.xavier_normal_(layer.weight, gain=gain)
