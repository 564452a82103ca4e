"""What FeatSharp learns with: joint bilateral upsampling, and a fusion block with local attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agglo.nn.blocks import SwiGlu
from agglo.nn.neighbourhood import local_attention

RADIUS = 3
"""Both attentions look three cells around: 7 x 7."""

LAYER_SCALE = 1e-2
"""How much of attention and SwiGLU there is at the start: next to nothing, so that training begins at the mean."""


class Guided(nn.Module):
    """One stage of joint bilateral upsampling (Kopf et al. 2007; FeatUp's learned form, arXiv 2403.10516).

    ``y_i = sum_j w_ij x_j / sum_j w_ij`` over the 7 x 7 cells around ``i`` of the bilinear map ``x``, with
    ``w_ij = exp(e^tau g_i . g_j) exp(-|i - j|^2 / 2 sigma^2)`` and ``g`` a small network on the colours of the cells: a
    softmax whose logits are both exponents together. Distances are in neighbourhoods, so that the border is at 1.

    Args:
        factor: of this stage.
        width: of ``g``.
    """

    offsets: Tensor

    def __init__(self, factor: int, width: int = 32) -> None:
        super().__init__()
        self.factor = factor
        self.colours = nn.Sequential(nn.Conv2d(3, width, 1), nn.GELU(), nn.Conv2d(width, width, 1))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.log_sigma = nn.Parameter(torch.tensor(1 / RADIUS).log())  # one cell of the finer grid
        axis = torch.arange(-RADIUS, RADIUS + 1) / RADIUS
        self.register_buffer("offsets", axis[:, None].square() + axis[None].square(), persistent=False)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        """``(B, C, h, w)`` and RGB ``(B, 3, H, W)`` in [0, 1] to ``(B, C, factor h, factor w)``."""
        grid = x.shape[-2] * self.factor, x.shape[-1] * self.factor
        finer = F.interpolate(x, grid, mode="bilinear", align_corners=False)
        seen = F.normalize(self.colours(F.adaptive_avg_pool2d(images, grid) * 2 - 1), dim=1)
        key, value = (t.permute(0, 2, 3, 1)[:, None] for t in (seen, finer))
        bias = -self.offsets / (2 * (2 * self.log_sigma).exp())
        found = local_attention(key * self.temperature.exp(), key, value, bias[None])
        return found[:, 0].permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """A residual block with local attention on two maps side by side, then a linear mix of both.

    No norms: PHI-S has given every channel the same variance. The mix begins as the mean of the two maps, so that
    neither has to be unlearned.

    Args:
        width: channels of both maps together.
        heads: divide the width.
    """

    distances: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = SwiGlu(width, 2 * width)
        self.scales = nn.Parameter(torch.full((2, width), LAYER_SCALE))
        self.mix = nn.Conv2d(width, width // 2, 1, bias=False)
        eye = torch.eye(width // 2)
        with torch.no_grad():
            self.mix.weight.copy_(torch.cat([eye, eye], 1)[:, :, None, None] / 2)
        axis = torch.arange(-RADIUS, RADIUS + 1).abs().float()
        rows, columns = axis[:, None].expand(-1, len(axis)), axis[None].expand(len(axis), -1)
        slopes = [2.0 ** -((head + 2) // 2) for head in range(heads)]
        distances = [-slope * (columns if head % 2 else rows) for head, slope in enumerate(slopes)]
        self.register_buffer("distances", torch.stack(distances), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width, H, W)`` to ``(B, width / 2, H, W)``."""
        x = x.permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        parts = self.qkv(x).view(batch, height, width, 3, self.heads, channels // self.heads)
        q, k, v = parts.permute(3, 0, 4, 1, 2, 5)
        found = local_attention(q * (channels // self.heads) ** -0.5, k, v, self.distances)
        x = x + self.scales[0] * self.proj(found.permute(0, 2, 3, 1, 4).flatten(3))
        x = x + self.scales[1] * self.mlp(x)
        return self.mix(x.permute(0, 3, 1, 2))


def primes(number: int) -> list[int]:
    """The prime factors, ascending."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found
