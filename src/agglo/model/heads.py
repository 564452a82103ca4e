"""The pair of heads of one teacher: configuration and module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from agglo.config import build
from agglo.types import Features, FeatureSpec


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Configuration of one teacher's heads.

    Args:
        summary: ``{kind, **keys}`` of the summary head, or None.
        spatial: ``{kind, **keys}`` of the spatial head, or None.
        summary_width: channels of the teacher's summary.
        spatial_width: channels of the teacher's map.
        slot: index of the class token that feeds the summary head, where the student has several.
        text: ``{kind, **keys}`` of the text tower whose embeddings are comparable with the summary, or None.
    """

    summary: dict[str, Any] | None
    spatial: dict[str, Any] | None
    summary_width: int | None
    spatial_width: int | None
    slot: int = 0
    text: dict[str, Any] | None = None


class Heads(nn.Module):
    """Heads of one teacher: ``summary`` and ``spatial``, either of which may be None."""

    def __init__(self, config: HeadConfig, spec: FeatureSpec, *, installed: bool = True) -> None:
        super().__init__()
        self.slot, self.slots = (config.slot if spec.slots > 1 else 0), spec.slots
        self.summary = self.spatial = None
        if config.summary is not None and spec.summary is not None:
            source = spec.summary // spec.slots
            self.summary = build("heads", config.summary, source, config.summary_width, installed=installed)
        if config.spatial is not None:
            self.spatial = build("heads", config.spatial, spec.spatial, config.spatial_width, installed=installed)

    def forward(self, features: Features) -> Features:
        """Map student features to this teacher's feature space, in float32."""
        summary = spatial = None
        if self.summary is not None and features.summary is not None:
            token = features.summary.unflatten(1, (self.slots, -1))[:, self.slot]
            summary = self.summary(_to_dtype_of(self.summary, token)).float()
        if self.spatial is not None and features.spatial is not None:
            spatial = self.spatial(_to_dtype_of(self.spatial, features.spatial)).float()
        return Features(summary, spatial)


def _to_dtype_of(head: nn.Module, x: Tensor) -> Tensor:
    return x.to(next(head.parameters(), x).dtype)  # a quantised head has no parameters
