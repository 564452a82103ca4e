"""Tiny random SAM 3 of every kind, their prompts, and students that replay recorded features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agglo.integrations.sam3 import vision_encoder
from agglo.model.heads import HeadConfig
from agglo.model.model import Model
from agglo.types import Features, FeatureSpec
from support.checkpoints import tiny_sam3

T = pytest.importorskip("transformers")

WIDE = 128
"""Width of the neck of the video models, which need a multiple of 64."""


def louder(model: Any) -> Any:
    """Weights that make the outputs depend on the features: as initialised they hardly do."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
        for name, parameter in model.named_parameters():
            if name.endswith("pred_obj_score_head.proj_out.bias"):
                parameter.fill_(9)  # else the tracker finds nothing
    return model.eval().requires_grad_(False)


def vision(grid: int, patch: int, fpn: int = 32) -> dict[str, Any]:
    """Configuration of a vision encoder with a trunk of 32 channels on ``grid x grid`` cells."""
    trunk = {
        "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": patch * grid, "patch_size": patch, "pretrain_image_size": 4 * patch,
        "window_size": 4, "global_attn_indexes": [1],
    }  # fmt: skip
    sizes = [[grid * 4] * 2, [grid * 2] * 2, [grid] * 2]
    return {"backbone_config": trunk, "fpn_hidden_size": fpn, "backbone_feature_sizes": sizes}


def detector(grid: int, patch: int, fpn: int = 32) -> dict[str, Any]:
    """Configuration of an image model."""
    part = {"hidden_size": fpn, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = {
        "model_type": "clip_text_model", "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64,
        "projection_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "gelu",
        "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    return {
        "vision_config": vision(grid, patch, fpn), "text_config": text, "geometry_encoder_config": part,
        "detr_encoder_config": part, "detr_decoder_config": {**part, "num_queries": 5},
        "mask_decoder_config": {"hidden_size": fpn, "num_attention_heads": 2},
    }  # fmt: skip


def tracker(grid: int, patch: int, fpn: int = 32, **more: Any) -> dict[str, Any]:
    """Configuration of a tracker; ``more`` for that of a video."""
    decoder = {"hidden_size": fpn, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    prompts = {"hidden_size": fpn, "image_size": patch * grid, "patch_size": patch, "mask_input_channels": 4}
    return {
        "vision_config": vision(grid, patch, fpn), "prompt_encoder_config": prompts, "mask_decoder_config": decoder,
        **more,
    }  # fmt: skip


def memory(grid: int, patch: int) -> dict[str, Any]:
    """The keys of a tracker's memory."""
    return {
        "memory_attention_hidden_size": WIDE, "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 64, "memory_attention_rope_feat_sizes": [grid, grid],
        "memory_encoder_hidden_size": WIDE, "memory_encoder_output_channels": 64, "mask_downsampler_embed_dim": WIDE,
        "memory_fuser_embed_dim": WIDE, "memory_fuser_intermediate_dim": 64, "image_size": patch * grid,
    }  # fmt: skip


def build(kind: str, grid: int = 8, patch: int = 14) -> Any:
    """A random model by the name of its class."""
    if kind == "Sam3Model":
        return louder(T.Sam3Model(T.Sam3Config(**detector(grid, patch))))
    if kind == "Sam3TrackerModel":
        return louder(T.Sam3TrackerModel(T.Sam3TrackerConfig(**tracker(grid, patch))))
    follow = tracker(grid, patch, WIDE, **memory(grid, patch))
    if kind == "Sam3TrackerVideoModel":
        return louder(T.Sam3TrackerVideoModel(T.Sam3TrackerVideoConfig(**follow)))
    config = T.Sam3VideoConfig(
        detector_config=detector(grid, patch, WIDE), tracker_config=follow, low_res_mask_size=4 * grid
    )
    config.score_threshold_detection = config.new_det_thresh = 0.0  # random scores: let everything be found
    config.hotstart_delay = config.hotstart_unmatch_thresh = config.hotstart_dup_thresh = 0
    return louder(T.Sam3VideoModel(config))


def outputs(kind: str, model: Any, made: Any, side: int = 56) -> list[Tensor]:
    """Everything that a model returns for the prompts of its kind, on random pictures."""
    frames = [np.random.default_rng(i).integers(0, 256, (side, side + 20, 3), np.uint8) for i in range(3)]
    box = [[[5.0, 8.0, 40.0, 50.0]]]
    found: list[Any] = []
    if kind == "Sam3Model":
        for prompt in ({"text": "cat"}, {"input_boxes": box}, {"text": "cat", "input_boxes": box}):
            out = model(**made(images=frames[0], return_tensors="pt", **prompt))
            found += [out.pred_masks, out.pred_boxes, out.pred_logits, out.presence_logits, out.semantic_seg]
    elif kind == "Sam3TrackerModel":
        points = {"input_points": [[[[12, 30], [50, 9]]]], "input_labels": [[[1, 0]]]}
        for prompt in (points, {"input_boxes": box}):
            out = model(**made(images=frames[0], return_tensors="pt", **prompt))
            found += [out.pred_masks, out.iou_scores, out.object_score_logits]
    else:
        session = made.init_video_session(video=frames)
        if kind == "Sam3VideoModel":
            made.add_text_prompt(session, "cat")
        else:
            points = {"input_points": [[[[12, 30]]]], "input_labels": [[[1]]]}
            made.add_inputs_to_inference_session(session, frame_idx=0, obj_ids=1, **points)
            found.append(model(session, frame_idx=0).pred_masks)
        for out in model.propagate_in_video_iterator(session):
            found += list(out.obj_id_to_mask.values()) if kind == "Sam3VideoModel" else [out.pred_masks]
    assert found and all(torch.isfinite(each).all() for each in found)
    assert any(each.float().std() > 0.01 for each in found)
    return found


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two results are the same bit for bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextlib.contextmanager
def recording(model: Any) -> Iterator[list[Tensor]]:
    """The maps ``(B, C, g, g)`` that the trunk of a SAM 3 returns."""
    maps: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        sequence = out.last_hidden_state
        side = round(sequence.shape[1] ** 0.5)
        maps.append(sequence.transpose(1, 2).unflatten(2, (side, side)).clone(memory_format=torch.contiguous_format))

    hook = vision_encoder(model).backbone.register_forward_hook(keep)
    try:
        yield maps
    finally:
        hook.remove()


def processor(kind: str, folder: Path, grid: int = 8, patch: int = 14) -> Any:
    """Its processor, with a tokenizer of single letters."""
    square = {"height": patch * grid, "width": patch * grid}
    parts: dict[str, Any] = {"image_processor": T.Sam3ImageProcessor(size=square)}
    if "Video" in kind:
        parts["video_processor"] = T.Sam2VideoVideoProcessor(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if "Tracker" not in kind:
        parts["tokenizer"] = T.AutoTokenizer.from_pretrained(tiny_sam3(folder))
    return getattr(T, kind.replace("Model", "Processor"))(**parts)


class Replay(nn.Module):
    """Returns recorded features, one batch per call, whatever the image is."""

    def __init__(self, maps: list[Tensor], stride: int = 16) -> None:
        super().__init__()
        self.maps, self.calls, self.sizes = maps, 0, set()
        self.spec = FeatureSpec(summary=None, spatial=maps[0].shape[1], stride=stride, step=stride)

    def forward(self, images: Tensor) -> Features:
        self.sizes.add(tuple(images.shape[-2:]))
        self.calls += 1
        return Features(None, self.maps[min(self.calls, len(self.maps)) - 1])


def student(width: int = 32, head: str = "sam3", seed: int = 0, **options: Any) -> Model:
    """A random ViT with a head as wide as the tiny trunk."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        keys = {"kind": "vit", "width": 32, "depth": 8, "heads": 2, "patch": 16, "max_grid": 16, **options}
        made = Model(keys, {head: HeadConfig(None, {"kind": "mlp", "hidden": 16}, None, width)})
        with torch.no_grad():
            for parameter in made.heads[head].parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
    return made.eval()


def released(path: Path) -> dict[str, str]:
    """A released layout, from which image model, tracker and video model load, and a student: options of a command."""
    whole = build("Sam3VideoModel")
    with torch.no_grad():
        whole.detector_model.detr_decoder.presence_head.layer3.bias.fill_(6)  # else nothing is found
    whole.save_pretrained(path / "whole")
    processor("Sam3VideoModel", path).save_pretrained(path / "whole")
    student().save(path / "student")
    return {"model": str(path / "student"), "decoder": str(path / "whole")}
