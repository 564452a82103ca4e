"""Published models by name: the teachers of the papers as data, and RADIO releases that must be converted first.

Architecture, processor and licence of the released checkpoints (docs/method.md, 1.5), used when no weights are read:
for widths of heads, sizes of inputs, plans and random weights. With weights, the checkpoint's own files decide.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RGB = tuple[float, float, float]

_HALF: RGB = (0.5, 0.5, 0.5)
_CLIP: tuple[RGB, RGB] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, slots=True)
class Published:
    """One checkpoint of transformers.

    Args:
        config: the vision encoder's part of its config.json.
        side: side in pixels of the processor's square output, or None if it keeps the aspect ratio.
        mean, std: of its processor, for pixels in [0, 1].
        licence: of its weights.
        gated: whether the licence must be accepted before a download.
    """

    config: dict[str, Any]
    side: int | None
    mean: RGB = _HALF
    std: RGB = _HALF
    licence: str = "Apache-2.0"
    gated: bool = False


def _siglip(width: int, mlp: int, depth: int, size: int, patch: int) -> Published:
    config = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": 16,
        "image_size": size,
        "patch_size": patch,
    }
    return Published(config, size)


def _naflex(width: int, mlp: int, depth: int, heads: int) -> Published:
    config = {
        "model_type": "siglip2_vision_model",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "patch_size": 16,
        "num_patches": 256,
    }
    return Published(config, None)


def _clip(width: int, depth: int, heads: int, size: int, projection: int) -> Published:
    config = {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": 14,
        "projection_dim": projection,
    }
    return Published(config, size, *_CLIP, licence="MIT")


def _dinov2(width: int, depth: int, heads: int, *, registers: bool, swiglu: bool = False) -> Published:
    config: dict[str, Any] = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_ratio": 4,
        "use_swiglu_ffn": swiglu,
        "image_size": 518,
        "patch_size": 14,
    }
    if registers:
        config["num_register_tokens"] = 4
    return Published(config, 224, *_IMAGENET)


def _dinov3(width: int, mlp: int, depth: int, heads: int, *, gated_mlp: bool = True, biased: bool = True) -> Published:
    config = {
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_register_tokens": 4,
        "patch_size": 16,
        "image_size": 224,
        "use_gated_mlp": gated_mlp,
        "hidden_act": "silu" if gated_mlp else "gelu",
        "query_bias": biased,
        "value_bias": biased,
    }
    return Published(config, 224, *_IMAGENET, licence="DINOv3 License", gated=True)


def _sam(width: int, depth: int, heads: int, *everywhere: int) -> Published:
    config = {
        "model_type": "sam_vision_model",
        "hidden_size": width,
        "mlp_dim": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "global_attn_indexes": list(everywhere),
        "image_size": 1024,
        "patch_size": 16,
    }
    return Published(config, 1024, *_IMAGENET)


_SAM3 = {
    "model_type": "sam3_vit_model",
    "hidden_size": 1024,
    "intermediate_size": 4736,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 1008,
    "patch_size": 14,
    "window_size": 24,
    "global_attn_indexes": [7, 15, 23, 31],
    "pretrain_image_size": 336,
}

_RADIO_V4_H = {
    "model_type": "radio",
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 16,
    "max_img_size": 2048,
}

PUBLISHED: dict[str, Published] = {
    "google/siglip2-giant-opt-patch16-384": _siglip(1536, 6144, 40, 384, 16),
    "google/siglip2-giant-opt-patch16-256": _siglip(1536, 6144, 40, 256, 16),
    "google/siglip2-so400m-patch14-224": _siglip(1152, 4304, 27, 224, 14),
    "google/siglip2-so400m-patch14-384": _siglip(1152, 4304, 27, 384, 14),
    "google/siglip2-so400m-patch16-256": _siglip(1152, 4304, 27, 256, 16),
    "google/siglip2-so400m-patch16-384": _siglip(1152, 4304, 27, 384, 16),
    "google/siglip2-so400m-patch16-512": _siglip(1152, 4304, 27, 512, 16),
    "google/siglip2-so400m-patch16-naflex": _naflex(1152, 4304, 27, 16),
    "google/siglip2-base-patch16-naflex": _naflex(768, 3072, 12, 12),
    "google/siglip-so400m-patch14-384": _siglip(1152, 4304, 27, 384, 14),
    "openai/clip-vit-large-patch14": _clip(1024, 24, 16, 224, 768),
    "openai/clip-vit-large-patch14-336": _clip(1024, 24, 16, 336, 768),
    "facebook/dinov2-large": _dinov2(1024, 24, 16, registers=False),
    "facebook/dinov2-giant": _dinov2(1536, 40, 24, registers=False, swiglu=True),
    "facebook/dinov2-with-registers-large": _dinov2(1024, 24, 16, registers=True),
    "facebook/dinov2-with-registers-giant": _dinov2(1536, 40, 24, registers=True, swiglu=True),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(1024, 4096, 24, 16, gated_mlp=False),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": _dinov3(1280, 5120, 32, 20),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": _dinov3(4096, 8192, 40, 32, biased=False),
    "facebook/sam-vit-huge": _sam(1280, 32, 16, 7, 15, 23, 31),
    "facebook/sam-vit-large": _sam(1024, 24, 16, 5, 11, 17, 23),
    "facebook/sam3": Published(_SAM3, 1008, licence="SAM License", gated=True),
    "nvidia/C-RADIOv4-H": Published(_RADIO_V4_H, None, *_CLIP, licence="NVIDIA Open Model License"),
}
"""By name on the hub."""


@dataclass(frozen=True, slots=True)
class PublishedOpenCLIP:
    """One checkpoint of OpenCLIP; open_clip contains its architecture."""

    architecture: str
    licence: str
    mean: RGB = _CLIP[0]
    std: RGB = _CLIP[1]


OPEN_CLIP: dict[str, PublishedOpenCLIP] = {
    "apple/DFN5B-CLIP-ViT-H-14-378": PublishedOpenCLIP("ViT-H-14-378-quickgelu", "Apple Machine Learning Research"),
    "apple/DFN5B-CLIP-ViT-H-14": PublishedOpenCLIP("ViT-H-14-quickgelu", "Apple Machine Learning Research"),
}
"""By name on the hub."""


# --- NVIDIA's own layout ----------------------------------------------------------------------------------------------
# transformers would read it by running the code of the repository, so it is converted once instead.

_VERSION = re.compile(r"(?:[ce]-?)?radio[-_]?v\d[^/]*", re.IGNORECASE)
_REPOSITORY = re.compile(r"nvidia/(?:[ce]-?)?radio(?:[-_]?v?\d[^/]*|[-_][^/]*)?", re.IGNORECASE)
_COMMERCIAL = re.compile(r"(?:nvidia/)?c-radio[-_]?v(\d[^/]*)", re.IGNORECASE)
"""A C-RADIO is named by repository, nvidia/C-RADIOv3-H, or by version, c-radio_v3-h."""

COPIES_ALIGN = ("c-radio_v3-b", "c-radio_v3-h")
"""The code in these repositories resizes positions with align_corners, which transformers cannot."""

_UNSUPPORTED = (
    (r"e-?radio.*", "its trunk is not a transformer"),
    (r"radio[-_]?1d.*", "its tokens are one-dimensional"),
    (r"(?:radio(?:[-_]?v2\.5)?-g|dino_v2).*", "it has a norm after its last block"),
    (r".*mlpnorm", "it has norms inside its MLPs"),
    (r"radio.*-norm", "its map is normalised"),
)
"""Releases, or values of ``args.model``, that transformers' ``RadioModel`` cannot represent, and why."""


def is_version(name: str) -> bool:
    """Whether a name has the form of a release's version, ``c-radio_v3-h``, and is not a repository."""
    return _VERSION.fullmatch(name) is not None


def is_repository(name: str) -> bool:
    """Whether a repository, ``owner/name``, is named like NVIDIA's releases."""
    return _REPOSITORY.fullmatch(name) is not None


def advice(where: str, name: str, config: Mapping[str, Any] | None = None, *, local: bool = False) -> str:
    """How to convert a release of NVIDIA's own layout, or why that is impossible.

    Args:
        where: recipe key, for messages.
        name: version name, repository without a revision, or folder.
        config: its ``config.json``, if known.
        local: whether ``name`` is a folder.
    """
    config = config or {}
    problem = f"{where}: {name} is a RADIO in NVIDIA's own layout, which this kind does not read"
    why = _unsupported(name, config)
    if why is not None:
        return f"{problem}, and transformers cannot represent it: {why}. Use another: `model: nvidia/C-RADIOv4-H`"
    # Loaded by its version name, a release behaves as torch.hub's code, which transformers can represent.
    release = None if local else _release(name)
    command = f"`agglo export {shlex.quote(release or name)} --to transformers -o FOLDER`"
    if release is None and not {_release(each) for each in _names(name, config)}.isdisjoint(COPIES_ALIGN):
        command = f'`agglo.export(agglo.load({name!r}, align_corners=False), "transformers", "FOLDER")` in Python'
    return f"{problem}. Convert it once with {command}, then use `model: FOLDER`"


def _release(name: str) -> str | None:
    """The version name of a C-RADIO in any spelling."""
    found = _COMMERCIAL.fullmatch(name)
    return None if found is None else f"c-radio_v{found[1].lower()}"


def _names(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """The name of the repository or folder, and the version in ``config.json``."""
    return name.rstrip("/").rpartition("/")[2], str(config.get("version", ""))


def _unsupported(name: str, config: Mapping[str, Any]) -> str | None:
    """Why transformers cannot represent a release, or None; the configuration takes precedence over the name."""
    args = config.get("args") or {}
    model = str(args.get("model", ""))
    if args.get("model_norm"):
        model = "dino_v2"
    elif config.get("feature_normalizer_config"):
        model = "radio-norm"
    for each in (model,) if model else _names(name, config):
        for pattern, why in _UNSUPPORTED:
            if re.fullmatch(pattern, each, re.IGNORECASE):
                return why
    return None
