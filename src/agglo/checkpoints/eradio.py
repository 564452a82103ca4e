"""Published E-RADIO networks, and the arguments of the released constructor as options of the student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agglo.config import nearest
from agglo.types import ConfigError

_LARGE: dict[str, Any] = {
    "width": 192,
    "stem_width": 64,
    "depths": (3, 3, 5, 5),
    "heads": (8, 16),
    "windows": ((16,), (16,)),
    "ratios": ((2, 1), (1,)),
    "bias_hidden": 512,
    "neck_start": 2,
    "neck_width": 1536,
}
_SMALL: dict[str, Any] = {
    **_LARGE,
    "width": 32,
    "stem_width": 32,
    "depths": (1, 3, 4, 5),
    "heads": (8, 16),
    "neck_width": 256,
}
_POOLED: dict[str, Any] = {**_SMALL, "conv_resample": False, "group_ratio": 1.0, "bias_hidden": 64}

VARIANTS: dict[str, dict[str, Any]] = {
    "eradio_large_fullres_ws16": _LARGE,
    "eradio_xxxtiny": _SMALL,
    "eradio_xxxtiny_8x_ws12": {**_POOLED, "windows": ((12,), (12,))},
    "eradio_xxxtiny_8x_ws16": {**_POOLED, "neck_start": 1},
    "eradio": _LARGE,
    "e-radio_v2": _LARGE,
}
"""Options of :class:`agglo.students.hybrid.Hybrid` by published architecture; the last two names are those of the only
release, which is ``eradio_large_fullres_ws16``."""

_RENAMED = {
    "dim": "width",
    "in_dim": "stem_width",
    "depths": "depths",
    "num_heads": "heads",
    "window_size": "windows",
    "sr_ratio": "ratios",
    "yolo_arch": "csp",
    "conv_base": "conv_resample",
    "conv_groups_ratio": "group_ratio",
    "cpb_mlp_hidden": "bias_hidden",
    "use_swiglu": "mlp",
    "layer_scale": "layer_scale",
    "layer_scale_conv": "conv_layer_scale",
    "multi_query": "multi_query",
    "use_shift": "shift",
    "shuffle_down": "tile_stem",
    "downsample_shuffle": "tile_downsample",
    "neck_start_stage": "neck_start",
    "full_features_head_dim": "neck_width",
}
_ABSENT: dict[str, Any] = {
    "csp": False,
    "conv_resample": False,
    "group_ratio": 0.0,
    "bias_hidden": 512,
    "mlp": "gelu",
    "layer_scale": None,
    "conv_layer_scale": None,
    "multi_query": False,
    "shift": False,
    "tile_stem": False,
    "tile_downsample": False,
}
"""Defaults of optional arguments."""
_FIXED: dict[str, Any] = {
    "return_full_features": True,
    "use_neck": True,
    "mlp_ratio": 4,
    "in_chans": 3,
    "qkv_bias": False,
    "qk_scale": None,
}
"""Arguments with a single supported value."""
_INERT = frozenset({"num_classes", "drop_rate", "attn_drop_rate", "drop_path_rate", "drop_uniform"})
"""Arguments of the unused classifier and of training."""


def options_from_official(model_kwargs: Mapping[str, Any], variant: str | None = None) -> dict[str, Any]:
    """Recipe keys of :class:`agglo.students.hybrid.Hybrid` equivalent to arguments of the released constructor.

    Args:
        model_kwargs: ``args.model_kwargs`` of a checkpoint.
        variant: the published architecture that they override; None if they are complete.

    Raises:
        ConfigError: an unknown, unsupported or missing argument, or no such variant.
    """
    if variant is not None and variant not in VARIANTS:
        raise ConfigError(f"no E-RADIO variant {variant!r}{nearest(variant, VARIANTS)}")
    options = dict(_ABSENT if variant is None else VARIANTS[variant])
    for key, value in model_kwargs.items():
        if key in _FIXED:
            if value != _FIXED[key]:
                raise ConfigError(f"model_kwargs.{key}: {value!r} is not supported for E-RADIO, only {_FIXED[key]!r}")
        elif key in _RENAMED:
            options[_RENAMED[key]] = _converted(key, value)
        elif key not in _INERT:
            known = {*_RENAMED, *_FIXED, *_INERT}
            raise ConfigError(f"model_kwargs.{key}: not a known argument of E-RADIO{nearest(key, known)}")
    missing = [key for key, name in _RENAMED.items() if name not in options and name not in _ABSENT]
    if missing:
        raise ConfigError(f"model_kwargs: E-RADIO also needs {', '.join(missing)}, or a published variant")
    return options


def _converted(key: str, value: Any) -> Any:
    """The value of the student's option; of four stages, only the last two have attention."""
    try:
        if key == "num_heads":
            return tuple(int(count) for count in _last_two(value))
        if key in ("window_size", "sr_ratio"):
            return tuple(tuple(map(int, e)) if isinstance(e, list | tuple) else (int(e),) for e in _last_two(value))
        if key == "depths":
            return tuple(int(depth) for depth in value)
    except (TypeError, ValueError):
        raise ConfigError(f"model_kwargs.{key}: needs one entry for each of four stages, not {value!r}") from None
    if key == "use_swiglu":
        return "swiglu" if value else "gelu"
    return value


def _last_two(value: Any) -> tuple[Any, Any]:
    """Entries of stages 2 and 3."""
    _, _, third, fourth = value
    return third, fourth
