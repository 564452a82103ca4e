"""Files that evals read, small and made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


def tiny_sam(folder: Path, channels: int = 12, side: int = 64, seed: int = 0) -> str:
    """A random SAM in a folder: blocks ``channels`` wide, a decoder of 16 channels on a 4 x 4 grid."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": channels, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sides = {"image_size": side, "patch_size": side // 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SamConfig(
        vision_config=vision | sides | {"mlp_dim": 8, "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "mask_input_channels": 4} | sides,
        mask_decoder_config=decoder | {"iou_head_hidden_dim": 8, "attention_downsample_rate": 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sam = transformers.SamModel(config)
        with torch.no_grad():  # initialised at 0.02 everything is nearly nothing
            for parameter in sam.parameters():
                parameter.normal_(0, 0.5)
    sam.save_pretrained(folder / "sam")
    return str(folder / "sam")


def tiny_sam3(folder: Path, seed: int = 0) -> str:
    """A random SAM 3 in a folder, with a tokenizer of single letters: a trunk of 32 channels on an 8 x 8 grid."""
    transformers = pytest.importorskip("transformers")
    from teacher_checkpoints import HALF, SAM3

    marks = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(97 + i) for i in range(26)]
    words = {word: i for i, word in enumerate([*marks, *letters, *(letter + "</w>" for letter in letters)])}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Sam3Model(transformers.Sam3Config(**SAM3))
        with torch.no_grad():  # as initialised, features and phrases hardly change anything
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
            model.detr_decoder.presence_head.layer3.bias.fill_(6)  # else hardly anything is ever found
    place = folder / "sam3"
    model.save_pretrained(place)
    transformers.CLIPTokenizer(vocab=words, merges=[]).save_pretrained(place)
    stated = {
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "size": {"height": 112, "width": 112},
    }
    (place / "preprocessor_config.json").write_text(json.dumps(stated | HALF))
    return str(place)
