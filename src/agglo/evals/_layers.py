"""Features of several depths of a model at once, for probes that read more than the last block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from agglo.evals._features import kept, step_of
from agglo.evals.base import Backbone
from agglo.types import Features, FeatureSpec


class Layers(nn.Module):
    """A model seen through several of its blocks: their maps, the final norm applied, side by side in the channels.

    Args:
        model: has ``intermediates`` and a student of ``depth`` blocks.
        count: how many of L blocks: ``L/n - 1, 2L/n - 1, ..., L - 1`` (METHOD 7: 4 for Probe3d).
    """

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        self.model = model
        depth = int(model.student.depth)
        self.blocks = sorted({max(0, (i + 1) * depth // count - 1) for i in range(count)})
        spec: FeatureSpec = model.spec
        self.spec = FeatureSpec(None, len(self.blocks) * (spec.spatial or 0), spec.stride, step_of(model))

    def forward(self, images: Tensor) -> Features:
        """``(B, 3, H, W)`` to a map ``(B, n * D, h, w)`` and no summary."""
        maps = [found.spatial for found in self.model.intermediates(images, self.blocks, norm=True)]
        return Features(None, torch.cat([each for each in maps if each is not None], 1))


def layered(model: Backbone, count: int) -> tuple[Backbone, int]:
    """The model seen through ``count`` of its blocks, and how many they are: 1 where it shows no blocks.

    The same object for the same model within a suite, so that its features are computed once.
    """
    depth = getattr(getattr(model, "student", None), "depth", 0)
    if count == 1 or not depth or not hasattr(model, "intermediates"):
        return model, 1
    seen: Layers = kept(("layers", count, id(model)), lambda: Layers(model, count))
    return seen, len(seen.blocks)
