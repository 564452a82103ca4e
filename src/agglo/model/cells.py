"""Text-aligned vectors of single cells of a map, from the pass that also gives summary and spatial features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.model.model import Model
from agglo.types import ConfigError, Output


@torch.no_grad()
def text_cells(
    model: Model, images: Tensor, head: str | None = None, *, heads: Iterable[str] = (), window: int | None = None
) -> tuple[Output, Tensor]:
    """Features of images, and for every cell a vector that is comparable with text.

    The summary head is applied to each cell as if it were the summary: to the patch tokens where these have the class
    token's width (as open-vocabulary segmentation with RADIO does), or to the map that a timm backbone pools into its
    summary. For a linear head on pooled features this is the class activation map (Zhou et al. 2016,
    arXiv:1512.04150, eq. 2).

    Args:
        model: with a text-aligned head.
        images: RGB ``(B, 3, H, W)`` in [0, 1], of a legal size, on the model's device.
        head: the text-aligned head; None for the first.
        heads: other heads to apply.
        window: side of the attention windows, in patches.

    Returns:
        The output, and ``(B, E, h, w)`` float32 of unit norm; the grid of a timm backbone is that of its last stage.

    Raises:
        TypeError: the model has no text tower.
        ConfigError: its text-aligned head cannot be applied to cells.
    """
    name = model.text_head(head)
    summary_head: Any = model.heads[name]
    summary_head = summary_head.summary
    pool = getattr(getattr(model.student, "backbone", None), "global_pool", None)
    with _inputs_of(pool) as pooled:
        out = model(images, heads=list(heads), resize=False, window=window)
    width = getattr(summary_head, "source", None)
    maps = [each for each in (*pooled, out.spatial) if each is not None and each.ndim == 4 and each.shape[1] == width]
    if not maps:
        raise ConfigError(
            f"the head of {name} takes {width} channels, and no map of this model has as many: heatmaps of a text need "
            "a ViT student, or a timm student that pools its last stage"
        )
    cells = summary_head(maps[0].to(next(summary_head.parameters(), maps[0]).dtype))
    return out, F.normalize(cells.float(), dim=1)


@contextlib.contextmanager
def _inputs_of(module: nn.Module | None) -> Iterator[list[Tensor]]:
    """The first input of each call of a module."""
    seen: list[Tensor] = []
    if not isinstance(module, nn.Module):
        yield seen
        return
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()
