"""SAM 3 of transformers without its trunk: masks for a phrase, from features of another model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.evals._concepts import LEAST_SCORE
from agglo.extras import require
from agglo.types import AssetError

_TRUNK = "vision_encoder.backbone."


class Sam3(nn.Module):
    """Everything of SAM 3 behind its trunk, in float32: its position codes lose digits in half precision.

    Attributes:
        width: channels of the trunk.
        side: cells of its square grid.

    Args:
        name: a folder or a name on the hub, such as ``facebook/sam3``.

    Raises:
        AssetError: it cannot be read, or weights of what is used are missing.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        transformers = require("transformers", "teachers")
        self._embeds = require("transformers.models.sam3.modeling_sam3", "teachers").Sam3VisionEncoderOutput
        try:
            self.model, info = transformers.Sam3Model.from_pretrained(
                name, output_loading_info=True, use_safetensors=True, dtype=torch.float32
            )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise AssetError(
                f"evals.sa_co: no SAM 3 in {name!r} ({error}); name a folder or a checkpoint of the hub with "
                "model.safetensors and its tokenizer, such as facebook/sam3"
            ) from error
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(_TRUNK))
        if missing:
            raise AssetError(f"{name} lacks {len(missing)} weights of a SAM 3, {missing[0]} among them: it is no SAM 3")
        trunk = self.model.config.vision_config.backbone_config
        self.width, self.side = int(trunk.hidden_size), int(trunk.image_size) // int(trunk.patch_size)
        self.model.vision_encoder.backbone = nn.Identity()  # half of all weights, and never called
        self.eval().requires_grad_(False)

    def see(self, features: Tensor) -> Any:
        """What SAM 3 keeps of an image: of features of its trunk ``(1, width, h, w)``, through its own neck."""
        if features.shape[-2:] != (self.side, self.side):
            features = F.interpolate(features, size=(self.side, self.side), mode="bilinear", align_corners=False)
        # The stock trunk hands over its channels last; the same numbers in another order take another kernel.
        cells = features.permute(0, 2, 3, 1).contiguous()
        maps, positions = self.model.vision_encoder.neck(cells.permute(0, 3, 1, 2))
        return self._embeds(
            last_hidden_state=cells.flatten(1, 2), fpn_hidden_states=maps, fpn_position_encoding=positions
        )

    def answer(self, seen: Any, phrase: str, size: tuple[int, int]) -> list[np.ndarray]:
        """Masks ``(H, W)`` bool of all that fits the phrase, on an image of ``size``, with a score of 0.5 or more.

        A score is a query's own times that of the phrase being there at all. Masks are brought to the image's size as
        probabilities and cut at 0.5, as transformers does.
        """
        length = int(self.model.config.text_config.max_position_embeddings)
        words = self.tokenizer(
            [phrase], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(seen.last_hidden_state.device)
        out = self.model(vision_embeds=seen, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        scores = out.pred_logits[0].sigmoid() * out.presence_logits[0].sigmoid()
        masks = out.pred_masks[0][scores >= LEAST_SCORE].sigmoid()
        if not len(masks):
            return []
        full = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0] > 0.5
        return list(full.cpu().numpy())
