"""Local attention of every cell of a map to its neighbourhood, computed in blocks to save memory."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8
"""Side of the blocks of queries that share one window of keys."""

_MASKED = -1e9
"""Added to the scores of masked keys; finite, so that a block with masked keys only does not give NaN."""


def local_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``softmax_j(q_i . k_j + bias[j - i]) v_j`` over the cells ``j`` within ``r`` rows and columns of ``i``.

    Cells outside the map are masked. Scores of a block of :data:`BLOCK` x :data:`BLOCK` queries are computed against
    the ``(BLOCK + 2 r)^2`` cells around it, which avoids a copy of every neighbourhood.

    Args:
        q, k: ``(B, heads, H, W, d)``, already scaled.
        v: ``(B, heads, H, W, e)``.
        bias: ``(heads, 2 r + 1, 2 r + 1)``, by row and column offset of the key.

    Returns:
        ``(B, heads, H, W, e)``.
    """
    height, width = q.shape[2:4]
    radius = bias.shape[-1] // 2
    blocks = -(-height // BLOCK), -(-width // BLOCK)
    below, right = blocks[0] * BLOCK - height, blocks[1] * BLOCK - width
    queries = _windows(F.pad(q, (0, 0, 0, right, 0, below)), BLOCK)
    around = (0, 0, radius, radius + right, radius, radius + below)
    keys, values = (_windows(F.pad(x, around), BLOCK + 2 * radius) for x in (k, v))
    mask = _bias(bias, (height, width)).to(q.dtype)
    if bias.requires_grad and torch.is_grad_enabled():  # fused kernels do not differentiate the mask
        found = (queries @ keys.transpose(-1, -2) + mask).softmax(-1) @ values
    else:
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
    # (B, blocks, heads, BLOCK^2, e) back to a map.
    found = found.view(q.shape[0], *blocks, q.shape[1], BLOCK, BLOCK, v.shape[-1]).permute(0, 3, 1, 4, 2, 5, 6)
    return found.reshape(q.shape[0], q.shape[1], blocks[0] * BLOCK, blocks[1] * BLOCK, -1)[:, :, :height, :width]


def _windows(x: Tensor, side: int) -> Tensor:
    """``(B, heads, H, W, d)`` to ``(B, blocks, heads, side^2, d)``: windows at a stride of :data:`BLOCK` cells."""
    found = x.unfold(2, side, BLOCK).unfold(3, side, BLOCK)  # (B, heads, rows, columns, d, side, side)
    return found.permute(0, 2, 3, 1, 5, 6, 4).reshape(x.shape[0], -1, x.shape[1], side * side, x.shape[-1])


def _bias(bias: Tensor, size: tuple[int, int]) -> Tensor:
    """The additive mask of the scores, ``(blocks, heads, BLOCK^2, (BLOCK + 2 r)^2)``."""
    radius = bias.shape[-1] // 2
    index, near, exists = _reach(size, radius, bias.device)
    inner = torch.where(near, bias.flatten(1)[:, index], _MASKED)
    return torch.where(exists[:, None, None], inner, _MASKED)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # the cached tensors may be used with gradients later
def _reach(size: tuple[int, int], radius: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per query and key of a block the offset's index and whether it is within ``radius``; per key whether it exists.

    Returns:
        ``(BLOCK^2, n)`` long, ``(BLOCK^2, n)`` bool and ``(blocks, n)`` bool with ``n = (BLOCK + 2 r)^2``.
    """
    side = BLOCK + 2 * radius
    offset = torch.arange(side)[None] - torch.arange(BLOCK)[:, None]  # from the neighbourhood's first cell
    near = (offset >= 0) & (offset <= 2 * radius)
    both = (near[:, None, :, None] & near[None, :, None, :]).reshape(BLOCK**2, side**2)
    clamped = offset.clamp(0, 2 * radius)
    index = clamped[:, None, :, None] * (2 * radius + 1) + clamped[None, :, None, :]
    inside = []
    for length in size:
        position = torch.arange(-(-length // BLOCK))[:, None] * BLOCK + torch.arange(side)[None] - radius
        inside.append((position >= 0) & (position < length))
    exists = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    return index.reshape(BLOCK**2, side**2).to(device), both.to(device), exists.reshape(-1, side**2).to(device)
