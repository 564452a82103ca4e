"""Token merging and the decoder of RADIO1D (docs/checkpoints.md, 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.nn.blocks import NORM_EPS, Block
from agglo.types import ConfigError

Grid = tuple[int, int]
"""Height and width in tokens."""


def merged(grid: Grid, times: int = 1) -> Grid:
    """The grid after ``times`` 2x2 merges; an odd side is padded to even first, so it rounds up."""
    cell = 2**times
    return -(-grid[0] // cell), -(-grid[1] // cell)


def check_levels(key: str, levels: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the sorted indices of the blocks before which the grid changes.

    Raises:
        ConfigError: there are none, one is repeated, or one is not the index of a block.
    """
    if not levels:
        raise ConfigError(
            f"{key}: needs at least one block of 0 to {depth - 1}, e.g. [{depth // 2}]; for a ViT without merging use "
            "kind 'vit'"
        )
    outside = [level for level in levels if not 0 <= level < depth]
    if outside:
        near = min(max(outside[0], 0), depth - 1)
        raise ConfigError(f"{key}: {outside[0]} is not a block of 0 to {depth - 1}; the nearest is {near}")
    if len(set(levels)) < len(levels):
        raise ConfigError(f"{key}: {list(levels)} has a block twice")
    return tuple(sorted(levels))


class Merge(nn.Module):
    """Merges 2x2 tokens to one of twice the width (patch merging, Swin, arXiv:2103.14030).

    Odd sides are zero-padded at the bottom or right. The four cells are concatenated column-major,
    ``(dx, dy, c)`` with ``dx`` slowest, normalised (epsilon 1e-5) and projected ``4C -> 2C`` without bias.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, h w, C)`` to ``(B, ceil(h / 2) ceil(w / 2), 2C)``, both row-major."""
        height, width = grid
        cells = F.pad(x.unflatten(1, grid), (0, 0, 0, width % 2, 0, height % 2))
        rows, columns = merged(grid)
        cells = cells.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))  # (B, rows, dy, columns, dx, C)
        cells = cells.permute(0, 1, 3, 4, 2, 5).reshape(x.shape[0], rows * columns, -1)
        return self.reduction(self.norm(cells))


class Split(nn.Module):
    """Splits a token into 2x2 tokens of half the width; the decoder's counterpart of :class:`Merge`.

    A projection ``C -> 2C`` without bias, laid out row-major, ``(dy, dx, c)`` with ``dy`` slowest, then a LayerNorm
    (epsilon 1e-5) over the ``C / 2`` channels.

    Args:
        width: C, even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expansion = nn.Linear(width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(width // 2)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """``(B, h w, C)`` to ``(B, 2h 2w, C / 2)``, both row-major."""
        height, width = grid
        cells = self.expansion(x).view(x.shape[0], height, width, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        return self.norm(cells.reshape(x.shape[0], 4 * height * width, -1))


class Decoder(nn.Module):
    """Decodes the kept 1-D tokens to a map at the patch grid.

    A table of filler tokens is resized to the merged grid, and the kept tokens replace its first entries. Blocks
    without qkv bias process ``[prefix, grid]``; the grid is split 2x2 before the blocks in ``levels``.

    Args:
        width: channels of the 1-D tokens, the encoder's last.
        heads: attention heads at ``width``; halved with the width at every split.
        depth: number of blocks.
        levels: the blocks before which the grid is split, ascending.
        mlp_ratio: hidden width of the MLPs over that of their block.
        prefix: class and register tokens.
        filler_grid: side of the filler table.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        levels: Sequence[int],
        mlp_ratio: float,
        prefix: int,
        filler_grid: int,
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.filler_tokens = nn.Parameter(torch.randn(filler_grid**2, width) * width**-0.5)
        self.prefix_tokens = nn.Parameter(torch.randn(prefix, width) * width**-0.5)
        blocks, splits, projections = [], [], []
        for index in range(depth):
            if index in self.levels:
                splits.append(Split(width))
                projections.append(nn.Linear(width, width // 2, bias=False))
                width, heads = width // 2, heads // 2
            blocks.append(Block(width, heads, int(width * mlp_ratio), qkv_bias=False))
        self.blocks = nn.ModuleList(blocks)
        self.upscale_blocks = nn.ModuleList(splits)
        self.prefix_proj_blocks = nn.ModuleList(projections)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            tokens: ``(B, n, C)``, the first ``n`` tokens of the merged grid, row-major.
            grid: ``(h, w)`` of the patches and of the result.

        Returns:
            Prefix ``(B, K + R, C')`` and spatial tokens ``(B, h w, C')``, ``C' = C / 2^splits``.
        """
        grid_now = merged(grid, len(self.levels))
        filler = self._filler(grid_now)[tokens.shape[1] :].to(tokens.dtype)
        prefix = self.prefix_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        x = torch.cat([prefix, tokens, filler.expand(tokens.shape[0], -1, -1)], dim=1)
        count = prefix.shape[1]
        for index, block in enumerate(self.blocks):
            if index in self.levels:
                level = self.levels.index(index)
                spatial = self.upscale_blocks[level](x[:, count:], grid_now)
                x = torch.cat([self.prefix_proj_blocks[level](x[:, :count]), spatial], dim=1)
                grid_now = (2 * grid_now[0], 2 * grid_now[1])
            x = block(x)
        x = self.norm(x)
        # Remove the cells that the merges padded.
        spatial = x[:, count:].unflatten(1, grid_now)[:, : grid[0], : grid[1]]
        return x[:, :count], spatial.flatten(1, 2)

    def _filler(self, grid: Grid) -> Tensor:
        """The filler table at a grid, ``(h w, C)``."""
        side = math.isqrt(len(self.filler_tokens))
        if grid == (side, side):
            return self.filler_tokens
        table = self.filler_tokens.float().T.unflatten(1, (side, side))[None]
        resized = F.interpolate(table, size=grid, mode="bilinear", align_corners=False)
        return resized[0].flatten(1).T
