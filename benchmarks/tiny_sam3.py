"""A SAM 3 with random weights, small enough to train against on two cores, in the files of a released one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH, GRID, PATCH = 32, 8, 14


def config(grid: int = GRID, queries: int = 8) -> dict[str, Any]:
    """Keys of ``Sam3Config``: a trunk of 32 channels on 8 x 8 cells, every other part of 32 channels too."""
    base = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
    trunk = {
        **base, "model_type": "sam3_vit_model", "num_hidden_layers": 2, "image_size": PATCH * grid,
        "patch_size": PATCH, "pretrain_image_size": PATCH * grid // 2, "window_size": grid // 2,
        "global_attn_indexes": [1],
    }  # fmt: skip
    part = {**base, "num_layers": 1}
    text = {
        **base, "model_type": "clip_text_model", "vocab_size": 54, "projection_dim": 16, "num_hidden_layers": 1,
        "hidden_act": "gelu", "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    sizes = [[grid * 4] * 2, [grid * 2] * 2, [grid] * 2]
    return {
        "vision_config": {"backbone_config": trunk, "fpn_hidden_size": WIDTH, "backbone_feature_sizes": sizes},
        "text_config": text,
        "geometry_encoder_config": part,
        "detr_encoder_config": part,
        "detr_decoder_config": {**part, "num_queries": queries},
        "mask_decoder_config": {"hidden_size": WIDTH, "num_attention_heads": 2},
    }


def write(folder: Path, seed: int = 0, grid: int = GRID) -> Path:
    """Write weights, processor and a tokenizer of single letters.

    Matrices are drawn with the variance that keeps that of their input: as initialised by transformers (0.02), outputs
    hardly depend on the image.
    """
    from transformers import CLIPTokenizer, Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = Sam3Model(Sam3Config(**config(grid)))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.detr_decoder.presence_head.layer3.bias.fill_(3)  # phrases are found
    model.save_pretrained(folder)
    letters = [chr(97 + i) for i in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    square = {"height": PATCH * grid, "width": PATCH * grid}
    Sam3Processor(
        image_processor=Sam3ImageProcessor(size=square),
        tokenizer=CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[]),
    ).save_pretrained(folder)
    return folder
