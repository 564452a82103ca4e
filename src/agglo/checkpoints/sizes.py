"""Sizes of official architectures, and a check of a checkpoint's trunk against the one its arguments name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from agglo.types import AssetError


class Size(NamedTuple):
    """A ViT's size under its official name."""

    width: int
    depth: int
    heads: int
    hidden: int
    layer_scale: float | None = None
    mlp_norm: bool = False


SIZES = {
    "vit_tiny_patch14_224": Size(192, 12, 3, 768),
    "vit_small_patch14_224": Size(384, 12, 6, 1536),
    "vit_base_patch14_224": Size(768, 12, 12, 3072),
    "vit_small_patch16_224": Size(384, 12, 6, 1536),
    "vit_base_patch16_224": Size(768, 12, 12, 3072),
    "vit_base_patch16_v2_224": Size(768, 12, 12, 3072, 1e-5),
    "vit_large_patch14_224": Size(1024, 24, 16, 4096),
    "vit_large_patch16_224": Size(1024, 24, 16, 4096),
    "vit_large_patch16_v2_224": Size(1024, 24, 16, 4096, 1e-5),
    "vit_so400m_patch16_224": Size(1152, 27, 16, 4304),
    "vit_so400m_v2_patch16_224": Size(1152, 27, 16, 4320),
    "vit_huge_patch14_224": Size(1280, 32, 16, 5120),
    "vit_huge_patch16_224": Size(1280, 32, 16, 5120),
    "vit_huge_patch16_224_mlpnorm": Size(1280, 32, 16, 5120, None, True),
    "vit_giant_patch16_224": Size(1536, 40, 24, 6144),
    "vit_bigG_patch14_224": Size(1664, 48, 16, 6656, 1e-6),
    "dino_v2_l_student": Size(1024, 24, 16, 4096, 1e-5),
    "dino_v2_g_student": Size(1536, 40, 24, 4096, 1e-5),
}
"""Official ViTs. Tensors do not show the number of heads; the rest determines which tensors must exist."""

UNUSED = ("reg_token", "mask_token", "head.", "fc_norm.", "norm.", "norm_pre.", "input_conditioner.", "_iter_count",
          "dynamic_rate_vec", "dynamic_rate_projector")  # fmt: skip
"""Prefixes of unused tensors in a trunk."""

_EITHER = ("vit_huge_patch16_224",)
"""Published sources disagree on the layer scale of C-RADIOv3-H: the file decides, with a warning."""

_FIRST = 10


def is_gated(model: str) -> bool:
    """Whether an official trunk has SwiGLU MLPs."""
    return model.startswith("dino_v2") and "_g_" in model


def check(
    shapes: Mapping[str, tuple[int, ...]], model: str, args: Mapping[str, Any], below: str, *, source: str
) -> None:
    """Check a trunk against the architecture of its arguments; names outside :data:`SIZES` are not checked.

    Args:
        shapes: of the trunk's tensors, by the names of torch.hub without ``below``, reparametrisations removed.
        model: ``args.model``.
        args: their ``model_kwargs`` override the table.
        below: the removed prefix, ``base_model.`` or ``base_model.inner.``.
        source: origin of the tensors, for messages.

    Raises:
        AssetError: they differ; names the first ten missing and left-over keys.
    """
    if model not in SIZES:
        return
    found = _found(shapes, below)
    patch = found.pop("patch")
    expected = _expected(model, args, patch)
    if model in _EITHER and (found["layer scale"], expected["layer scale"]) == ("yes", "no"):
        warnings.warn(f"{source} has layer scales, which {model} is not published to have: using them", stacklevel=2)
        expected["layer scale"] = "yes"
    wrong = [name for name, value in found.items() if value is not None and value != expected[name]]
    if "MLP width" in wrong and _rounded(expected["MLP width"], found["MLP width"], model, args):
        wrong.remove("MLP width")
    if not wrong:
        return
    present = {key.replace(".gamma", ".grandma") for key in shapes if not key.startswith(UNUSED)}
    wanted = _names(expected)
    parts = [", ".join(f"{name} {expected[name]}" for name in wrong), ", ".join(f"{n} {found[n]}" for n in wrong)]
    lost = _listed("missing", [below + key for key in wanted if key not in present])
    more = _listed("left over", [below + key for key in sorted(present - set(wanted), key=_order)])
    raise AssetError(
        f"{source} does not match its args: {model} has {parts[0]}; this one has {parts[1]}"
        f"{lost}{more}; use the args and the weights of one release"
    )


def _expected(model: str, args: Mapping[str, Any], patch: int | None) -> dict[str, Any]:
    """Properties of a trunk of this name; the patch side is the file's."""
    size, kwargs = SIZES[model], args.get("model_kwargs") or {}
    width, largest = int(kwargs.get("embed_dim") or size.width), args.get("cpe_max_size")
    return {
        "keys below": "base_model.inner." if model.startswith("dino_v2") else "base_model.",
        "depth": int(kwargs.get("depth") or size.depth),
        "width": width,
        "MLPs": "gated" if is_gated(model) else "plain",
        "MLP width": _hidden(model, width, kwargs),
        "MLP norm": "yes" if size.mlp_norm else "no",
        "layer scale": "yes" if kwargs.get("init_values", size.layer_scale) else "no",
        "positions": _NO_TABLE if largest is None else _table(round(float(largest) / (patch or 16))),
    }


def _hidden(model: str, width: int, kwargs: Mapping[str, Any]) -> int:
    size, ratio = SIZES[model], kwargs.get("mlp_ratio")
    if ratio is None and width == size.width:
        return size.hidden
    if is_gated(model):
        return 8 * math.ceil(int(int(width * (ratio or 4)) * 2 / 3) / 8)
    return int(width * (ratio or size.hidden / size.width))


def _rounded(expected: int, found: int, model: str, args: Mapping[str, Any]) -> bool:
    """Whether a width derived from the table differs only by the rounding of its ratio."""
    kwargs = args.get("model_kwargs") or {}
    derived = kwargs.get("mlp_ratio") is None and int(kwargs.get("embed_dim") or 0) not in (0, SIZES[model].width)
    return derived and abs(expected - found) <= 1


def _found(shapes: Mapping[str, tuple[int, ...]], below: str) -> dict[str, Any]:
    """The same properties from the tensors; None where unknown."""
    embedder, convolution = shapes.get("patch_generator.embedder.weight"), shapes.get("patch_embed.proj.weight")
    table = shapes.get("patch_generator.pos_embed")
    plain, gated = (shapes.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "w12"))
    hidden = plain[0] if plain else gated and gated[0] // 2
    patch = math.isqrt(embedder[1] // 3) if embedder else convolution and convolution[-1]
    return {
        "keys below": below,
        "depth": 1 + max((int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")), default=-1),
        "width": (embedder or convolution or (None,))[0],
        "MLPs": None if hidden is None else "plain" if plain else "gated",
        "MLP width": hidden,
        "MLP norm": "yes" if "blocks.0.mlp.norm.weight" in shapes else "no",
        "layer scale": "yes" if any(f"blocks.0.ls1.{leaf}" in shapes for leaf in ("grandma", "gamma")) else "no",
        "patch": patch,
        "positions": (table and _table(math.isqrt(table[1]))) if embedder else convolution and _NO_TABLE,
    }


_NO_TABLE = "of a plain ViT (patch_embed, pos_embed)"


def _table(side: int) -> str:
    return f"cropped from a table of {side}x{side} (patch_generator)"


def _names(expected: Mapping[str, Any]) -> list[str]:
    """The keys of a trunk, in the order of its blocks."""
    inner, cropped = expected["keys below"].endswith("inner."), expected["positions"] != _NO_TABLE
    names = ["patch_generator.embedder.weight", *(["patch_generator.embedder.bias"] if inner else [])]
    names += ["patch_generator.pos_embed", "patch_generator.cls_token.token"]
    if not cropped:
        names = ["patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token"]
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2"]
    layers += ["mlp.w12", "mlp.w3"] if expected["MLPs"] == "gated" else ["mlp.fc1", "mlp.fc2"]
    layers += ["mlp.norm"] if expected["MLP norm"] == "yes" else []
    leaves = [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    leaves += ["ls1.grandma", "ls2.grandma"] if expected["layer scale"] == "yes" else []
    return names + [f"blocks.{index}.{leaf}" for index in range(expected["depth"]) for leaf in leaves]


def _order(key: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _listed(what: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    more = ", ..." if len(keys) > _FIRST else ""
    return f"; {len(keys)} {what} ({', '.join(keys[:_FIRST])}{more})" if keys else ""
