"""timm's NaFlexViT port of RADIO."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from agglo.checkpoints.timm import is_timm
from agglo.exports._vit import (
    Precision,
    card,
    fitting,
    hidden_width,
    left_out,
    notes,
    ratio,
    scaled,
    side,
    write_folder,
)
from agglo.exports.base import Export
from agglo.model.artefact import CARD, CONFIG, config_text
from agglo.model.model import Model
from agglo.students.vit import ViT
from agglo.types import ConfigError

ARCHITECTURES: dict[tuple[int, int, bool, int], str] = {
    (768, 12, True, 8): "naflexvit_base_patch16_radio_v3",
    (1024, 24, True, 8): "naflexvit_large_patch16_radio_v3",
    (1280, 32, False, 8): "naflexvit_huge_patch16_radio_v3",
    (1536, 40, False, 8): "naflexvit_giant_patch16_radio_v3",
    (1152, 27, False, 10): "naflexvit_so400m_patch16_radio_v4",
    (1280, 32, False, 10): "naflexvit_huge_patch16_radio_v4",
}
"""(width, depth, whether it has layer scales, prefix tokens) → timm's name."""

OTHERS = {True: "naflexvit_base_patch16_radio_v3", False: "naflexvit_huge_patch16_radio_v4"}
"""Base architecture of models of other sizes, by whether they have layer scales, which timm cannot switch off."""

_USAGE = """\
import timm, torch

model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # or "hf-hub:owner/{name}"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    tokens = model.forward_features(transform(image)[None])
summary = tokens[:, {slots}].flatten(1)  # (1, {summary})
features = tokens[:, {prefix}:]  # (1, patches, {width})
"""

_REMARKS = (
    "The model takes images that are normalised already (as the transform does), sides a multiple of {patch} pixels. "
    "timm counts all class tokens but the first among the registers, and its pooled output is the first: take the "
    "summary from the tokens, as above. Windowed attention and random positions in training need agglo."
)


class Timm(Export):
    """A folder of timm's hub layout: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    The architecture is that of the released C-RADIO of the same size, or one of them with all sizes overridden in
    ``model_args``, as in timm 1.0.31. Writing the folder does not need timm.

    Not supported: windows, ``position: corner``, gated MLPs, ``mlp_norm``, a feature normalizer, and students of other
    kinds.

    Args:
        dtype: precision of the weights on disk; timm loads them as float32 by default.
    """

    def __init__(self, *, dtype: Precision = "float32") -> None:
        self.dtype: Precision = dtype

    def write(self, model: Model, folder: str | Path) -> Path:
        """See :meth:`Export.write`."""
        student = fitting(model, "timm's NaFlexViT")
        if model.student_config["mlp"] != "gelu":
            raise ConfigError("mlp: swiglu, but timm's NaFlexViT has no such gated MLP: export it to transformers")
        name, prefix = Path(folder).expanduser().resolve().name, student.patch_generator.tokens
        usage = _USAGE.format(
            name=name, slots=list(model.summary_slots), summary=model.spec.summary, prefix=prefix,
            width=model.spec.spatial,
        )  # fmt: skip
        texts = {
            CONFIG: config_text(_config(model, student)),
            CARD: card(
                model,
                name,
                library="timm",
                usage=usage,
                missing=left_out(model, "timm's NaFlexViT"),
                remarks=_REMARKS.format(patch=model.spec.stride),
            ),
        }
        return write_folder(folder, _tensors(student), texts, self.dtype, is_timm)


def _config(model: Model, student: ViT) -> dict[str, Any]:
    width, generator, has_scales = model.spec.spatial or 0, student.patch_generator, scaled(student)
    key = (width, student.depth, has_scales, generator.tokens)
    grid = generator.max_grid
    arguments: dict[str, Any] = {
        "patch_size": generator.patch,
        "embed_dim": width,
        "depth": student.depth,
        "num_heads": model.student_config["heads"],
        "mlp_ratio": ratio(width, hidden_width(student)),
        "qkv_bias": model.student_config["qkv_bias"],
        "class_token": True,
        "reg_tokens": generator.tokens - 1,
        "global_pool": "token",
        "final_norm": model.student_config["final_norm"],
        "pos_embed_grid_size": [grid, grid],
        "pos_embed_interp_mode": "bilinear",
        "pos_embed_ar_preserving": True,
        "pos_embed_antialias": False,
        "pos_embed_align_corners": generator.align_corners,
    }
    if has_scales:
        arguments["init_values"] = model.student_config["layer_scale"]
    pretrained: dict[str, Any] = {
        "num_classes": 0,
        "input_size": [3, side(model), side(model)],
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": model.conditioner.mean.flatten().tolist(),  # type: ignore[union-attr, operator]
        "std": model.conditioner.std.flatten().tolist(),  # type: ignore[union-attr, operator]
        "first_conv": "embeds.proj",
        "classifier": "head",
    }
    if "license" in model.provenance:
        pretrained["license"] = str(model.provenance["license"])
    return {
        "architecture": ARCHITECTURES.get(key, OTHERS[has_scales]),
        "num_classes": 0,
        "num_features": width,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": pretrained,
        **notes(model),
    }


def _tensors(student: ViT) -> Iterator[tuple[str, Tensor]]:
    generator = student.patch_generator
    patch, grid = generator.patch, generator.max_grid
    weight, bias = generator.embedder.weight, generator.embedder.bias
    # timm flattens a patch as (y, x, channel).
    yield "embeds.proj.weight", weight.view(-1, 3, patch, patch).permute(0, 2, 3, 1).flatten(1)
    yield "embeds.proj.bias", weight.new_zeros(len(weight)) if bias is None else bias
    yield "embeds.pos_embed", generator.pos_embed.unflatten(1, (grid, grid))
    yield "embeds.cls_token", generator.token[None, :1].clone()
    if generator.tokens > 1:
        yield "embeds.reg_token", generator.token[None, 1:].clone()
    for name, tensor in student.blocks.state_dict().items():
        yield f"blocks.{name}", tensor
    for name, tensor in student.norm.state_dict().items():
        yield f"norm.{name}", tensor
