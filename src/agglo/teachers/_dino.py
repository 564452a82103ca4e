"""Self-supervised encoders: DINOv2, with registers or without, and DINOv3, transformer or ConvNeXt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agglo.teachers._family import Family, grid


class DINO(Family):
    """A class token, registers, then patches; summary (the class token) and map are both after the final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.network = {
            "dinov2": "Dinov2Model",
            "dinov2_with_registers": "Dinov2WithRegistersModel",
            "dinov3_vit": "DINOv3ViTModel",
        }[self.config.model_type]
        self.prefix = 1 + int(getattr(self.config, "num_register_tokens", 0) or 0)

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels)
        return out.pooler_output, grid(out.last_hidden_state, pixels, self.patch, self.prefix)


class DINOv3ConvNext(Family):
    """A pyramid of stride 32: the mean of the last stage stands before its cells, and all pass the final norm."""

    network = "DINOv3ConvNextModel"
    tokens = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patch = self.step = 4 * 2 ** (len(self.config.hidden_sizes) - 1)
        self.spatial = self.summary = int(self.config.hidden_sizes[-1])

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels)
        return out.pooler_output, grid(out.last_hidden_state, pixels, self.patch, prefix=1)
