"""An agglo student as the encoder of transformers' SAM, before or after its neck (AM-RADIO, arXiv:2312.06709, 5.2).

>>> from transformers import SamModel
>>> from agglo.integrations.sam import install
>>> model, processor = install(SamModel.from_pretrained("facebook/sam-vit-huge"), "runs/mine", head="sam")
>>> model.save_pretrained("sam-mine")

Importing this module registers the model with transformers: ``AutoModel.from_pretrained("sam-mine")``.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from agglo.decoders.sam import embeddings, grid_side, widths
from agglo.extras import require
from agglo.integrations._trunk import Installed, StudentEncoder, as_student, encoder_options, own_config, rebuilt
from agglo.model.model import Model
from agglo.types import ConfigError, MissingExtraError

_WHERE = "sam"
MODEL_TYPE = "agglo_sam"


def install(
    model: Any,
    student: Model | nn.Module | str,
    *,
    head: str | None = None,
    window: int | None = None,
    processor: Any = None,
) -> Installed:
    """A SAM whose encoder is a student; prompt encoder, mask decoder and neck are the model's own.

    A map as wide as SAM's blocks (1280 for ViT-H) passes through SAM's neck, one as wide as its decoder (256) is used
    directly. Pixels stay SAM's: the longer side scaled to 1024, padded at the right and the bottom; they are resized
    inside if the student's patches are not of 16 pixels.

    Args:
        model: ``SamModel``; its parts are shared with the returned model, and cast to float32.
        student: a model with a head that was distilled from SAM, or its name or folder; or any module with ``spec``
            that maps RGB in [0, 1] to :class:`agglo.Features`.
        head: to read; None for the one head of a fitting width.
        window: side of the student's attention windows in patches; 0 for global attention, None for its own setting.
        processor: of the model; None to load it from where the model was loaded.

    Returns:
        The model, which ``save_pretrained`` writes whole, and the processor.

    Raises:
        ConfigError: not a SAM; a student without a map of a fitting width; a window that does not divide the grid.
    """
    transformers = require("transformers", "teachers")
    if not isinstance(model, transformers.SamModel) or isinstance(model, sam_classes()[1]):
        raise ConfigError(f"{_WHERE}: model is a {type(model).__name__}; pass a SamModel of transformers")
    before, after = widths(model.config)
    grid = grid_side(model.config)
    loaded = as_student(student, _WHERE, head)
    accepted = {before: grid, after: grid}
    options = encoder_options(loaded, head=head, window=window, accepted=accepted, where=_WHERE)
    made = _processor(model, processor)
    pixels = made.image_processor
    options |= {
        "size": int(model.config.vision_config.image_size),
        "mean": list(pixels.image_mean),
        "std": list(pixels.image_std),
    }
    configuration, built = sam_classes()
    trunk = {"student": own_config(loaded, options["head"]), "encoder": options}
    config = configuration(**{**model.config.to_dict(), "model_type": MODEL_TYPE, "trunk": trunk})
    model.float()
    with torch.device("meta"):
        new = built(config, StudentEncoder(nn.Identity(), options))
    for name, child in model.named_children():
        if name != "vision_encoder":
            new.add_module(name, child)
    neck = None if options["width"] == after else model.vision_encoder.neck
    device = next(model.parameters()).device
    new.vision_encoder = SamEncoder(StudentEncoder(loaded.to(device), options), neck, after)
    mode = loaded.training
    new.train(model.training)
    loaded.train(mode)
    return Installed(new, made)


def _processor(model: Any, processor: Any) -> Any:
    if processor is not None:
        return processor
    transformers = require("transformers", "teachers")
    name = str(getattr(model, "name_or_path", "") or "")
    with contextlib.suppress(OSError, ValueError):  # a folder without preprocessor_config.json
        if name:
            return transformers.SamProcessor.from_pretrained(name)
    side = int(model.config.vision_config.image_size)
    square = {"height": side, "width": side}
    return transformers.SamProcessor(transformers.SamImageProcessor(size={"longest_edge": side}, pad_size=square))


class SamEncoder(nn.Module):
    """Pixels to the map that SAM's decoder reads.

    Args:
        encoder: of a student.
        neck: SAM's, for a map as wide as its blocks; None for a map as wide as its decoder.
        after: channels of the decoder.
    """

    def __init__(self, encoder: StudentEncoder, neck: nn.Module | None, after: int) -> None:
        super().__init__()
        self.encoder, self.neck, self.after = encoder, neck, after

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """Encode pixels ``(B, 3, S, S)``; ``last_hidden_state`` is ``(B, 256, 64, 64)`` at full size."""
        del options  # output_attentions and others of transformers
        output = require("transformers.modeling_outputs", "teachers").BaseModelOutput
        return output(last_hidden_state=embeddings(self.encoder(pixel_values), self.neck, self.after))


@functools.cache
def sam_classes() -> tuple[Any, Any]:
    """``AggloSamConfig`` and ``AggloSamModel``, registered with transformers' AutoConfig and AutoModel.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", "teachers")

    class AggloSamConfig(transformers.SamConfig):
        """Configuration of a SAM on an agglo student."""

        model_type = MODEL_TYPE
        trunk: dict | None = None

    class AggloSamModel(transformers.SamModel):
        """transformers' ``SamModel`` with an agglo student as its encoder."""

        config_class = AggloSamConfig

        def __init__(self, config: Any, encoder: StudentEncoder | None = None) -> None:
            super().__init__(config)
            if encoder is None:
                encoder = StudentEncoder(rebuilt(config.trunk["student"]), config.trunk["encoder"])
            after = widths(config)[1]
            neck = None if encoder.options["width"] == after else self.vision_encoder.neck
            self.vision_encoder = SamEncoder(encoder, neck, after)

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, StudentEncoder):
                module.restore_constants()
            elif not hasattr(self.vision_encoder, "encoder") or module not in set(self.vision_encoder.modules()):
                super()._init_weights(module)

        def get_input_embeddings(self) -> nn.Module:
            return self.vision_encoder

    transformers.AutoConfig.register(MODEL_TYPE, AggloSamConfig, exist_ok=True)
    transformers.AutoModel.register(AggloSamConfig, AggloSamModel, exist_ok=True)
    return AggloSamConfig, AggloSamModel


with contextlib.suppress(MissingExtraError):
    sam_classes()
