"""RADIO1D checkpoints in NVIDIA's layout: constructor options and key names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from agglo.config import nearest
from agglo.types import ConfigError

FACTORIES: dict[str, dict[str, Any]] = {
    "radio1d_large_patch16_224": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0},
    "radio1d_so400m_patch16_224": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 4304 / 1152},
    "radio1d_huge_patch16_224": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4.0},
}
"""Official architectures and their defaults, which ``model_kwargs`` override (docs/checkpoints.md, 4.2 and 9)."""

_NEEDED = ("downscale_levels", "decoder_depth", "decoder_upscale_levels")
_FIXED: dict[str, Any] = {
    "qkv_bias": True,
    "qk_norm": False,
    "pre_norm": False,
    "init_values": None,
    "act_layer": None,
    "norm_layer": None,
    "mlp_layer": None,
}
"""Arguments with a single supported value."""

_TRAINING_ONLY = ("_iter_count", "dynamic_rate_vec", "dynamic_rate_projector")


def options_from_official(
    model: str,
    model_kwargs: Mapping[str, Any],
    teachers: Sequence[Mapping[str, Any]] = (),
    *,
    model_norm: bool = False,
) -> dict[str, Any]:
    """The keys of :class:`agglo.students.vit_1d.ViT1D`, without ``kind``, for an official checkpoint.

    Unknown arguments (schedules of the token rate, dropout) are ignored: they concern training, and one that changes a
    weight fails when the weights are loaded.

    Args:
        model: ``args.model``, one of :data:`FACTORIES`.
        model_kwargs: ``args.model_kwargs``, which override that factory.
        teachers: ``args.teachers``; without ``num_cls_tokens``, each unique name is one class token.
        model_norm: ``args.model_norm``: whether the encoder's final norm is applied.

    Raises:
        ConfigError: an unknown architecture, a missing argument, or an unsupported value.
    """
    if model not in FACTORIES:
        raise ConfigError(f"no RADIO1D architecture {model!r}{nearest(model, FACTORIES)}")
    given = {"patch_size": 16, "img_size": 224, **FACTORIES[model], **model_kwargs}
    missing = [key for key in _NEEDED if given.get(key) is None]
    if missing:
        raise ConfigError(f"{model}: model_kwargs lacks {', '.join(missing)}; RADIO1D needs {', '.join(_NEEDED)}")
    for key, value in _FIXED.items():
        if given.get(key, value) != value:
            raise ConfigError(f"{model}: model_kwargs.{key} is {given[key]!r}; only {value!r} is supported")
    patch, image = int(given["patch_size"]), _side(given["img_size"])
    nominal = image // patch
    table = round((given.get("cpe_max_size") or image) / patch)
    names = {teacher["name"] for teacher in teachers if "name" in teacher}
    classes = int(given.get("num_cls_tokens") or max(1, len(names)))
    levels = [int(level) for level in given["downscale_levels"]]
    return {
        "width": int(given["embed_dim"]),
        "depth": int(given["depth"]),
        "heads": int(given["num_heads"]),
        "mlp_ratio": float(given["mlp_ratio"]),
        "patch": patch,
        "max_grid": table,
        "registers": _registers(given, classes),
        "class_tokens": classes,
        "downscale_levels": levels,
        "decoder_depth": int(given["decoder_depth"]),
        "decoder_upscale_levels": [int(level) for level in given["decoder_upscale_levels"]],
        "filler_grid": -(-nominal // 2 ** len(levels)),
        "final_norm": bool(model_norm),
        "position": "corner" if table == nominal else "cropped",
    }


def weights_from_official(state: Mapping[str, Tensor], *, final_norm: bool) -> dict[str, Tensor]:
    """Rename official keys, without ``base_model.``, to agglo's; drop tensors of training and an unused final norm."""
    unused = _TRAINING_ONLY if final_norm else (*_TRAINING_ONLY, "norm")
    kept = {key: tensor for key, tensor in state.items() if key.split(".")[0] not in unused}
    return {key.replace("patch_generator.cls_token.", "patch_generator."): tensor for key, tensor in kept.items()}


def _side(size: Any) -> int:
    """Side of the square ``img_size``, a number or a pair."""
    sides = {int(side) for side in (size if isinstance(size, Sequence) else (size,))}
    if len(sides) != 1:
        raise ConfigError(f"model_kwargs.img_size: {size} is not square, and the decoder's filler table must be")
    return sides.pop()


def _registers(given: Mapping[str, Any], classes: int) -> int:
    """``num_registers``, else the tokens up to the next multiple (a whole one if the class tokens fill theirs)."""
    if given.get("num_registers"):
        return int(given["num_registers"])
    multiple = given.get("register_multiple")
    return int(multiple) - classes % int(multiple) if multiple else 0
