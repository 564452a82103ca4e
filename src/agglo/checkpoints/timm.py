"""timm's ports of RADIO (``naflexvit_*_radio_*`` and ``vit_*_radio_*``), as agglo models."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agglo.checkpoints.foreign import build, channels, notes
from agglo.model.model import Model
from agglo.types import AssetError, ConfigError
from agglo.weights.reading import Checkpoint
from agglo.weights.tensors import Renamed

_NAME = re.compile(r"(naflexvit|vit)_(\w+?)_patch(\d+)_radio_(v\d+)(\..+)?")

HEADS = {"base": 12, "large": 16, "so400m": 16, "huge": 16, "giant": 24}
"""Attention heads by size, unless the file states them."""

ALIGNED = {("base", "v3"), ("huge", "v3")}
"""Architectures that timm resizes with ``align_corners``, as NVIDIA's repositories of these weights do."""

GENERATIONS = {
    "v3": (("clip", "siglip2-g", "dino_v2", "sam"), 8, (0, 1, 2)),
    "v4": (("siglip2-g", "dino_v3", "sam3"), 10, (0, 1)),
}
"""Generation → class tokens, number of prefix tokens, and indices of the summary."""

SAME: dict[str, Any] = {
    "pos_embed": "learned",
    "pos_embed_interp_mode": "bilinear",
    "pos_embed_ar_preserving": True,
    "pos_embed_antialias": False,
    "act_layer": None,
    "norm_layer": None,
    "rope_type": "",
    "pre_norm": False,
    "qk_norm": False,
    "swiglu_mlp": False,
    "scale_mlp_norm": False,
    "patchify_channels_last": True,
}
"""Required arguments of NaFlexViT for a RADIO ViT, which the tensors do not show."""


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of one of timm's RADIO architectures."""
    name = config.get("architecture")
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def from_timm(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    **student: Any,
) -> Model:
    """A folder of timm's hub layout as an agglo model, without heads.

    timm counts all class tokens but the first as registers. Their number is known for agglo's exports and the released
    generations; else it is 1. timm's pooled output is the first one; agglo's summary is all that the generation uses.

    Args:
        checkpoint: of :func:`agglo.weights.reading.read_folder`.
        dtype: of the weights; None to keep the file's.
        device: target.
        student: options of the student to change: ``window``, ``align_corners``, ``num_global``, ``num_windowed``.

    Returns:
        The model in eval mode. A ``vit_*`` has positions for one size only, which changes its output at other sizes; a
        warning states this.

    Raises:
        ConfigError: an unsupported architecture or argument, or an unknown option.
        AssetError: the tensors do not match the configuration; names the first ten missing or left over.
    """
    tensors, config = checkpoint.tensors, checkpoint.config
    match = _NAME.fullmatch(str(config.get("architecture")))
    if match is None:
        raise ConfigError(f"{checkpoint.source}: {config.get('architecture')!r} is not a RADIO architecture of timm")
    size, generation = match[2], match[4]
    given = config.get("model_args")
    arguments = {key: value for key, value in given.items() if value is not None} if isinstance(given, Mapping) else {}
    meta = config.get("pretrained_cfg")
    meta = meta if isinstance(meta, Mapping) else config
    _check(arguments, checkpoint.source)
    keys = _Keys(tensors, checkpoint.source)
    options = keys.options() | {
        "heads": _integer(arguments.get("num_heads", HEADS.get(size, 16)), "num_heads", checkpoint.source),
        "align_corners": bool(arguments.get("pos_embed_align_corners", (size, generation) in ALIGNED)),
    }
    tokens, summary = _class_tokens(notes(config), generation, keys.prefix())
    options["registers"] = keys.prefix() - len(tokens)
    if keys.fixed:
        side = options["max_grid"] * options["patch"]
        warnings.warn(
            f"{checkpoint.source}: {config['architecture']} holds positions for {side}x{side} pixels only, which are "
            "resized for other sizes; the naflexvit_* of the same weights has all positions",
            stacklevel=2,
        )
    derived = keys.derived()
    for name, clip in (("mean", (0.48145466, 0.4578275, 0.40821073)), ("std", (0.26862954, 0.26130258, 0.27577711))):
        derived[f"conditioner.{name}"] = partial(channels, meta.get(name) or clip)
    licence = meta.get("license")
    return build(
        checkpoint,
        options,
        Renamed(tensors, keys.ours, derived=derived),
        tokens=tokens,
        summary_slots=summary,
        preferred_size=_preferred(meta, options),
        licence=licence if isinstance(licence, str) else None,
        given=student,
        dtype=dtype,
        device=device,
    )


def _check(arguments: Mapping[str, Any], source: str) -> None:
    for key, value in SAME.items():
        if arguments.get(key, value) != value and not (key == "rope_type" and arguments[key] == "none"):
            raise ConfigError(f"{source}: model_args.{key} is {arguments[key]!r}, but a RADIO ViT has {value!r}")


def _integer(value: Any, name: str, source: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source}: {name} is {value!r} in its config.json, expected a positive integer")
    return value


def _preferred(meta: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    size = meta.get("input_size")
    if isinstance(size, list | tuple) and size and isinstance(size[-1], int):
        return size[-1]
    return options["max_grid"] * options["patch"]


def _class_tokens(left: Mapping[str, Any], generation: str, prefix: int) -> tuple[list[str], list[int]]:
    """Names of the class tokens, and indices of the summary."""
    count, slots = left.get("class_tokens"), left.get("summary_slots")
    if isinstance(count, int) and 1 <= count <= prefix and isinstance(slots, list) and set(map(type, slots)) == {int}:
        return [f"cls_{slot}" for slot in range(count)], slots
    names, whole, summary = GENERATIONS.get(generation, ((), 0, ()))
    return (list(names), list(summary)) if prefix == whole else (["cls_0"], [0])


@dataclass(frozen=True)
class _Keys:
    """Names and shapes of a file of timm's."""

    tensors: Mapping[str, Tensor]
    source: str

    @property
    def fixed(self) -> bool:
        """Whether it is a plain ViT, with positions for one size."""
        return "patch_embed.proj.weight" in self.tensors

    @property
    def patches(self) -> str:
        return "patch_embed.proj" if self.fixed else "embeds.proj"

    @property
    def below(self) -> str:
        return "" if self.fixed else "embeds."

    def _shape(self, key: str, ndim: int) -> tuple[int, ...]:
        if key not in self.tensors:
            found = ", ".join(sorted(self.tensors)[:10]) or "nothing"
            raise AssetError(f"{self.source} is of another architecture: {key} is missing; it holds {found}, ...")
        shape = tuple(self.tensors[key].shape)
        if len(shape) != ndim:
            raise AssetError(f"{self.source} is of another architecture: {key} has shape {shape}")
        return shape

    def options(self) -> dict[str, Any]:
        """Student options read off the tensors' shapes."""
        weight = self.tensors.get(f"{self.patches}.weight")
        convolved = weight is not None and weight.ndim == 4
        width, *pixels = self._shape(f"{self.patches}.weight", 4 if convolved else 2)
        patch = math.isqrt(math.prod(pixels) // 3)
        _, *grid, _ = self._shape(f"{self.below}pos_embed", 3 if self.fixed else 4)
        rows = math.isqrt(grid[0]) if self.fixed else grid[0]
        if grid not in ([rows * rows], [rows, rows]):
            raise ConfigError(f"{self.source}: positions for {' x '.join(map(str, grid))} patches, expected a square")
        blocks = [int(key.split(".")[1]) for key in self.tensors if re.match(r"blocks\.\d+\.", key)]
        return {
            "width": width,
            "depth": 1 + max(blocks, default=0),
            "patch": patch,
            "max_grid": rows,
            "mlp_hidden": self._shape("blocks.0.mlp.fc1.weight", 2)[0],
            "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in self.tensors else None,
            "final_norm": "norm.weight" in self.tensors,
            "qkv_bias": "blocks.0.attn.qkv.bias" in self.tensors,
            "patch_bias": self._biased(),
        }

    def _biased(self) -> bool:
        """Whether the projection has a bias: RADIO has none, which timm stores as zeros."""
        key = f"{self.patches}.bias"
        return key in self.tensors and bool((self.tensors[key] != 0).any())

    def prefix(self) -> int:
        """Number of class and register tokens."""
        registers = self.tensors.get(f"{self.below}reg_token")
        self._shape(f"{self.below}cls_token", 3)
        return 1 + (0 if registers is None else registers.shape[1])

    def ours(self, key: str) -> str | None:
        """Our name of a tensor; None if it is unused or computed by :meth:`derived`."""
        if key == f"{self.patches}.bias":
            return "student.patch_generator.embedder.bias" if self._biased() else None
        if key == f"{self.patches}.weight" or key.removeprefix(self.below) in ("pos_embed", "cls_token", "reg_token"):
            return None
        if key.startswith(("head.", "fc_norm.")):
            return None
        return f"student.{key}" if key.startswith(("blocks.", "norm.")) else key

    def derived(self) -> dict[str, Callable[[Mapping[str, Tensor]], Tensor]]:
        """Our tensors that timm stores in another layout."""
        generator = "student.patch_generator."
        names = [f"{self.below}{name}" for name in ("cls_token", "reg_token") if f"{self.below}{name}" in self.tensors]
        return {
            f"{generator}embedder.weight": partial(_projection, f"{self.patches}.weight"),
            f"{generator}pos_embed": partial(_table, f"{self.below}pos_embed"),
            f"{generator}token": partial(_token, names),
        }


def _projection(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Weights in agglo's order (channel, y, x), as in a kernel; a linear projection has (y, x, channel)."""
    weight = tensors[key]
    if weight.ndim == 4:
        return weight.flatten(1)
    patch = math.isqrt(weight.shape[1] // 3)
    return weight.view(-1, patch, patch, 3).permute(0, 3, 1, 2).flatten(1)


def _table(key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    table = tensors[key]
    return table.flatten(1, 2) if table.ndim == 4 else table


def _token(names: list[str], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name] for name in names], dim=1)[0]
