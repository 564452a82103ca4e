"""Agglomerative models as teachers: RADIO itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agglo.teachers._family import Family, grid


class Radio(Family):
    """RADIO as transformers has it: the chosen class tokens side by side, and the map; it normalises pixels itself."""

    network = "RadioModel"
    conditions = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.slots = len(self.config.summary_idxs)
        self.summary = self.slots * self.spatial

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels)
        return out.summary, grid(out.features, pixels, self.patch)
