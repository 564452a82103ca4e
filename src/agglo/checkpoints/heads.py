"""Heads of RADIO checkpoints: options and key names, from official tensor names and shapes; no values are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agglo.config import build, nearest
from agglo.types import AssetError, ConfigError

ATTENTION_HEADS = 16
"""Attention heads of an official attention head, which tensors do not show."""

_SHOWN = 10
"""Number of keys in a message."""


class _Layout(NamedTuple):
    """Official tensor names of one version.

    Attributes:
        mlp: prefix of the MLP.
        last: the MLP's last linear.
        inner: name and stride of the index of the MLP's inner blocks.
        rename: agglo's key to the official one.
    """

    mlp: str
    last: str
    inner: tuple[str, int]
    rename: Callable[[str], str]


def _rename_v1(key: str) -> str:
    # A flat sequence of (linear, LayerNorm, ReLU).
    match = re.match(r"blocks\.(\d+)\.([01])\.", key)
    return f"inner.{3 * int(match[1]) + int(match[2])}.{key[match.end() :]}" if match else key


def _rename_v2(key: str) -> str:
    module, _, leaf = key.rpartition(".")
    official = {"norm": "final.0", "fc2": "final.2"}.get(module, module)
    return f"{official}.{leaf}"


def _rename_attention(key: str) -> str:
    return f"mlp.{_rename_v2(key.removeprefix('mlp.'))}" if key.startswith("mlp.") else key


_LAYOUTS = {
    "v1": _Layout("", "fc2", ("inner", 3), _rename_v1),
    "v2": _Layout("", "final.2", ("blocks", 1), _rename_v2),
    "attn": _Layout("mlp.", "final.2", ("blocks", 1), _rename_attention),
}


def read_head(
    tensors: Mapping[str, Tensor], prefix: str, version: str, upsample: int = 1
) -> tuple[dict[str, Any], int, int, dict[str, str]]:
    """Recognise the head with official tensors under ``prefix``.

    Args:
        tensors: by official key, spectral reparametrisations already materialised.
        prefix: of the head, including the dot: ``"_heads.0."``, ``"_feature_projections.sam."``.
        version: the head's ``mlp_version``: ``v1``, ``v2`` or ``attn``.
        upsample: u, the ``fd_upsample_factor``: the last linear has ``u*u`` times the target's channels.

    Returns:
        Options for :func:`agglo.config.build`, source width, target width, and the official key (with ``prefix``) of
        each state-dict key.

    Raises:
        ConfigError: an unknown version, or ``upsample`` below 1.
        AssetError: the tensors do not match; names the first ten missing, left over or of another shape.
    """
    if version not in _LAYOUTS:
        raise ConfigError(f"no version {version!r} of RADIO's heads{nearest(version, _LAYOUTS)}")
    if upsample < 1:
        raise ConfigError(f"upsample: must be at least 1, got {upsample}")
    shapes = {key.removeprefix(prefix): tuple(tensors[key].shape) for key in tensors if key.startswith(prefix)}
    if not shapes:
        raise AssetError(f"the checkpoint has no tensors under {prefix!r}{nearest(prefix, _siblings(tensors, prefix))}")
    layout = _LAYOUTS[version]
    first, last = f"{layout.mlp}fc1.weight", f"{layout.mlp}{layout.last}.weight"
    if absent := [name for name in (first, last) if len(shapes.get(name, ())) != 2]:
        raise _mismatch(prefix, version, shapes, {"missing": absent, "present": sorted(shapes)})
    hidden, source = shapes[first]
    target, rest = divmod(shapes[last][0], upsample**2)
    if rest:
        raise AssetError(
            f"{prefix}{last}: {shapes[last][0]} channels are not a multiple of {upsample} x {upsample} cells per "
            "position; is this the upsampling factor of another teacher?"
        )
    inner = {"hidden": hidden, "inner": _count(shapes, layout.mlp + layout.inner[0], layout.inner[1])}
    options: dict[str, Any] = {"kind": "mlp", "version": version, **inner, "upsample": upsample}
    if version == "attn":
        blocks = _count(shapes, "blocks")
        options = {"kind": "attention", "blocks": blocks, "heads": ATTENTION_HEADS, **inner, "upsample": upsample}
    with torch.device("meta"):
        expected = build("heads", options, source, target, where=prefix.removesuffix("."), installed=False).state_dict()
    keys = {ours: layout.rename(ours) for ours in expected}
    wrong = {
        "missing": [name for name in keys.values() if name not in shapes],
        "left over": sorted(set(shapes) - set(keys.values())),
        "of another shape": [
            f"{name} {shapes[name]}, expected {tuple(expected[ours].shape)}"
            for ours, name in keys.items()
            if name in shapes and shapes[name] != tuple(expected[ours].shape)
        ],
    }
    if any(wrong.values()):
        raise _mismatch(prefix, version, shapes, wrong)
    return options, source, target, {ours: prefix + name for ours, name in keys.items()}


def _count(names: Collection[str], stem: str, stride: int = 1) -> int:
    """Number of modules with names ``stem.INDEX...``, ``stride`` indices per module."""
    found = (re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in names)
    return len({int(match[1]) // stride for match in found if match})


def _siblings(names: Collection[str], prefix: str) -> set[str]:
    """Prefixes of the same depth and parent: the existing heads."""
    parent = prefix.removesuffix(".").rpartition(".")[0]
    depth = prefix.count(".")
    below = (name.split(".") for name in names if name.startswith(f"{parent}."))
    return {".".join(parts[:depth]) + "." for parts in below if len(parts) > depth}


def _mismatch(prefix: str, version: str, names: Collection[str], wrong: Mapping[str, Collection[str]]) -> AssetError:
    """The error for tensors that do not match: ten names of each problem, and the version they belong to."""
    lines = [
        f"{len(found)} {what}: {', '.join(list(found)[:_SHOWN])}" + (", ..." if len(found) > _SHOWN else "")
        for what, found in wrong.items()
        if found
    ]
    others = [v for v, layout in _LAYOUTS.items() if v != version and f"{layout.mlp}{layout.last}.weight" in names]
    hint = f"; its names are those of version {others[0]!r}" if others else ""
    if any(".parametrizations." in name for name in names):
        hint = "; its spectral reparametrisation must be materialised first"
    return AssetError(f"the tensors under {prefix!r} are not a {version!r} head: {'; '.join(lines)}{hint}")
