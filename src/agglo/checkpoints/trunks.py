"""Student options and key names of an official checkpoint, from its arguments and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from agglo.checkpoints.eradio import VARIANTS
from agglo.checkpoints.eradio import options_from_official as eradio_options
from agglo.checkpoints.radio1d import FACTORIES as RADIO1D
from agglo.checkpoints.radio1d import options_from_official as radio1d_options
from agglo.checkpoints.sizes import SIZES, UNUSED, check, is_gated
from agglo.checkpoints.spectral import MARK
from agglo.config import nearest
from agglo.types import AssetError, ConfigError

NOMINAL_V2 = 592
"""Nominal image side of the ``*_v2_224`` architectures, in pixels; others have 224."""


@dataclass(frozen=True)
class Trunk:
    """A student's options, and the mapping of a checkpoint's keys to its own.

    Args:
        options: ``{kind, **keys}``.
        names: official key, including ``base_model.``, to agglo's key without ``student.``; None if unused.
        tokens: names of the class tokens.
        derived: agglo's key (without ``student.``) to the function that computes it.
    """

    options: dict[str, Any]
    names: Callable[[str], str | None]
    tokens: tuple[str, ...]
    derived: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = field(default_factory=dict)


def published(model: str, patch: int, registers: int, largest: int) -> dict[str, Any]:
    """Student options ``{kind, **keys}`` of a release from published facts, without its checkpoint."""
    if model in VARIANTS:
        return {"kind": "hybrid", **VARIANTS[model]}
    size, dino = SIZES[model], model.startswith("dino_v2")
    return {
        "kind": "vit", "width": size.width, "depth": size.depth, "heads": size.heads, "mlp_hidden": size.hidden,
        "layer_scale": size.layer_scale, "mlp_norm": size.mlp_norm, "mlp": "swiglu" if is_gated(model) else "gelu",
        "patch": patch, "max_grid": 146 if dino else largest // patch, "registers": registers,
        "patch_bias": dino, "final_norm": dino,
    }  # fmt: skip


def recognize(tensors: Mapping[str, Tensor], args: Mapping[str, Any], source: str = "the checkpoint") -> Trunk:
    """The trunk of a checkpoint with the key names of torch.hub.

    Args:
        tensors: by the names of torch.hub.
        args: official training arguments.
        source: origin, for messages.

    Raises:
        ConfigError: an unknown architecture.
        AssetError: tensors are missing, or of another architecture than ``args.model``.
    """
    model, kwargs = str(args.get("model", "")), dict(args.get("model_kwargs") or {})
    names = tuple(dict.fromkeys(str(t["name"]) for t in args.get("teachers") or ())) or ("all",)
    tokens = names if args.get("cls_token_per_teacher", True) else names[:1]
    if model in RADIO1D:
        options = radio1d_options(model, kwargs, args.get("teachers") or (), model_norm=bool(args.get("model_norm")))
        classes = options.pop("class_tokens")
        return Trunk(
            {"kind": "vit_1d", **options, "class_tokens": classes}, _plain_names(bool(args.get("model_norm"))), tokens
        )
    if "eradio" in model:
        options = eradio_options(kwargs, model if model in VARIANTS else None)
        return Trunk({"kind": "hybrid", **options}, _eradio_names, ("all",))
    return _vit(tensors, args, model, kwargs, tokens, source)


def _vit(
    tensors: Mapping[str, Tensor],
    args: Mapping[str, Any],
    model: str,
    kwargs: Mapping[str, Any],
    tokens: Sequence[str],
    source: str,
) -> Trunk:
    below = "base_model.inner." if any(key.startswith("base_model.inner.") for key in tensors) else "base_model."
    dino = below == "base_model.inner."
    # A reparametrised weight has the shape of its original.
    shapes = {
        k.removeprefix(below).replace(f"{MARK}original", ".weight"): tuple(tensors[k].shape)
        for k in tensors
        if k.startswith(below)
    }
    heads = kwargs.get("num_heads") or (SIZES[model].heads if model in SIZES else None)
    if heads is None:
        raise ConfigError(f"args.model {model!r} is not a known architecture of RADIO{nearest(model, SIZES)}")
    depth = 1 + max((int(k.split(".")[1]) for k in shapes if k.startswith("blocks.")), default=-1)
    if not depth:
        found = ", ".join(sorted(tensors)[:10]) or "nothing"
        raise AssetError(f"a checkpoint of {model} holds {below}blocks.0.*; this one holds {found}, ...")
    check(shapes, model, args, below, source=source)
    options: dict[str, Any] = {"kind": "vit", "depth": depth, "heads": int(heads), "pos_dropout": 0.1}
    options |= _block_options(shapes)
    final_norm = dino or bool(args.get("model_norm"))
    options["final_norm"] = final_norm
    if "patch_generator.embedder.weight" in shapes:
        options |= _patch_options(shapes, args, model, kwargs)
        tokens = tokens[:1] if dino else tokens
        classes = len(tokens)
        names, derived = _plain_names(final_norm, below), {}
    elif "patch_embed.proj.weight" in shapes:
        options |= _absolute_options(shapes)
        if args.get("gp") == "avg":
            # With average pooling the norm belongs to the unused classifier.
            final_norm = final_norm and "norm.weight" in shapes
            options |= {"pool": "avg", "final_norm": final_norm}
        classes = 1
        names, derived = _absolute_names(final_norm, below), _absolute_derived(below)
    else:
        raise AssetError(f"{model}: neither {below}patch_generator.* nor {below}patch_embed.* is in the checkpoint")
    prefix = options.pop("_prefix")
    if classes > prefix:
        raise AssetError(f"{model}: {classes} teachers, but only {prefix} class and register tokens")
    options["registers"] = prefix - classes
    return Trunk(options, names, tuple(tokens[:classes]), derived)


def _block_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    def rows(module: str) -> int | None:
        return shapes.get(f"blocks.0.{module}.weight", (None,))[0]

    hidden, gated = rows("mlp.fc1"), rows("mlp.w12")
    if hidden is None and gated is None:
        raise AssetError("blocks.0.mlp has neither fc1 nor w12: not a transformer block of RADIO")
    scaled = any(f"blocks.0.ls1.{leaf}" in shapes for leaf in ("grandma", "gamma"))
    return {
        "mlp": "gelu" if hidden else "swiglu",
        "mlp_hidden": hidden or (gated or 0) // 2,
        "mlp_norm": "blocks.0.mlp.norm.weight" in shapes,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "layer_scale": 1e-5 if scaled else None,
    }


def _patch_options(
    shapes: Mapping[str, tuple[int, ...]], args: Mapping[str, Any], model: str, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    width, pixels = shapes["patch_generator.embedder.weight"]
    patch, grid = math.isqrt(pixels // 3), math.isqrt(shapes["patch_generator.pos_embed"][1])
    nominal = kwargs.get("img_size") or (NOMINAL_V2 if "_v2_" in model else 224)
    return {
        "width": width,
        "patch": patch,
        "max_grid": grid,
        "patch_bias": "patch_generator.embedder.bias" in shapes,
        "position": "corner" if nominal == args.get("cpe_max_size") else "cropped",
        "_prefix": shapes["patch_generator.cls_token.token"][0],
    }


def _absolute_options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    grid = math.isqrt(shapes["pos_embed"][1] - 1)
    return {"width": width, "patch": patch, "max_grid": grid, "patch_bias": True, "_prefix": 1}


def _plain_names(final_norm: bool, below: str = "base_model.") -> Callable[[str], str | None]:
    def rename(key: str) -> str | None:
        if not key.startswith(below):
            return None if key.startswith("base_model.") else key
        name = key.removeprefix(below)
        if name.startswith("norm.") and final_norm:
            return name
        if name.startswith(UNUSED):
            return None
        return name.replace("patch_generator.cls_token.token", "patch_generator.token").replace(".grandma", ".gamma")

    return rename


def _absolute_names(final_norm: bool, below: str) -> Callable[[str], str | None]:
    plain = _plain_names(final_norm, below)

    def rename(key: str) -> str | None:
        name = plain(key)
        if name == "patch_embed.proj.bias":
            return "patch_generator.embedder.bias"
        return None if name in ("patch_embed.proj.weight", "cls_token", "pos_embed") else name

    return rename


def _absolute_derived(below: str) -> dict[str, Callable[[Mapping[str, Tensor]], Tensor]]:
    """A plain ViT of timm: the class token has a position, and the patch projection is a convolution."""
    return {
        "patch_generator.embedder.weight": lambda t: t[f"{below}patch_embed.proj.weight"].flatten(1),
        "patch_generator.pos_embed": lambda t: t[f"{below}pos_embed"][:, 1:].contiguous(),
        "patch_generator.token": lambda t: (t[f"{below}cls_token"] + t[f"{below}pos_embed"][:, :1])[0],
    }


def _eradio_names(key: str) -> str | None:
    name = key.removeprefix("base_model.")
    computed = ("relative_coords_table", "relative_position_index", "relative_bias")
    if name == key or name.startswith(("norm.", "head.", "avgpool.")) or name.endswith(computed):
        return None if key.startswith("base_model.") else key
    return name
