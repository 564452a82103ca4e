"""Patch embedding of RADIO's transformers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from agglo.nn.position import corner_embedding, eval_embedding, train_embedding

Position = Literal["cropped", "corner"]


class PatchGenerator(nn.Module):
    """Pixels to the token sequence ``[cls_1 .. cls_K, reg_1 .. reg_R, patches row-major]``.

    Patches are flattened (channel, y, x) and projected; a crop of the position table is added; class and register
    tokens get no position (docs/method.md, 1.2).

    Args:
        width: C.
        patch: side of a patch in pixels.
        max_grid: R, side of the position table in patches.
        tokens: K + R, class and register tokens.
        drop: probability that a training sample gets no position.
        bias: bias of the projection (in DINOv2 and timm, not in RADIO).
        align_corners: of the table's resize at inference; RADIO's generations differ.
        position: ``cropped`` resizes the table to the longer side and crops it; ``corner`` crops without resizing.
    """

    def __init__(
        self,
        width: int,
        patch: int,
        max_grid: int,
        tokens: int,
        drop: float,
        *,
        bias: bool = False,
        align_corners: bool = False,
        position: Position = "cropped",
    ) -> None:
        super().__init__()
        self.patch, self.drop, self.tokens = patch, drop, tokens
        self.align_corners, self.position = align_corners, position
        self.embedder = nn.Linear(3 * patch * patch, width, bias=bias)
        self.pos_embed = nn.Parameter(torch.empty(1, max_grid * max_grid, width))
        self.token = nn.Parameter(torch.empty(tokens, width))
        for parameter in (self.pos_embed, self.token):
            # normal_ on the meta device makes PyTorch import its compiler, which takes a second or two.
            if not parameter.is_meta:
                nn.init.normal_(parameter, std=width**-0.5)
        self.max_grid = max_grid
        self.clip_length = 1
        """Number of frames that share one random viewport of the table in training; 1 for images."""

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, tokens + H W / patch^2, C)``."""
        batch, grid = images.shape[0], (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        x = self.embedder(self.patchify(images)) + self.positions(grid, batch)
        return torch.cat([self.token.to(x.dtype).expand(batch, -1, -1), x], dim=1)

    def pack(self, images: list[Tensor]) -> Tensor:
        """Images ``(1, 3, H_i, W_i)`` to one sequence ``(1, sum(tokens + L_i), C)``, image after image."""
        patches = [self.patchify(image) for image in images]
        x = self.embedder(torch.cat(patches, dim=1)).split([p.shape[1] for p in patches], dim=1)
        token, parts = self.token.to(x[0].dtype)[None], []
        for image, part in zip(images, x, strict=True):
            grid = (image.shape[-2] // self.patch, image.shape[-1] // self.patch)
            parts += [token, part + self.positions(grid, 1)]
        return torch.cat(parts, dim=1)

    def patchify(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, H W / patch^2, 3 patch^2)``, row-major."""
        cells = images.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # (B, 3, h, p, w, p)
        cells = cells.permute(0, 2, 4, 1, 3, 5).clone(memory_format=torch.contiguous_format)
        return cells.flatten(3).flatten(1, 2)

    def positions(self, grid: tuple[int, int], batch: int) -> Tensor:
        """Position embeddings of a grid, ``(1 or batch, h w, C)``."""
        table = self.pos_embed.transpose(1, 2).unflatten(2, (self.max_grid, self.max_grid))
        if self.position == "corner":
            window = corner_embedding(table, grid)
        elif not self.training:
            window = eval_embedding(table, grid, self.align_corners)
        else:
            if batch % self.clip_length:
                raise ValueError(f"{batch} frames are not divisible into clips of {self.clip_length}")
            window = train_embedding(table, grid, batch // self.clip_length, self.drop)
            if self.clip_length > 1 and len(window) > 1:
                window = window.repeat_interleave(self.clip_length, dim=0)
        return window.flatten(2).transpose(1, 2)
