"""A tiny teacher for tests and dry runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from agglo.teachers.base import Teacher, check_images
from agglo.types import ConfigError, Features, FeatureSpec


class Toy(Teacher):
    """A fixed random linear map of patches: instant, learnable, and the same in every process.

    ``spatial = tanh(W patch)``, ``summary = tanh(V mean(spatial))`` with Gaussian W and V drawn from ``seed`` and
    scaled to unit output variance for white input.

    Args:
        channels: width of the spatial map.
        stride: side of a patch in pixels.
        summary: width of the summary, or None for a dense-only teacher.
        seed: of the random map.

    Raises:
        ConfigError: a width or the stride is not positive.
    """

    licence = "Apache-2.0"
    patches: Tensor
    pooled: Tensor | None

    def __init__(self, *, channels: int = 12, stride: int = 16, summary: int | None = 20, seed: int = 0) -> None:
        super().__init__()
        if channels < 1 or stride < 1 or (summary is not None and summary < 1):
            raise ConfigError(
                f"teachers.toy: channels, stride and summary must be positive; got {channels}, {stride}, {summary}"
            )
        draw = torch.Generator().manual_seed(seed)
        patches = torch.randn(channels, 3, stride, stride, generator=draw) / (3 * stride**2) ** 0.5
        self.register_buffer("patches", patches)
        pooled = None if summary is None else torch.randn(summary, channels, generator=draw) / channels**0.5
        self.register_buffer("pooled", pooled)
        self.spec = FeatureSpec(summary=summary, spatial=channels, stride=stride, step=stride)
        self.eval()

    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1]; H and W are multiples of the stride."""
        check_images(images, self.spec.step)
        spatial = F.conv2d((images - 0.5) * 4, self.patches, stride=self.spec.stride).tanh()
        if self.pooled is None:
            return Features(None, spatial)
        return Features(F.linear(spatial.mean((2, 3)), self.pooled).tanh(), spatial)
