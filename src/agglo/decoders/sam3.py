"""SAM 3 of transformers without its trunk: from the features of any encoder to instance masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.extras import require
from agglo.types import AssetError, ConfigError

LEAST_SCORE = 0.5
"""Instances with lower scores are not returned; the threshold of SA-Co's metric."""

TRUNK = "vision_encoder.backbone."


class Found(NamedTuple):
    """Instances of one prompt: masks ``(N, H, W)`` bool, scores ``(N,)`` and boxes ``(N, 4)`` ``xyxy`` in pixels."""

    masks: Tensor
    scores: Tensor
    boxes: Tensor


def tokens(features: Tensor) -> Tensor:
    """A map ``(B, C, h, w)`` as contiguous tokens ``(B, h w, C)``, the memory layout of SAM 3's own trunk.

    The layout selects the convolution kernel of the neck: with channels first its last bits differ.
    """
    return features.flatten(2).transpose(1, 2).contiguous()


def load(name: str, where: str, *, trunk: bool = True) -> Any:
    """SAM 3's image model in float32: in half precision its position encodings are wrong in the second digit.

    Args:
        name: a folder or a name on the hub, such as ``facebook/sam3``.
        where: beginning of error messages.
        trunk: False to accept a checkpoint without weights of the trunk.

    Returns:
        The model of transformers in eval mode.

    Raises:
        AssetError: it cannot be read, or weights are missing.
    """
    transformers = require("transformers", "teachers")
    try:
        model, info = transformers.Sam3Model.from_pretrained(
            name, output_loading_info=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise AssetError(f"{where}: no SAM 3 in {name!r} ({error}); {advice(error)}") from error
    missing = sorted(key for key in info["missing_keys"] if trunk or not key.startswith(TRUNK))
    if missing:
        raise AssetError(f"{name} lacks {len(missing)} weights of a SAM 3, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str, where: str) -> Any:
    """The tokenizer of a SAM 3 checkpoint.

    Raises:
        AssetError: it cannot be read.
    """
    try:
        return require("transformers", "teachers").AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise AssetError(f"{where}: no SAM 3 in {name!r} ({error}); {advice(error)}") from error


def advice(error: BaseException | None) -> str:
    """What to do about a checkpoint that cannot be loaded."""
    while error is not None:
        if type(error).__name__ == "GatedRepoError":
            return (
                "the repository is gated: accept its licence on its page of the hub, then set HF_TOKEN to a token of "
                "that account; or use a folder with its files"
            )
        error = error.__cause__ or error.__context__
    return "use a folder or a hub checkpoint with model.safetensors and its tokenizer, such as facebook/sam3"


def tokenize(tokenizer: Any, texts: Sequence[str], length: int, where: str) -> Any:
    """Token ids and mask ``(N, length)`` of phrases.

    transformers' processor cuts longer phrases silently; here they raise.

    Raises:
        ConfigError: an empty phrase, or one of more tokens than the text encoder takes.
    """
    if blank := [index for index, text in enumerate(texts) if not text.strip()]:
        raise ConfigError(f"{where}: text {blank[0]} is empty; write the concept to segment, such as 'shoe'")
    for text in texts:
        count = len(tokenizer(text)["input_ids"])
        if count > length:
            raise ConfigError(
                f"{where}: {text[:60]!r} has {count} tokens and SAM 3's text encoder takes {length}; shorten it to a "
                "noun phrase, or give several texts"
            )
    return tokenizer(list(texts), padding="max_length", max_length=length, truncation=False, return_tensors="pt")


def text_length(model: Any) -> int:
    """Number of tokens that the text encoder takes."""
    return int(model.config.text_config.max_position_embeddings)


def instances(out: Any, size: tuple[int, int], least: float = LEAST_SCORE, index: int = 0) -> Found:
    """Instances of prompt ``index`` in an image of ``size`` ``(H, W)`` pixels, with scores of at least ``least``.

    The score is that of the query times that of the prompt's presence. Masks are resized to the image as probabilities
    and thresholded at 0.5, as transformers does.
    """
    scores = out.pred_logits[index].sigmoid() * out.presence_logits[index].sigmoid()
    keep = scores >= least
    height, width = size
    boxes = out.pred_boxes[index][keep] * torch.tensor([width, height] * 2, device=scores.device)
    masks = out.pred_masks[index][keep].sigmoid()
    if not len(masks):
        return Found(torch.zeros(0, height, width, dtype=torch.bool), scores[keep], boxes)
    full = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0] > 0.5
    return Found(full, scores[keep], boxes)


class Sam3(nn.Module):
    """SAM 3 without its trunk, in float32.

    Attributes:
        width: channels of the trunk.
        side: cells of its square grid.

    Args:
        name: a folder or a name on the hub, such as ``facebook/sam3``.
        where: beginning of error messages.

    Raises:
        AssetError: it cannot be read, or weights are missing.
    """

    def __init__(self, name: str, where: str = "sam3") -> None:
        super().__init__()
        self.where = where
        self._embeds = require("transformers.models.sam3.modeling_sam3", "teachers").Sam3VisionEncoderOutput
        self.model = load(name, where, trunk=False)
        self.tokenizer = load_tokenizer(name, where)
        trunk = self.model.config.vision_config.backbone_config
        self.width, self.side = int(trunk.hidden_size), int(trunk.image_size) // int(trunk.patch_size)
        self.model.vision_encoder.backbone = nn.Identity()  # half of all weights, never called
        self.eval().requires_grad_(False)

    def embed(self, features: Tensor) -> Any:
        """Image embeddings of SAM 3 from trunk features ``(1, width, h, w)``, through its neck."""
        if features.shape[-2:] != (self.side, self.side):
            features = F.interpolate(features, size=(self.side, self.side), mode="bilinear", align_corners=False)
        sequence = tokens(features)
        maps, positions = self.model.vision_encoder.neck(sequence.unflatten(1, (self.side, -1)).permute(0, 3, 1, 2))
        return self._embeds(last_hidden_state=sequence, fpn_hidden_states=maps, fpn_position_encoding=positions)

    def segment(self, embeddings: Any, phrase: str, size: tuple[int, int], least: float = LEAST_SCORE) -> Found:
        """Instances of a phrase in an image of ``size`` ``(H, W)`` pixels; see :func:`instances`."""
        words = tokenize(self.tokenizer, [phrase], text_length(self.model), self.where)
        words = words.to(embeddings.last_hidden_state.device)
        out = self.model(vision_embeds=embeddings, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
        return instances(out, size, least)
