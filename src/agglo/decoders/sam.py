"""SAM of transformers without its encoder: features before or after its neck to masks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.extras import require
from agglo.types import AssetError

_BOXES = 32


def load(decoder: str, where: str) -> Any:
    """Load a SAM of transformers, in eval mode and float32.

    Args:
        decoder: a folder or a name on the hub, such as ``facebook/sam-vit-huge``.
        where: beginning of error messages.

    Raises:
        AssetError: it cannot be read, or weights are missing.
    """
    transformers = require("transformers", "teachers")
    try:
        sam, info = transformers.SamModel.from_pretrained(
            decoder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise AssetError(
            f"{where}: no SAM in {decoder!r} ({error}); use a folder or a hub checkpoint with model.safetensors, such "
            "as facebook/sam-vit-huge"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise AssetError(f"{decoder} lacks {len(missing)} weights of a SAM, such as {missing[0]}")
    return sam.eval().requires_grad_(False)


def widths(config: Any) -> tuple[int, int]:
    """Channels of the two cuts of a SAM: before its neck (its blocks), and after it (its decoder)."""
    return int(config.vision_config.hidden_size), int(config.prompt_encoder_config.hidden_size)


def grid_side(config: Any) -> int:
    """Cells of a side of the square map that the decoder reads."""
    return int(config.prompt_encoder_config.image_embedding_size)


def embeddings(features: Tensor, neck: Any, after: int) -> Tensor:
    """The map ``(B, after, h, w)`` that the decoder reads.

    Args:
        features: ``(B, D, h, w)``; used directly if D is ``after``, else passed through the neck.
        neck: of SAM, which takes channels last.
        after: channels of the decoder.
    """
    return features if features.shape[1] == after else neck(features.permute(0, 2, 3, 1).contiguous())


def on_grid(features: Tensor, side: int) -> Tensor:
    """A map resized bilinearly to ``side x side`` cells; returned as is if it has them."""
    if features.shape[-2:] == (side, side):
        return features
    return F.interpolate(features, size=(side, side), mode="bilinear", align_corners=False)


def masks(sam: Any, features: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks ``(N, H, W)`` bool for boxes ``xyxy`` in pixels of an image of ``size`` ``(H, W)``."""
    side = int(sam.config.prompt_encoder_config.image_size)
    scale = side / max(size)
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    found = []
    for part in boxes.split(_BOXES):
        prompts = (part * scale)[None].to(features.device)
        low = sam(image_embeddings=features, input_boxes=prompts, multimask_output=False).pred_masks[0]
        full = F.interpolate(low.float(), size=(side, side), mode="bilinear", align_corners=False)[..., :h, :w]
        found.append(F.interpolate(full, size=size, mode="bilinear", align_corners=False)[:, 0] > 0)
    return torch.cat(found)
