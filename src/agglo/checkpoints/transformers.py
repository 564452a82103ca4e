"""transformers' own ``RadioModel`` (model type ``radio``), as an agglo model.

Files have one of two sets of names: those of ``save_pretrained``, which are NVIDIA's but for layer scales and gated
MLPs, or the module's own (``save_original_format=False``), with separate query, key and value.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agglo.checkpoints.foreign import build, channels
from agglo.checkpoints.radio import is_official
from agglo.model.model import Model
from agglo.nn.blocks import NORM_EPS
from agglo.types import ConfigError
from agglo.weights.reading import Checkpoint
from agglo.weights.tensors import Renamed

DEFAULTS: dict[str, Any] = {
    "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_ratio": 4.0, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "qkv_bias": True, "layerscale_value": 1.0, "num_channels": 3,
    "patch_size": 16, "image_size": 224, "max_img_size": 2048, "num_cls_tokens": 3, "num_registers": 7,
    "summary_idxs": (0, 1), "norm_mean": (0.48145466, 0.4578275, 0.40821073),
    "norm_std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip
"""Defaults of ``RadioConfig``."""

_PREFIXES = (
    ("radio_model.model.patch_generator.embedder.", "student.patch_generator.embedder."),
    ("radio_model.model.patch_generator.pos_embed", "student.patch_generator.pos_embed"),
    ("radio_model.model.patch_generator.cls_token.token", "student.patch_generator.token"),
    ("radio_model.model.blocks.", "student.blocks."),
    ("radio_model.input_conditioner.norm_", "conditioner."),
    ("embeddings.patch_projection.", "student.patch_generator.embedder."),
    ("embeddings.position_embedding", "student.patch_generator.pos_embed"),
    ("embeddings.cls_register_token", "student.patch_generator.token"),
    ("encoder.layer.", "student.blocks."),
    ("input_conditioner.norm_", "conditioner."),
)
_WITHIN = (
    (".attention.o_proj.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.down_proj.", ".mlp.w3."),
)
_VIDEO = re.compile(r".*(video_embedder|video_patch_projection)\..*")
_ADAPTOR = re.compile(r"radio_model\.adaptors\..*")
_PART = re.compile(r"(.*\.)(?:(attn|attention)\.(q|k|v)_proj|mlp\.(gate|up)_proj)\.(weight|bias)")


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of transformers' ``RadioModel`` and not of an official repository."""
    return config.get("model_type") == "radio" and not is_official(config)


def from_native(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    **student: Any,
) -> Model:
    """A folder of ``RadioModel.save_pretrained`` as an agglo model, without heads.

    Args:
        checkpoint: of :func:`agglo.weights.reading.read_folder`.
        dtype: of the weights; None to keep the file's.
        device: target.
        student: options of the student to change: ``window``, ``align_corners``, ``num_global``, ``num_windowed``.

    Returns:
        The model in eval mode. Layer scales that are all one, which transformers writes for models without any, are
        dropped.

    Raises:
        ConfigError: an unsupported configuration, or an unknown option.
        AssetError: the tensors do not match the configuration; names the first ten missing or left over.
    """
    source = checkpoint.source
    try:
        config = {**DEFAULTS, **{key: value for key, value in checkpoint.config.items() if value is not None}}
        _check(config, source)
        scale = _layer_scale(checkpoint.tensors, config)
        options = _options(config) | {"layer_scale": scale}
        summary = [int(index) for index in config["summary_idxs"]]
        classes, preferred = int(config["num_cls_tokens"]), int(config["image_size"])
        derived = _derived(checkpoint.tensors, config, scale)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: its config.json is not one of a RadioModel ({error})") from None
    for key in ("summary_idxs", "radio_model.summary_idxs"):
        if key in checkpoint.tensors:
            summary = [int(index) for index in checkpoint.tensors[key]]
    _warn_about_unused(checkpoint)
    return build(
        checkpoint,
        options,
        Renamed(checkpoint.tensors, partial(_ours, scaled=scale is not None), derived=derived),
        tokens=[f"cls_{slot}" for slot in range(classes)],
        summary_slots=summary,
        preferred_size=preferred,
        licence=None,
        given=student,
        dtype=dtype,
        device=device,
    )


def _check(config: Mapping[str, Any], source: str) -> None:
    """Check the settings that the tensors do not show."""
    wanted = {"layer_norm_eps": NORM_EPS, "num_channels": 3}
    if not config["use_swiglu_ffn"]:
        wanted["hidden_act"] = "gelu"
    for key, value in wanted.items():
        if config[key] != value:
            raise ConfigError(f"{source}: {key} is {config[key]!r} in its config.json, but a RADIO ViT has {value!r}")


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    width, patch = int(config["hidden_size"]), int(config["patch_size"])
    hidden, gated = int(width * float(config["mlp_ratio"])), bool(config["use_swiglu_ffn"])
    return {
        "width": width,
        "depth": int(config["num_hidden_layers"]),
        "heads": int(config["num_attention_heads"]),
        "patch": patch,
        "max_grid": int(config["max_img_size"]) // patch,
        "registers": int(config["num_registers"]),
        "mlp": "swiglu" if gated else "gelu",
        "qkv_bias": bool(config["qkv_bias"]),
        "mlp_hidden": gated_width(hidden) if gated else hidden,
    }


def gated_width(hidden: int) -> int:
    """Hidden width of ``RadioModel``'s gated MLP: two thirds of the plain one's, rounded up to a multiple of 8."""
    return -(-int(hidden * 2 / 3) // 8) * 8


# --- tensors ----------------------------------------------------------------------------------------------------------


def _ours(key: str, *, scaled: bool) -> str | None:
    """The name of a tensor in agglo; None if it is unused, or a part of one of agglo's matrices."""
    if key.endswith("summary_idxs") or _VIDEO.fullmatch(key) or _ADAPTOR.fullmatch(key) or _PART.fullmatch(key):
        return None
    for stored, ours in _PREFIXES:
        if key.startswith(stored):
            name = ours + key.removeprefix(stored)
            for inner, own in _WITHIN:
                name = name.replace(inner, own)
            return name if scaled or not name.endswith((".ls1.gamma", ".ls2.gamma")) else None
    return key


def _derived(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], scale: float | None
) -> dict[str, Callable[[Mapping[str, Tensor]], Tensor]]:
    """Our fused matrices, and tensors that only the configuration determines."""
    derived: dict[str, Callable[[Mapping[str, Tensor]], Tensor]] = {}
    for key in tensors:
        match = _PART.fullmatch(key)
        if match is None:
            continue
        below, attention, _, _, leaf = match.groups()
        ours = _ours(f"{below}{'attn.qkv' if attention else 'mlp.w12'}.{leaf}", scaled=True)
        parts = [f"{attention}.{n}_proj" for n in "qkv"] if attention else ["mlp.gate_proj", "mlp.up_proj"]
        names = [f"{below}{part}.{leaf}" for part in parts]
        if ours is not None and all(name in tensors for name in names):
            derived[ours] = partial(_stacked, names)
    width, depth = int(config["hidden_size"]), int(config["num_hidden_layers"])
    if scale is not None and not _scales(tensors):
        names = [f"student.blocks.{n}.ls{which}.gamma" for n in range(depth) for which in (1, 2)]
        derived |= dict.fromkeys(names, partial(_full, width, scale))
    for name in ("mean", "std"):
        if not any(key.endswith(f"input_conditioner.norm_{name}") for key in tensors):
            derived[f"conditioner.{name}"] = partial(channels, [float(value) for value in config[f"norm_{name}"]])
    return derived


def _stacked(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name] for name in names])


def _full(size: int, value: float, _: Mapping[str, Tensor]) -> Tensor:
    return torch.full((size,), value)


def _scales(tensors: Mapping[str, Tensor]) -> list[str]:
    return [key for key in tensors if key.endswith((".layer_scale1.lambda1", ".layer_scale2.lambda1"))]


def _layer_scale(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> float | None:
    """Initial value of the layer scales, or None if all are one and have no effect."""
    value, keys = float(config["layerscale_value"]), _scales(tensors)
    identity = all(bool((tensors[key] == 1).all()) for key in keys) if keys else value == 1
    return None if identity else value


def _warn_about_unused(checkpoint: Checkpoint) -> None:
    if any(_VIDEO.fullmatch(key) for key in checkpoint.tensors):
        warnings.warn(
            f"{checkpoint.source}: the projection of stacked video frames is not loaded; pass clips (B, T, 3, H, W), "
            "whose frames are encoded one by one",
            stacklevel=3,
        )
    if any(_ADAPTOR.fullmatch(key) for key in checkpoint.tensors):
        warnings.warn(
            f"{checkpoint.source}: heads are not loaded, because its config.json does not describe them; load the "
            "official repository instead",
            stacklevel=3,
        )
