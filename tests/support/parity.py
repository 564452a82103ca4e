"""Small models with random weights in official layouts, and the error measure of the parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agglo.config import build
from agglo.model.model import Model
from agglo.types import ConfigError

LIMIT = 5e-5
"""``max|a - e| / std(e)``, as for the golden vectors."""

PATCH, GRID = 8, 6
SIZES = {"square": (32, 32), "landscape": (24, 40), "portrait": (40, 16), "larger": (72, 56), "table": (48, 48)}
"""Name → (H, W) in pixels; the position table is 6 x 6 patches of 8 pixels."""

WIDTH, DEPTH = 48, 3
TOKENS = ("siglip2-g", "dino_v3", "sam3")


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float(((actual - expected).abs().max() / expected.std()).detach())


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Every parameter another number, layer scales and biases included."""
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith(("gamma", "lambda1")) or (parameter.ndim == 1 and "norm" in name and name.endswith("weight")):
            parameter.copy_(1 + 0.3 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise * (1.0 if "token" in name or "pos" in name else parameter.shape[-1] ** -0.5))


def small(heads: dict[str, Any] | None = None, **options: Any) -> Model:
    """A v4-like agglo model: three class tokens, of which the first two are the summary, and seven registers."""
    student = {"width": WIDTH, "depth": DEPTH, "heads": 4, "patch": PATCH, "max_grid": GRID, "registers": 7, **options}
    summary = [0] if not options.get("cls_per_teacher", True) else [0, 1]
    model = Model({"kind": "vit", **student}, heads or {}, tokens=TOKENS, summary_slots=summary, preferred_size=36)
    randomize(model)
    model.conditioner.mean.copy_(torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
    model.conditioner.std.copy_(torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1))
    model.provenance = {"license": "Apache-2.0", "teachers": {"sam3": "SAM License"}}
    return model.eval()


def check_export_is_refused(kind: str, change: dict[str, Any], why: str, folder: Path) -> None:
    """The export of a :func:`small` model with ``change`` raises an error that names the reason, and writes nothing."""
    with pytest.raises(ConfigError, match=why):
        build("exports", {"kind": kind}).write(small(**change), folder)
    assert not folder.exists()


def images() -> dict[str, Tensor]:
    return {name: torch.rand(2, 3, *size) for name, size in SIZES.items()}


def official(*, layer_scale: bool, patch: int = 16, v3: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint as torch.hub has it: tensors under ``base_model.`` and the training arguments."""
    names = ("clip", "siglip2-g", "dino_v2", "sam") if v3 else TOKENS
    prefix = 8 if v3 else 10
    shapes: dict[str, tuple[int, ...]] = {
        "patch_generator.embedder.weight": (WIDTH, 3 * patch * patch),
        "patch_generator.pos_embed": (1, GRID * GRID, WIDTH),
        "patch_generator.cls_token.token": (prefix, WIDTH),
        "norm.weight": (WIDTH,),  # there, and never applied
        "norm.bias": (WIDTH,),
    }
    for n in range(DEPTH):
        layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH)}
        for name, shape in (*layers.items(), ("mlp.fc2", (WIDTH, 4 * WIDTH))):
            shapes |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
        for leaf in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{n}.{leaf}"] = (WIDTH,)
        if layer_scale:
            shapes |= {f"blocks.{n}.ls1.grandma": (WIDTH,), f"blocks.{n}.ls2.grandma": (WIDTH,)}
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape)
        if key.endswith("grandma") or (len(shape) == 1 and "norm" in key and key.endswith("weight")):
            state[f"base_model.{key}"] = 1 + 0.3 * noise
        else:
            wide = len(shape) == 1 or "token" in key or "pos" in key
            state[f"base_model.{key}"] = noise * (0.5 if wide else shape[-1] ** -0.5)
    state["input_conditioner.norm_mean"] = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    state["input_conditioner.norm_std"] = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    args = {
        "model": "vit_base_patch16_v2_224" if layer_scale else "vit_huge_patch16_224",
        "model_kwargs": {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4},
        "cpe_max_size": GRID * patch,
        "cls_token_per_teacher": True,
        "register_multiple": 8 if v3 else 10,
        "teachers": [{"name": name, "use_summary": name not in ("sam", "sam3")} for name in names],
    }
    return state, args


def hugging_face(state: dict[str, Tensor], summary: list[int]) -> dict[str, Tensor]:
    """The same tensors as the official repositories on the Hugging Face hub name them."""
    named = {}
    for key, value in state.items():
        below = "radio_model.model." if key.startswith("base_model.") else "radio_model."
        named[below + key.removeprefix("base_model.")] = value
    named["radio_model.summary_idxs"] = torch.tensor(summary)
    return named
