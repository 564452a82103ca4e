"""Checkpoints with random weights in released layouts: SAM, SAM 3, SigLIP 2 and C-RADIOv4."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WIDTH, DEPTH, HIDDEN = 32, 4, 48
TEACHERS = [
    {"name": "siglip2-g", "type": "siglip2", "model": "siglip2-g-384"},
    {"name": "dino_v3", "type": "generic", "fd_upsample_factor": 2},
    {"name": "sam3", "type": "generic", "use_summary": False},
]
ARGS = {
    "model": "vit_huge_patch16_224",
    "model_kwargs": {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2},
    "cpe_max_size": 128,
    "cls_token_per_teacher": True,
    "register_multiple": 10,
    "teachers": TEACHERS,
    "mlp_version": "v2",
    "dtype": "float32",
}


def official_state() -> dict[str, Tensor]:
    """The state of a small C-RADIOv4, by the hub's names."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    state = {
        "input_conditioner.norm_mean": torch.full((3, 1, 1), 0.45),
        "input_conditioner.norm_std": torch.full((3, 1, 1), 0.27),
        "base_model.patch_generator.embedder.weight": draw(WIDTH, 768),
        "base_model.patch_generator.pos_embed": draw(1, 64, WIDTH),
        "base_model.patch_generator.cls_token.token": draw(10, WIDTH),
        "base_model.reg_token": draw(1, 4, WIDTH),
    }
    sizes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    sizes |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for index in range(DEPTH):
        for name in ("norm1", "norm2"):
            state[f"base_model.blocks.{index}.{name}.weight"] = 1 + draw(WIDTH)
            state[f"base_model.blocks.{index}.{name}.bias"] = draw(WIDTH)
        for name, shape in sizes.items():
            state[f"base_model.blocks.{index}.{name}.weight"] = draw(*shape)
            state[f"base_model.blocks.{index}.{name}.bias"] = draw(shape[0])
    for index in range(3):
        for folder, cells in (("_heads", 1), ("_feature_projections", 4 if index == 1 else 1)):
            last = cells * (8 + index)
            for name, shape in {"fc1": (HIDDEN, WIDTH), "final.2": (last, HIDDEN)}.items():
                state[f"{folder}.{index}.{name}.weight"] = draw(*shape)
                state[f"{folder}.{index}.{name}.bias"] = draw(shape[0])
            state[f"{folder}.{index}.final.0.weight"] = 1 + draw(HIDDEN)
            state[f"{folder}.{index}.final.0.bias"] = draw(HIDDEN)
    return state


SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_tokenizer(folder: Path, ending: str = "$A <eos>", **options) -> None:
    """A Gemma-like tokenizer.json: BPE with byte fallback, blanks written as ▁; and the released tokenizer_config."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_lowercase, *string.digits]
    merges = [("a", "t"), ("c", "at"), ("▁", "cat"), ("o", "f"), ("▁", "of"), ("s", "n"), ("o", "w"), ("sn", "ow")]
    pieces += [left + right for left, right in merges]
    bpe = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(ending, special_tokens=[("<eos>", 1), ("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    released = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "model_input_names": ["input_ids"],
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(released | options))


def tiny_siglip2(folder: Path, kind: str, shard: str = "1GB") -> Any:
    """A whole checkpoint (text and vision) as transformers writes it; returns transformers' model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    vision = {**TEXT, "patch_size": 4, "image_size": 8} if kind == "siglip" else {**TEXT, "patch_size": 4}
    name = {"siglip": "Siglip", "siglip2": "Siglip2"}[kind]
    text = {**TEXT, "vocab_size": 400, "projection_size": 40}
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    ).eval()
    for parameter in model.parameters():  # biases and norms too: nothing may pass for its initial value
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer(folder)
    return model


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


def tiny_sam3(folder: Path, seed: int = 0, positions: int = 16) -> str:
    """A random SAM 3 in a folder, with a tokenizer of single letters: a trunk of 32 channels on an 8 x 8 grid.

    Its processor pads phrases to 32 tokens, as many as the released text encoder has positions.
    """
    transformers = pytest.importorskip("transformers")
    from support.teachers import HALF, SAM3

    marks = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(97 + i) for i in range(26)]
    words = {word: i for i, word in enumerate([*marks, *letters, *(letter + "</w>" for letter in letters)])}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = {**SAM3["text_config"], "max_position_embeddings": positions}
        model = transformers.Sam3Model(transformers.Sam3Config(**{**SAM3, "text_config": text}))
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
