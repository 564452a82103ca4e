"""Transformer blocks of RADIO's ViTs: pre-norm, fused qkv, exact GELU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from agglo.nn.packing import Packing

NORM_EPS = 1e-6
"""LayerNorm epsilon of backbones and attention heads; MLP heads and the norm inside an MLP use PyTorch's 1e-5."""

MlpKind = Literal["gelu", "swiglu"]


class LayerScale(nn.Module):
    """``y = gamma * x`` per channel (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention; keys ``qkv`` (3C, C) in the order q, k, v, and ``proj`` (C, C)."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; with a packing ``(1, N, C)``, each token attends to its own sequence."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v) if packing is None else packing.attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """``fc2(norm(gelu(fc1(x))))``, the norm optional."""

    def __init__(self, width: int, hidden: int, *, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden) if norm else None
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x if self.norm is None else self.norm(x))


class SwiGlu(nn.Module):
    """``w3(silu(a) * b)`` with ``a, b = halves of w12(x)`` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """``x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))``; the layer scales optional.

    Args:
        width: C.
        heads: attention heads.
        hidden: hidden width of the MLP.
        qkv_bias: whether ``qkv`` has a bias.
        layer_scale: initial value of both layer scales, or None for none.
        mlp: ``gelu`` or ``swiglu``.
        mlp_norm: LayerNorm between the MLP's activation and its last layer (``gelu`` only).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        mlp: MlpKind = "gelu",
        mlp_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = SwiGlu(width, hidden) if mlp == "swiglu" else Mlp(width, hidden, norm=mlp_norm)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """``(B, N, C)`` to ``(B, N, C)``; with a packing, see :class:`Attention`."""
        x = x + self.ls1(self.attn(self.norm1(x), packing))
        return x + self.ls2(self.mlp(self.norm2(x)))
