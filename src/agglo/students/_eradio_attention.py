"""Attention blocks of E-RADIO on windows of a map, with a learned position bias.

Modules and parameters have the names of the released checkpoints, so that weights load without renaming. Maps are
``(B, C, H, W)``; tokens are used inside :class:`AttentionBlock` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.students._eradio_convs import ConvBN, fit

RECOMPUTED = ("relative_coords_table", "relative_position_index", "relative_bias")
"""Buffers of released checkpoints that are recomputed from the window and the weights."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Options common to all attention blocks, as in :class:`agglo.students.hybrid.Hybrid`."""

    bias_hidden: int
    conv_resample: bool
    group_ratio: float
    layer_scale: float | None
    mlp: Literal["gelu", "swiglu"]
    multi_query: bool


class RelativeBias(nn.Module):
    """Attention bias as a smooth function of the offset: ``B = 16 sigmoid(mlp(coords))``.

    As in Swin V2 (arXiv:2111.09883): an offset ``d`` in [-(w - 1), w - 1] becomes ``sign(u) log2(|u| + 1) / log2 8``
    with ``u = 8 d / (trained window - 1)``, so that the window can change after training.

    Attributes:
        window: current w, in cells.
    """

    def __init__(self, heads: int, hidden: int, window: int) -> None:
        super().__init__()
        self.trained = self.window = window
        self.cpb_mlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, heads, bias=False))
        self.frozen: Tensor | None
        self.register_buffer("frozen", None, persistent=False)

    def forward(self) -> Tensor:
        """``(1, heads, w^2, w^2)``, queries by keys, both row-major; constant after :meth:`freeze`."""
        return self._compute() if self.frozen is None else self.frozen

    def _compute(self) -> Tensor:
        window, weight = self.window, next(self.cpb_mlp.parameters(), torch.empty(0))  # quantised: no parameters
        offsets = torch.arange(1 - window, window, device=weight.device, dtype=torch.float32) * (8 / (self.trained - 1))
        scaled = offsets.sign() * (offsets.abs() + 1).log2() / 3
        coords = torch.stack(torch.meshgrid(scaled, scaled, indexing="ij"), dim=-1)
        table = 16 * torch.sigmoid(self.cpb_mlp(coords.to(weight.dtype))).permute(2, 0, 1)
        # Cell (y_q - y_k + w - 1, x_q - x_k + w - 1) of the table for each pair: a sliding window with keys reversed.
        pairs = table.unfold(1, window, 1).unfold(2, window, 1).flip(3, 4)
        return pairs.reshape(1, -1, window**2, window**2)

    @torch.no_grad()
    def freeze(self) -> None:
        """Compute the bias from the current weights and store it."""
        if self.frozen is None:
            self.frozen = self._compute()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        for name in RECOMPUTED:
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


class WindowAttention(nn.Module):
    """Softmax attention inside windows with logits ``q k^T / sqrt(head width) + B``; projections have no bias."""

    def __init__(self, width: int, heads: int, window: int, options: AttentionOptions) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.shared = 1 if options.multi_query else heads  # number of key and value heads
        self.qkv = nn.Linear(width, width + 2 * self.shared * self.head_width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.pos_emb_funct = RelativeBias(heads, options.bias_hidden, window)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows ``(B n, w^2, C)`` to the same; ``mask (B n, 1, w^2, w^2)`` is added to the logits."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.shared, self.shared), dim=1)
        k, v = k.expand_as(q), v.expand_as(q)
        bias = self.pos_emb_funct().to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias if mask is None else bias + mask.to(q.dtype))
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` of four times the width, or ``fc2(a * silu(b))`` with ``a, b`` the halves of ``fc1(x)``."""

    def __init__(self, width: int, kind: Literal["gelu", "swiglu"]) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        hidden = 64 * (2 * width // 64) if self.gated else 4 * width
        self.fc1 = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        x = self.fc1(x)
        if not self.gated:
            return self.fc2(F.gelu(x))
        value, gate = x.chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class AttentionBlock(nn.Module):
    """One transformer block on windows of a map, or of the map sub-sampled by ``ratio``, averaged with its input.

    Args:
        width: C.
        heads: attention heads.
        window: w, in cells of the (sub-sampled) map.
        ratio: r; 1 uses a 3x3 convolution instead of sub-sampling.
        shifted: windows are cyclically shifted by half a window (Swin, arXiv:2103.14030).
        options: common to all blocks.
    """

    def __init__(
        self, width: int, heads: int, window: int, ratio: int, shifted: bool, options: AttentionOptions
    ) -> None:
        super().__init__()
        self.ratio, self.shifted = ratio, shifted
        self.pre_conv = self.downsample_op = self.downsample_mixer = self.upsample_op = None
        if ratio > 1 and options.conv_resample:
            self.downsample_op = nn.Conv2d(width, width, ratio, ratio)
            self.upsample_op = nn.ConvTranspose2d(width, width, ratio, ratio)
        elif ratio > 1:
            self.downsample_mixer, self.upsample_op = ConvBN(width, width, 1), ConvBN(width, width, 1)
        elif options.group_ratio >= 0:
            self.pre_conv = ConvBN(width, width, 3, groups=max(1, int(options.group_ratio * width)))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)  # epsilon 1e-5, unlike RADIO's ViTs
        self.attn = WindowAttention(width, heads, window, options)
        self.mlp = Mlp(width, options.mlp)
        self.gamma1 = self.gamma2 = None
        if options.layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((width,), options.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((width,), options.layer_scale))

    @property
    def window(self) -> int:
        """The current window, in cells."""
        return self.attn.pos_emb_funct.window

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        t = self._enter(x)
        size = (t.shape[-2], t.shape[-1])
        window = self.window
        t = fit(t, (-(-size[0] // window) * window, -(-size[1] // window) * window), "reflect")
        grid = (t.shape[-2], t.shape[-1])
        half = window // 2 if self.shifted else 0
        tokens = to_windows(t.roll((-half, -half), (2, 3)) if half else t, window)
        mask = shift_mask(grid, window, tokens).repeat(x.shape[0], 1, 1, 1) if half else None
        y = self.attn(self.norm1(tokens), mask)
        tokens = tokens + (y if self.gamma1 is None else y * self.gamma1)
        y = self.mlp(self.norm2(tokens))
        tokens = tokens + (y if self.gamma2 is None else y * self.gamma2)
        t = from_windows(tokens, window, grid)
        t = fit(t.roll((half, half), (2, 3)) if half else t, size, "reflect")
        return 0.5 * (self._leave(t, (x.shape[-2], x.shape[-1])) + x)

    def _enter(self, x: Tensor) -> Tensor:
        if self.downsample_op is not None:
            return self.downsample_op(x)
        if self.downsample_mixer is not None:
            return self.downsample_mixer(F.avg_pool2d(x, self.ratio))
        return x + (x if self.pre_conv is None else self.pre_conv(x))

    def _leave(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.upsample_op is None:
            return x
        if self.downsample_mixer is not None:
            # A 1x1 convolution commutes with repeating cells and is ratio^2 times cheaper before it; the norm has
            # the same statistics either way.
            x = F.interpolate(self.upsample_op(x), scale_factor=self.ratio, mode="nearest")
        else:
            x = self.upsample_op(x)
        return fit(x, size, "reflect")


def to_windows(x: Tensor, window: int) -> Tensor:
    """A map ``(B, C, H, W)`` to its windows ``(B n, w^2, C)``, windows and cells row-major."""
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window**2, channels)


def from_windows(x: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`to_windows`; ``grid`` is the map's (H, W)."""
    x = x.reshape(-1, grid[0] // window, grid[1] // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, *grid, x.shape[-1]).permute(0, 3, 1, 2)


def shift_mask(grid: tuple[int, int], window: int, like: Tensor) -> Tensor:
    """``(n, 1, w^2, w^2)``: -100 between cells that share a window only because of the cyclic shift."""
    sides = []
    for side in grid:
        cells = torch.arange(side, device=like.device)
        sides.append((cells >= side - window).int() + (cells >= side - window // 2).int())
    regions = to_windows((3 * sides[0][:, None] + sides[1]).expand(1, 1, -1, -1), window).squeeze(-1)
    return (regions[:, None, :] != regions[:, :, None]).to(like.dtype).mul(-100)[:, None]


class AttentionChain(nn.Module):
    """One attention block for each sub-sampling ratio; coarse ones come first in the released models."""

    def __init__(self, blocks: Iterable[AttentionBlock]) -> None:
        super().__init__()
        self.attention_blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return self.attention_blocks(x)


class AttentionStage(nn.Sequential):
    """Chains of attention blocks on a map that is blown up, where need be, until all windows fit.

    Args:
        width: C.
        depth: number of chains.
        heads: attention heads.
        windows: one for each ratio; the first serves the ratios that have none.
        ratios: sub-sampling of each block of a chain.
        shift: every second chain has its windows half a window further.
        options: what all blocks share.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        windows: Sequence[int],
        ratios: Sequence[int],
        shift: bool,
        options: AttentionOptions,
    ) -> None:
        windows = [*windows, *[windows[0]] * len(ratios)]
        super().__init__(
            *(
                AttentionChain(
                    AttentionBlock(width, heads, window, ratio, shift and index % 2 == 1, options)
                    for window, ratio in zip(windows, ratios, strict=False)
                )
                for index in range(depth)
            )
        )

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        blocks = [module for module in self.modules() if isinstance(module, AttentionBlock)]
        step = max(block.ratio for block in blocks) * max(block.window for block in blocks)
        size = (input.shape[-2], input.shape[-1])
        fitting = (-(-size[0] // step) * step, -(-size[1] // step) * step)
        if fitting == size:
            return super().forward(input)
        x = super().forward(F.interpolate(input, size=fitting, mode="nearest"))
        return F.interpolate(x, size=size, mode="nearest")
