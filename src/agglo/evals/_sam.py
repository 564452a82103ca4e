"""Segmentation decoders of SAM and SAM 3 on the features of another model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.config import nearest
from agglo.evals._concepts import LEAST_SCORE
from agglo.evals._features import check
from agglo.evals.base import FeatureError
from agglo.extras import require
from agglo.types import AssetError, ConfigError, Features


def features_for(
    out: Features, head: str | None, widths: Collection[int], eval_name: str, image: str, usual: str | None = None
) -> Tensor:
    """The spatial map ``(1, D, h, w)`` float32 that a decoder reads: a head's, or of a model without heads its own.

    Args:
        out: of a model for one image.
        head: to read; None for the one head of a fitting width.
        widths: channels that the decoder accepts.
        eval_name: for errors.
        image: name, for errors.
        usual: head to prefer if several fit.

    Raises:
        ConfigError: an unknown head, no fitting one, or several.
        FeatureError: features that are not finite.
    """
    heads: Mapping[str, Features] = getattr(out, "heads", None) or {}
    if head is not None and head not in heads:
        raise ConfigError(f"evals.{eval_name}: the model has no head {head!r}{nearest(head, heads)}")
    maps = {key: one.spatial for key, one in heads.items() if one.spatial is not None} or {"": out.spatial}
    accepted = " or ".join(map(str, sorted(widths)))
    fitting = [key for key, one in maps.items() if one is not None and one.shape[1] in widths]
    if usual in fitting:
        fitting = [usual]
    if head is None and len(fitting) != 1:
        had = ", ".join(f"{key or 'the model itself'} ({0 if m is None else m.shape[1]})" for key, m in maps.items())
        raise ConfigError(
            f"evals.{eval_name}: the decoder takes {accepted} channels, and "
            f"{'several heads have' if fitting else 'none has'} them: {had}; set `head` to one that was "
            "distilled from the decoder's own encoder"
        )
    features = maps.get(fitting[0] if head is None else head)
    if features is None or features.shape[1] not in widths:
        raise ConfigError(
            f"evals.{eval_name}: head {head!r} has {0 if features is None else features.shape[1]} channels; "
            f"the decoder takes {accepted}"
        )
    if check(features, "spatial", [image], 4) is None:
        raise FeatureError(f"{image}: no spatial features")
    return features.float()


_TRUNK = "vision_encoder.backbone."


class Sam3(nn.Module):
    """SAM 3 without its trunk, in float32: its position encodings lose precision in half precision.

    Attributes:
        width: channels of the trunk.
        side: cells of its square grid.

    Args:
        name: a folder or a name on the hub, such as ``facebook/sam3``.

    Raises:
        AssetError: it cannot be read, or weights are missing.
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
                f"evals.sa_co: no SAM 3 in {name!r} ({error}); use a folder or a hub checkpoint with "
                "model.safetensors and its tokenizer, such as facebook/sam3"
            ) from error
        missing = sorted(key for key in info["missing_keys"] if not key.startswith(_TRUNK))
        if missing:
            raise AssetError(f"{name} lacks {len(missing)} weights of a SAM 3, such as {missing[0]}")
        trunk = self.model.config.vision_config.backbone_config
        self.width, self.side = int(trunk.hidden_size), int(trunk.image_size) // int(trunk.patch_size)
        self.model.vision_encoder.backbone = nn.Identity()  # half of all weights, never called
        self.eval().requires_grad_(False)

    def embed(self, features: Tensor) -> Any:
        """Image embeddings of SAM 3 from trunk features ``(1, width, h, w)``, through its neck."""
        if features.shape[-2:] != (self.side, self.side):
            features = F.interpolate(features, size=(self.side, self.side), mode="bilinear", align_corners=False)
        # The original trunk returns channels last; another layout would select another kernel.
        cells = features.permute(0, 2, 3, 1).contiguous()
        maps, positions = self.model.vision_encoder.neck(cells.permute(0, 3, 1, 2))
        return self._embeds(
            last_hidden_state=cells.flatten(1, 2), fpn_hidden_states=maps, fpn_position_encoding=positions
        )

    def segment(self, embeddings: Any, phrase: str, size: tuple[int, int]) -> list[np.ndarray]:
        """Masks ``(H, W)`` bool of the instances of a phrase in an image of ``size``, with scores of at least 0.5.

        The score is that of the query times that of the phrase's presence. Masks are resized to the image as
        probabilities and thresholded at 0.5, as transformers does.
        """
        length = int(self.model.config.text_config.max_position_embeddings)
        words = self.tokenizer(
            [phrase], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(embeddings.last_hidden_state.device)
        out = self.model(vision_embeds=embeddings, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        scores = out.pred_logits[0].sigmoid() * out.presence_logits[0].sigmoid()
        masks = out.pred_masks[0][scores >= LEAST_SCORE].sigmoid()
        if not len(masks):
            return []
        full = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0] > 0.5
        return list(full.cpu().numpy())
