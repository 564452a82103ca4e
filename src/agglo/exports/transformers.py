"""transformers' native ``RadioModel``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agglo.checkpoints.transformers import gated_width, is_native
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
from agglo.nn.blocks import NORM_EPS
from agglo.students.vit import ViT
from agglo.types import ConfigError

_USAGE = """\
import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}").eval()
with torch.inference_mode():
    out = model(**processor(images=image, return_tensors="pt").to(model.dtype))
out.summary   # (1, {summary})
out.features  # (1, patches, {width})
"""

_REMARKS = (
    "The model takes RGB in [0, 1], sides a multiple of {patch} pixels, and normalises inside; the processor resizes "
    "and crops to {side} x {side}, any other legal size works too. Windowed attention and random positions in "
    "training need agglo."
)


class Transformers(Export):
    """A folder that plain transformers loads as a native ``RadioModel``: ``AutoModel.from_pretrained(folder)``.

    Its files are those of ``save_pretrained`` (5.23) and an image processor; loading does not need
    ``trust_remote_code``, writing does not need transformers. A bias of the patch projection is folded into the
    position table, which is equivalent at inference.

    Not supported: windows, ``position: corner``, ``align_corners: true``, ``mlp_norm``, ``final_norm``, a feature
    normalizer, gated MLPs whose width is not a multiple of 8, and students of other kinds.

    Args:
        dtype: precision of the weights on disk and with ``dtype="auto"``.
    """

    def __init__(self, *, dtype: Precision = "float32") -> None:
        self.dtype: Precision = dtype

    def write(self, model: Model, folder: str | Path) -> Path:
        """See :meth:`Export.write`."""
        student = fitting(model, "RadioModel")
        _check(student, model)
        config, name = self._config(model, student), Path(folder).expanduser().resolve().name
        patch = model.spec.stride
        usage = _USAGE.format(name=name, summary=model.spec.summary, width=model.spec.spatial)
        texts = {
            CONFIG: config_text(config),
            "preprocessor_config.json": config_text(_processor(side(model))),
            CARD: card(
                model,
                name,
                library="transformers",
                usage=usage,
                missing=left_out(model, "RadioModel"),
                remarks=_REMARKS.format(patch=patch, side=side(model)),
            ),
        }
        return write_folder(folder, _tensors(model, student), texts, self.dtype, is_native)

    def _config(self, model: Model, student: ViT) -> dict[str, Any]:
        options, width = model.student_config, model.spec.spatial or 0
        gated, hidden = options["mlp"] == "swiglu", hidden_width(student)
        return {
            "architectures": ["RadioModel"],
            "model_type": "radio",
            "dtype": self.dtype,
            "hidden_size": width,
            "num_hidden_layers": student.depth,
            "num_attention_heads": options["heads"],
            # The gated MLP of RadioModel uses two thirds of the width that this ratio gives.
            "mlp_ratio": ratio(width, hidden * 3 // 2 if gated else hidden),
            "use_swiglu_ffn": gated,
            "hidden_act": "gelu",
            "layer_norm_eps": NORM_EPS,
            "qkv_bias": options["qkv_bias"],
            "layerscale_value": options["layer_scale"] if scaled(student) else 1.0,
            "num_channels": 3,
            "patch_size": model.spec.stride,
            "image_size": side(model),
            "max_img_size": student.patch_generator.max_grid * model.spec.stride,
            "num_cls_tokens": student.spec.slots,
            "num_registers": student.registers,
            "summary_idxs": list(model.summary_slots),
            "norm_mean": model.conditioner.mean.flatten().tolist(),  # type: ignore[union-attr, operator]
            "norm_std": model.conditioner.std.flatten().tolist(),  # type: ignore[union-attr, operator]
            **notes(model),
        }


def _check(student: ViT, model: Model) -> None:
    if model.student_config["final_norm"]:
        raise ConfigError("final_norm: true, but RadioModel has no norm after its last block")
    if student.patch_generator.align_corners:
        raise ConfigError(
            "align_corners: true, but RadioModel resizes its position table without: load the model with "
            "align_corners=False, as torch.hub does since July 2025, or export it to timm"
        )
    hidden = hidden_width(student)
    if model.student_config["mlp"] == "swiglu" and gated_width(hidden * 3 // 2) != hidden:
        legal = (max(8, hidden // 8 * 8), -(-hidden // 8) * 8)
        raise ConfigError(
            f"mlp_hidden: {hidden} is not a multiple of 8, as RadioModel's gated MLPs need; nearest "
            f"mlp_hidden: {legal[0]} or {legal[1]}"
        )


def _processor(side: int) -> dict[str, Any]:
    """A processor that resizes, crops and divides by 255; the model normalises."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
    }


def _tensors(model: Model, student: ViT) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names of ``save_pretrained``."""
    below, generator = "radio_model.model.", student.patch_generator
    yield "radio_model.summary_idxs", torch.tensor(model.summary_slots, dtype=torch.long)
    for name, buffer in model.conditioner.named_buffers():
        yield f"radio_model.input_conditioner.norm_{name}", buffer.float()
    table, bias = generator.pos_embed, generator.embedder.bias
    yield f"{below}patch_generator.embedder.weight", generator.embedder.weight
    # Resizing weights sum to one, so a constant of all patches can be part of the table.
    yield f"{below}patch_generator.pos_embed", table if bias is None else table.float() + bias.float()
    yield f"{below}patch_generator.cls_token.token", generator.token
    for name, tensor in student.blocks.state_dict().items():
        if ".mlp.w12." in name:
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                yield f"{below}blocks.{name.replace('w12', part)}", half.clone()
            continue
        for ours, foreign in ((".ls1.gamma", ".layer_scale1.lambda1"), (".ls2.gamma", ".layer_scale2.lambda1"),
                              (".mlp.w3.", ".mlp.down_proj.")):  # fmt: skip
            name = name.replace(ours, foreign)
        yield f"{below}blocks.{name}", tensor
