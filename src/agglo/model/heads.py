"""A teacher's pair of heads, as data and as a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from agglo.config import build
from agglo.types import Features, FeatureSpec


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """One teacher's pair of heads, as data.

    Args:
        summary: ``{kind, **keys}`` of the summary head, or None.
        spatial: the same of the spatial head.
        summary_width: D of the teacher's summary.
        spatial_width: channels of the teacher's map.
        slot: which class token feeds the summary head, where the student has several.
        text: ``{kind, **keys}`` of the text tower whose embeddings the summary can be compared with, or None.
    """

    summary: dict[str, Any] | None
    spatial: dict[str, Any] | None
    summary_width: int | None
    spatial_width: int | None
    slot: int = 0
    text: dict[str, Any] | None = None


class Heads(nn.Module):
    """A teacher's heads: ``summary`` and ``spatial``, each of which may be absent."""

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
        """Student features to this teacher's space, float32 whatever the precision inside."""
        summary = spatial = None
        if self.summary is not None and features.summary is not None:
            token = features.summary.unflatten(1, (self.slots, -1))[:, self.slot]
            summary = self.summary(_as_weights(token, self.summary)).float()
        if self.spatial is not None and features.spatial is not None:
            spatial = self.spatial(_as_weights(features.spatial, self.spatial)).float()
        return Features(summary, spatial)


def _as_weights(x: Tensor, head: nn.Module) -> Tensor:
    return x.to(next(head.parameters()).dtype)
