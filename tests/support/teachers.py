"""Tiny checkpoints of transformers in the hub's layout, and reference features computed independently.

The references load with the class that wrote the files, normalise with the mean and standard deviation written here,
and read tokens one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

T = pytest.importorskip("transformers")

BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    **BASE,
    "vocab_size": 60,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SIGLIP = {**BASE, "image_size": 64, "patch_size": 16}
NAFLEX = {**BASE, "num_patches": 16, "patch_size": 16}
CLIP = {**BASE, "image_size": 56, "patch_size": 14, "projection_dim": 24}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
    "num_pos_feats": 8,
}
TRUNK = {
    **BASE,
    "model_type": "sam3_vit_model",
    "image_size": 112,
    "patch_size": 14,
    "pretrain_image_size": 56,
    "window_size": 4,
    "global_attn_indexes": [1],
}
SAM3_VISION = {"backbone_config": TRUNK, "fpn_hidden_size": 32, "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
SAM3 = {
    "vision_config": SAM3_VISION,
    "text_config": {**TEXT, "model_type": "clip_text_model", "projection_dim": 16, "num_hidden_layers": 1},
    "geometry_encoder_config": {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "detr_encoder_config": {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "detr_decoder_config": {
        "hidden_size": 32,
        "num_layers": 1,
        "num_queries": 5,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
    "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
}
VIDEO = {
    "detector_config": SAM3,
    "tracker_config": {"vision_config": SAM3_VISION, "memory_encoder_output_channels": 64},
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

Read = Callable[[Any, Tensor], tuple[Tensor | None, Tensor]]


@dataclass(frozen=True)
class Case:
    """A checkpoint: the model that is saved, its processor, and how its output is read by hand."""

    make: Callable[[], nn.Module]
    read: Read
    pixels: dict[str, Any]
    size: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] = (64, 64)
    patch: int = 16

    def save(self, folder: Path) -> Path:
        """Write the checkpoint into ``folder``, as the hub has it."""
        torch.manual_seed(1)
        model: Any = self.make()
        with torch.no_grad():
            for parameter in model.parameters():  # tiny weights as initialised hardly depend on the image
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        model.save_pretrained(folder)
        stated = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, **self.pixels, **self.size}
        (folder / "preprocessor_config.json").write_text(json.dumps(stated))
        return folder

    def condition(self, images: Tensor) -> Tensor:
        """Pixels as the model wants them."""
        mean, std = (torch.tensor(self.pixels[f"image_{key}"]).view(1, 3, 1, 1) for key in ("mean", "std"))
        return (images - mean) / std

    @torch.no_grad()
    def by_hand(self, folder: Path, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Summary and map from the class that wrote the files.

        Frozen, as a teacher is: torch's attention pooling takes another kernel for weights that could be trained.
        """
        written: Any = type(self.make())
        net = written.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        return self.read(net, self.condition(images))


def cells(tokens: Tensor, height: int, width: int, prefix: int = 0) -> Tensor:
    """``(B, C, height, width)``, cell by cell."""
    out = torch.empty(len(tokens), tokens.shape[2], height, width)
    for y in range(height):
        for x in range(width):
            out[:, :, y, x] = tokens[:, prefix + y * width + x]
    return out


def tokens(prefix: int, patch: int, part: Callable[[Any], Any] = lambda net: net, **keys: Any) -> Read:
    """Read ``pooler_output`` and ``last_hidden_state``."""

    def read(net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = part(net)(pixels, **keys)
        height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        return getattr(out, "pooler_output", None), cells(out.last_hidden_state, height, width, prefix)

    return read


def read_naflex(net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
    """Patch by patch, (row, column, channel), with a mask that hides nothing."""
    height, width = pixels.shape[-2] // 16, pixels.shape[-1] // 16
    patches = [
        pixels[:, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].permute(0, 2, 3, 1).flatten(1)
        for y in range(height)
        for x in range(width)
    ]
    out = getattr(net, "vision_model", net)(
        pixel_values=torch.stack(patches, 1),
        pixel_attention_mask=torch.ones(len(pixels), height * width, dtype=torch.int32),
        spatial_shapes=torch.tensor([[height, width]] * len(pixels)),
    )
    return out.pooler_output, cells(out.last_hidden_state, height, width)


def read_clip(net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
    """The projected class token, and what follows it."""
    out = net.vision_model(pixels, interpolate_pos_encoding=True)
    side = pixels.shape[-1] // 14
    return net.visual_projection(out.pooler_output), cells(out.last_hidden_state, side, side, prefix=1)


def read_sam(net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
    """The last block's output, channels last, before the neck."""
    hidden = net.vision_encoder(pixels, output_hidden_states=True).hidden_states[-1]
    return None, torch.stack([torch.stack([hidden[:, y, x] for x in range(4)], -1) for y in range(4)], -2)


def read_sam2(net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
    """The last stage of a pyramid of stride 32, channels last."""
    hidden = net(pixels).last_hidden_state
    rows, columns = pixels.shape[-2] // 32, pixels.shape[-1] // 32
    return None, torch.stack([torch.stack([hidden[:, y, x] for x in range(columns)], -1) for y in range(rows)], -2)


def read_radio(net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
    """The chosen class tokens side by side, and what follows the ten prefix tokens."""
    out = net(pixels).last_hidden_state
    height, width = pixels.shape[-2] // 16, pixels.shape[-1] // 16
    return torch.cat([out[:, 0], out[:, 1]], 1), cells(out, height, width, prefix=10)


def _square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


def _clip_model(name: str) -> Callable[[], nn.Module]:
    if name == "CLIPModel":
        config = T.CLIPConfig(vision_config=CLIP, text_config=TEXT, projection_dim=24)
        return lambda: T.CLIPModel(config)
    return lambda: getattr(T, name)(T.CLIPVisionConfig(**CLIP))


CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64}
VIT = {**BASE, "image_size": 64, "patch_size": 16}
HIERA = {"blocks_per_stage": [1, 1, 1, 1], "hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64]}
CROP = {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 56, "width": 56}}
_TRUNK_OF = {
    "sam3_trunk": (lambda: T.Sam3ViTModel(T.Sam3ViTConfig(**TRUNK)), lambda net: net),
    "sam3_vision": (lambda: T.Sam3VisionModel(T.Sam3VisionConfig(**SAM3_VISION)), lambda net: net.backbone),
    "sam3": (lambda: T.Sam3Model(T.Sam3Config(**SAM3)), lambda net: net.vision_encoder.backbone),
    "sam3_video": (
        lambda: T.Sam3VideoModel(T.Sam3VideoConfig(**VIDEO)),
        lambda net: net.detector_model.vision_encoder.backbone,
    ),
}

CASES: dict[str, Case] = {
    "siglip": Case(lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**SIGLIP)), tokens(0, 16), HALF, _square(64)),
    "siglip_whole": Case(
        lambda: T.SiglipModel(T.SiglipConfig(vision_config=SIGLIP, text_config=TEXT)),
        tokens(0, 16, lambda net: net.vision_model),
        HALF,
        _square(64),
    ),
    "naflex": Case(
        lambda: T.Siglip2VisionModel(T.Siglip2VisionConfig(**NAFLEX)),
        read_naflex,
        HALF,
        {"patch_size": 16, "max_num_patches": 24},
        (64, 96),
    ),
    "naflex_whole": Case(
        lambda: T.Siglip2Model(T.Siglip2Config(vision_config=NAFLEX, text_config=TEXT)),
        read_naflex,
        HALF,
        {},
        (96, 48),
    ),
    "clip": Case(_clip_model("CLIPVisionModel"), tokens(1, 14), OPENAI, CROP, (56, 56), 14),
    "clip_projected": Case(_clip_model("CLIPVisionModelWithProjection"), read_clip, OPENAI, CROP, (56, 56), 14),
    "clip_whole": Case(_clip_model("CLIPModel"), read_clip, OPENAI, CROP, (56, 56), 14),
    "dinov2": Case(
        lambda: T.Dinov2Model(T.Dinov2Config(**DINO, mlp_ratio=2)), tokens(1, 14), IMAGENET, CROP, (56, 84), 14
    ),
    "dinov2_registers": Case(
        lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO, mlp_ratio=2, num_register_tokens=3)),
        tokens(4, 14),
        IMAGENET,
        CROP,
        (84, 56),
        14,
    ),
    "dinov3": Case(
        lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**BASE, patch_size=16, image_size=64, num_register_tokens=4)),
        tokens(5, 16),
        IMAGENET,
        _square(64),
        (64, 96),
    ),
    "dinov3_convnext": Case(
        lambda: T.DINOv3ConvNextModel(T.DINOv3ConvNextConfig(**CONVNEXT)),
        tokens(1, 32),
        IMAGENET,
        _square(64),
        (64, 96),
        32,
    ),
    "sam": Case(lambda: T.SamVisionModel(T.SamVisionConfig(**SAM)), read_sam, IMAGENET, {"size": {"longest_edge": 64}}),
    "sam_whole": Case(
        lambda: T.SamModel(
            T.SamConfig(
                vision_config=SAM,
                prompt_encoder_config={
                    "hidden_size": 16,
                    "image_size": 64,
                    "patch_size": 16,
                    "mask_input_channels": 4,
                },
                mask_decoder_config={
                    "hidden_size": 16,
                    "mlp_dim": 32,
                    "num_attention_heads": 2,
                    "iou_head_hidden_dim": 16,
                },
            )
        ),
        read_sam,
        IMAGENET,
        {"size": {"longest_edge": 64}},
    ),
    **{
        name: Case(make, tokens(0, 14, part), HALF, _square(112), (112, 112), 14)
        for name, (make, part) in _TRUNK_OF.items()
    },
    "radio": Case(
        lambda: T.RadioModel(
            T.RadioConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_img_size=128, image_size=64)
        ),
        read_radio,
        {"image_mean": [0.0] * 3, "image_std": [1.0] * 3},  # it normalises by itself
        {},
        (64, 96),
    ),
    "generic_sam2": Case(
        lambda: T.Sam2HieraDetModel(T.Sam2HieraDetConfig(**HIERA, image_size=[128, 128])),
        read_sam2,
        IMAGENET,
        _square(128),
        (128, 192),
        32,
    ),
    "generic_vit": Case(
        lambda: T.ViTModel(T.ViTConfig(**VIT)),
        tokens(1, 16, interpolate_pos_encoding=True),
        HALF,
        _square(64),
        (64, 96),
    ),
    "generic_convnext": Case(
        lambda: T.ConvNextV2Model(T.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)),
        lambda net, pixels: (out := net(pixels)) and (out.pooler_output, out.last_hidden_state),
        IMAGENET,
        _square(64),
        (64, 96),
        32,
    ),
}
