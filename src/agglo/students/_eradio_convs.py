"""Convolutional parts of E-RADIO: stem, convolutional stages, downsampling, neck.

Modules and parameters have the names of the released checkpoints, so that weights load without renaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold a BatchNorm at inference into the convolution before it, in float64; the convolution gets a bias."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("a BatchNorm without running statistics cannot be folded")
    scale = norm.weight.double() * (var.double() + norm.eps).rsqrt()
    bias = 0 if conv.bias is None else conv.bias.double()
    bias = (bias - mean.double()) * scale + norm.bias.double()
    conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


def fit(x: Tensor, size: tuple[int, int], mode: Literal["reflect", "constant"]) -> Tensor:
    """Pad or crop a map ``(B, C, H, W)`` at the bottom and on the right."""
    down, right = size[0] - x.shape[-2], size[1] - x.shape[-1]
    if down == right == 0:
        return x
    return F.pad(x[..., : size[0], : size[1]], (0, max(0, right), 0, max(0, down)), mode=mode)


class ConvBN(nn.Module):
    """Convolution without bias, "same" padding, then BatchNorm; a single convolution after :meth:`deploy`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C', ceil(H / stride), ceil(W / stride))``."""
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)

    def deploy(self) -> None:
        """Fold the norm, if not done yet."""
        if self.bn is not None:
            fold(self.conv, self.bn)
            self.bn = None


def stack_tiles(x: Tensor, factor: int) -> Tensor:
    """Cut a map into ``factor x factor`` contiguous tiles and stack them as channels.

    ``out[c f^2 + i f + j, y, x] = in[c, i H/f + y, j W/f + x]``: unlike in pixel-unshuffle, a tile is a contiguous
    region. No released variant uses it.
    """
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, factor, height // factor, factor, width // factor)
    return x.permute(0, 1, 2, 4, 3, 5).reshape(batch, channels * factor**2, height // factor, width // factor)


class Stem(nn.Module):
    """Images to the map of stage 0 at stride 4: two strided convolutions, or stacked tiles and one convolution."""

    def __init__(self, stem_width: int, width: int, *, tiles: bool) -> None:
        super().__init__()
        self.tiles = tiles
        if tiles:
            self.conv_down = nn.Sequential(ConvBN(48, width, 3), nn.ReLU())
        else:
            first, second = ConvBN(3, stem_width, 3, stride=2), ConvBN(stem_width, width, 3, stride=2)
            self.conv_down = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, H / 4, W / 4)``."""
        return self.conv_down(stack_tiles(images, 4) if self.tiles else images)


class Downsample(nn.Module):
    """Half the sides, twice the channels: a strided convolution, or stacked tiles and a 1x1 convolution."""

    def __init__(self, width: int, *, tiles: bool) -> None:
        super().__init__()
        self.tiles = tiles
        self.reduction = ConvBN(4 * width, 2 * width, 1) if tiles else ConvBN(width, 2 * width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, 2C, H / 2, W / 2)``."""
        return self.reduction(stack_tiles(x, 2) if self.tiles else x)


class Bottleneck(nn.Module):
    """``x + silu(cv2(silu(cv1(x))))``, both 3x3 at the same width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBN(width, width, 3), ConvBN(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return x + F.silu(self.cv2(F.silu(self.cv1(x))))


class CrossStage(nn.Module):
    """A cross-stage partial stage (Wang et al. 2020, arXiv:1911.11929) that concatenates every intermediate.

    A 1x1 convolution gives ``a, b`` of half the width; bottlenecks are chained from ``b``; ``[a, b, m_1, ..., m_n]``
    goes through a 1x1 convolution back to the full width.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        half = width // 2
        self.cv1 = ConvBN(width, 2 * half, 1)
        self.cv2 = ConvBN((2 + depth) * half, width, 1)
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        parts = list(F.silu(self.cv1(x)).chunk(2, dim=1))
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        return F.silu(self.cv2(torch.cat(parts, dim=1)))


class ResidualConv(nn.Module):
    """``x + gamma * conv2(gelu(conv1(x)))``; ``gamma`` optional."""

    def __init__(self, width: int, layer_scale: float | None) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(width, width, 3), ConvBN(width, width, 3)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        y = self.conv2(F.gelu(self.conv1(x)))
        return x + (y if self.gamma is None else y * self.gamma[:, None, None])


class Level(nn.Module):
    """A stage's blocks, then downsampling, except in the last stage."""

    def __init__(self, blocks: nn.Module, downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks, self.downsample = blocks, downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, C, H, W)`` to the stage's output of the same shape, and to the input of the next stage."""
        x = self.blocks(x)
        return x, x if self.downsample is None else self.downsample(x)


class Projection(nn.Module):
    """Nearest upsampling, depth-wise 3x3 convolution, BatchNorm, 1x1 convolution to the neck's width."""

    def __init__(self, inputs: int, outputs: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
        self.norm: nn.BatchNorm2d | None = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, D, scale H, scale W)``."""
        x = self.conv1(x if self.scale == 1 else F.interpolate(x, scale_factor=self.scale, mode="nearest"))
        return self.conv2(x if self.norm is None else self.norm(x))

    def deploy(self) -> None:
        """Fold the norm into the convolution before it."""
        if self.norm is not None:
            fold(self.conv1, self.norm)
            self.norm = None


class Neck(nn.Module):
    """The sum of the later stages' maps on the grid of the first of them, at one width.

    A map that already has the grid and the width is not projected. With ``start == 0`` the upsampling factors of the
    released code are 1, 1, 2, 4, so that coarser maps cover a corner only; reproduced for exactness.
    """

    def __init__(self, widths: Sequence[int], start: int, outputs: int) -> None:
        super().__init__()
        self.start = start
        self.neck_features_proj = nn.ModuleList()
        for stage in range(start, len(widths)):
            scale = 2 ** max(0, stage - max(start, 1))
            keep = scale == 1 and widths[stage] == outputs
            self.neck_features_proj.append(nn.Identity() if keep else Projection(widths[stage], outputs, scale))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """All stages' maps to ``(B, D, H / stride, W / stride)``."""
        total = None
        for project, x in zip(self.neck_features_proj, maps[self.start :], strict=True):
            y = project(x)
            total = y if total is None else total + fit(y, (total.shape[-2], total.shape[-1]), "constant")
        if total is None:
            raise ValueError("a neck needs the map of at least one stage")
        return total
