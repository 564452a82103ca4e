"""Vision encoders that were trained beside a text tower: SigLIP, SigLIP2 in both its forms, CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agglo.teachers._family import Family, grid


class SigLIP(Family):
    """SigLIP, and SigLIP2 of a fixed resolution: attention-pooled summary, map after the final norm, no prefix.

    The sides are cut to whole patches: the last 6 of 384 pixels never enter a network with patch 14, and a view of 378
    gives the same tokens with every cell where it says it is.
    """

    network = "SiglipVisionModel"
    fixed = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.native is not None:
            self.native -= self.native % self.patch
        if not getattr(self.config, "vision_use_head", True):
            self.summary = None

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels, interpolate_pos_encoding=True)
        return out.pooler_output, grid(out.last_hidden_state, pixels, self.patch)

    def without_summary(self, net: Any) -> None:
        net.use_head, net.head = False, None


class SigLIP2NaFlex(Family):
    """SigLIP2 of flexible resolution: it takes patches and the shape of their grid, and follows the student's size."""

    network = "Siglip2VisionModel"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.native = self.patch * round(int(self.config.num_patches) ** 0.5)
        if not getattr(self.config, "vision_use_head", True):
            self.summary = None

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        # All images of a batch have one size, so nothing is padded and there is nothing to mask. A mask would be looked
        # at on the host, as the shapes are: on the device both would make it wait.
        height, width = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        count = len(pixels)
        patches = F.pixel_unshuffle(pixels, self.patch).unflatten(1, (3, self.patch, self.patch))
        patches = patches.permute(0, 4, 5, 2, 3, 1).reshape(count, height * width, -1)  # row, column, channel last
        out = net(
            pixel_values=patches,
            pixel_attention_mask=None,
            spatial_shapes=torch.tensor([[height, width]] * count, device="cpu"),
        )
        return out.pooler_output, grid(out.last_hidden_state, pixels, self.patch)

    def without_summary(self, net: Any) -> None:
        net.use_head, net.head = False, None


class CLIP(Family):
    """CLIP: class token first, map before the final norm.

    The summary is the projected class token, which text is compared with, where the checkpoint holds the projection;
    else the class token after the final norm.
    """

    fixed = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.native is not None:
            self.native -= self.native % self.patch
        whole = config is not self.config
        self.projects = whole or any("WithProjection" in name for name in config.architectures or ())
        if whole:  # the larger model's word counts: the vision part may still state its default
            self.config.projection_dim = config.projection_dim
        self.network = "CLIPVisionModelWithProjection" if self.projects else "CLIPVisionModel"
        self.summary = int(self.config.projection_dim) if self.projects else self.spatial

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels, interpolate_pos_encoding=True)
        summary = out.image_embeds if self.projects else out.pooler_output
        return summary, grid(out.last_hidden_state, pixels, self.patch, prefix=1)
