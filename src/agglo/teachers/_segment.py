"""Encoders of segmentation models, which have no notion of a summary: SAM and the trunk of SAM 3."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from agglo.teachers._family import Family, grid


class SAM(Family):
    """SAM's vision encoder, read before its neck (as AM-RADIO does): the width of its blocks, at its own size only."""

    network = "SamVisionModel"
    fixed = rigid = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.summary = None

    def load(self, folder: Any) -> nn.Module:
        return self._headless(super().load(folder))

    def random(self) -> nn.Module:
        return self._headless(super().random())

    @staticmethod
    def _headless(net: Any) -> nn.Module:
        net.vision_encoder.neck = nn.Identity()
        return net

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, net(pixels).last_hidden_state.permute(0, 3, 1, 2)  # channels come last, before the neck


class SAM3(Family):
    """The trunk of SAM 3, un-normalised, before the neck; from the trunk alone, the image model or the video model."""

    network = "Sam3ViTModel"
    fixed = rigid = True
    keys = {r"^(?:detector_model\.)?(?:vision_encoder\.)?backbone\.": ""}

    def __init__(self, config: Any) -> None:
        config = getattr(config, "detector_config", config)
        config = getattr(config, "vision_config", config)
        super().__init__(getattr(config, "backbone_config", config))
        self.summary = None

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, grid(net(pixels).last_hidden_state, pixels, self.patch)
