"""RADIO's Vision Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agglo.nn.blocks import Block
from agglo.nn.position import eval_window, train_window
from agglo.preprocess import check_size
from agglo.students.base import Student
from agglo.types import ConfigError, Features, FeatureSpec


class PatchGenerator(nn.Module):
    """Pixels to the token sequence ``[cls_1 .. cls_K, reg_1 .. reg_R, patches row-major]``.

    Patches are flattened (channel, y, x) and projected without bias; a crop of the position table is added to them;
    class and register tokens get no position (METHOD 1.2).
    """

    def __init__(self, width: int, patch: int, max_grid: int, tokens: int, drop: float) -> None:
        super().__init__()
        self.patch, self.drop, self.tokens = patch, drop, tokens
        self.embedder = nn.Linear(3 * patch * patch, width, bias=False)
        self.pos_embed = nn.Parameter(torch.randn(1, max_grid * max_grid, width) * width**-0.5)
        self.token = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.max_grid = max_grid

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, tokens + H W / patch^2, C)``."""
        batch, channels, height, width = images.shape
        p = self.patch
        grid = (height // p, width // p)
        patches = images.view(batch, channels, grid[0], p, grid[1], p).permute(0, 2, 4, 1, 3, 5)
        x = self.embedder(patches.reshape(batch, grid[0] * grid[1], channels * p * p))
        table = self.pos_embed.transpose(1, 2).unflatten(2, (self.max_grid, self.max_grid))
        window = train_window(table, grid, batch, self.drop) if self.training else eval_window(table, grid)
        x = x + window.flatten(2).transpose(1, 2).to(x.dtype)
        return torch.cat([self.token.to(x.dtype).expand(batch, -1, -1), x], dim=1)


class ViT(Student):
    """The RADIO ViT: linear patch embedding, cropped position embeddings over a large grid, a class token per teacher.

    AM-RADIO (arXiv 2312.06709); METHOD 1.2, 2.8. No final norm, as in the released models.

    Args:
        tokens: names of the teachers that get a class token; one token when empty.
        width: C.
        depth: number of blocks.
        heads: attention heads; divides ``width``.
        mlp_ratio: hidden width of the MLP over ``width``.
        patch: P, side of a patch in pixels; image sides must be multiples of it.
        max_grid: R, side of the position table in patches (2048 / 16 = 128 in the released models).
        registers: further prefix tokens that are not read by any head.
        cls_per_teacher: one class token a teacher (else one for all).
        pos_dropout: probability that a training sample gets no position embedding.
    """

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
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"student.heads: {heads} does not divide width {width}")
        slots = max(1, len(tokens)) if cls_per_teacher else 1
        self.spec = FeatureSpec(summary=slots * width, spatial=width, stride=patch, step=patch, slots=slots)
        self.registers = registers
        self.patch_generator = PatchGenerator(width, patch, max_grid, slots + registers, pos_dropout)
        self.blocks = nn.ModuleList(Block(width, heads, int(width * mlp_ratio)) for _ in range(depth))
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Features:
        """See :meth:`Student.forward`."""
        height, width = images.shape[-2:]
        check_size(height, width, self.spec.step)
        x = self.patch_generator(images)
        for block in self.blocks:
            x = block(x)
        grid = (height // self.spec.stride, width // self.spec.stride)
        spatial = x[:, self.spec.slots + self.registers :].transpose(1, 2).unflatten(2, grid)
        return Features(summary=x[:, : self.spec.slots].flatten(1), spatial=spatial)

    def no_weight_decay(self) -> set[str]:
        """The position table and the tokens."""
        return {"patch_generator.pos_embed", "patch_generator.token"}


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
