"""An agglo student as the trunk of transformers' SAM 3: image, tracker and video (C-RADIOv4, arXiv:2601.17237).

>>> from transformers import Sam3Model
>>> from agglo.integrations.sam3 import install
>>> model, processor = install(Sam3Model.from_pretrained("facebook/sam3"), "c-radio_v4-so400m", window=8)
>>> model.save_pretrained("sam3-radio")

Importing this module registers the trunk with transformers, so that ``Sam3Model.from_pretrained("sam3-radio")`` works.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Literal

from torch import nn

from agglo.extras import require
from agglo.integrations._trunk import Installed, as_student, encoder_options, own_config, trunk_classes
from agglo.model.model import Model
from agglo.types import AssetError, ConfigError, MissingExtraError

_WHERE = "sam3"
PROCESSORS = {
    "Sam3Model": "Sam3Processor",
    "Sam3TrackerModel": "Sam3TrackerProcessor",
    "Sam3TrackerVideoModel": "Sam3TrackerVideoProcessor",
    "Sam3VideoModel": "Sam3VideoProcessor",
}
"""Supported models of transformers → their processors."""


def install(
    model: Any,
    student: Model | nn.Module | str,
    *,
    window: int | None = None,
    head: str | None = None,
    mode: Literal["native", "compatible"] = "native",
    processor: Any = None,
) -> Installed:
    """Replace the trunk of a SAM 3 by a student; every other weight is kept.

    The model is changed in place and cast to float32, because its position encodings lose precision in half precision;
    the student keeps its own dtype. Gradients reach the student if its parameters require them.

    Args:
        model: ``Sam3Model``, ``Sam3TrackerModel``, ``Sam3TrackerVideoModel`` or ``Sam3VideoModel``.
        student: a model with a ``sam3`` head, or its name or folder; or any module with ``spec`` that maps RGB in
            [0, 1] to :class:`agglo.Features` of the trunk's width.
        window: side of the student's attention windows in patches; it divides the patch grid (8, 9, 12, 18, 24 or 36
            at full size). 0 for global attention, None for the student's own setting.
        head: to read; None for ``sam3``, or the one head as wide as the trunk.
        mode: ``native``: pixels of the student's own size (1152 with patches of 16), the processor resizes once;
            ``compatible``: SAM 3's own pixels and configuration (1008, patches of 14), resized again inside the trunk.
        processor: of the model; None to load it from where the model was loaded. It is not changed.

    Returns:
        The model and a processor of matching size.

    Raises:
        ConfigError: not a SAM 3; a student without a map of the trunk's width; a window that does not divide the grid.
        AssetError: the processor cannot be loaded.
    """
    kind = next((name for name in PROCESSORS if type(model).__name__ == name), None)
    if kind is None:
        raise ConfigError(f"{_WHERE}: model is a {type(model).__name__}; supported are {', '.join(PROCESSORS)}")
    if mode not in ("native", "compatible"):
        raise ConfigError(f"{_WHERE}: mode is {mode!r}; use 'native' or 'compatible'")
    vision = vision_encoder(model)
    stock = vision.config.backbone_config
    width, grid = int(stock.hidden_size), int(stock.image_size) // int(stock.patch_size)
    loaded = as_student(student, _WHERE, head)
    options = encoder_options(loaded, head=head, window=window, accepted={width: grid}, where=_WHERE)
    patch = options["cell"] if mode == "native" else int(stock.patch_size)
    size = grid * patch
    adapted = matching_processor(model, kind, processor, size, grid)
    pixels = adapted.image_processor
    options |= {"size": size, "mean": list(pixels.image_mean), "std": list(pixels.image_std)}
    configuration, trunk = trunk_classes()
    config = configuration(
        hidden_size=width, patch_size=patch, image_size=size, encoder=options,
        student=own_config(loaded, options["head"]),
    )  # fmt: skip
    model.float()
    device = next(model.parameters()).device
    mode_before = loaded.training
    vision.backbone = trunk(config, loaded.to(device)).train(mode_before)
    _configure(model, config, size, patch)
    return Installed(model, adapted)


def vision_encoder(model: Any) -> Any:
    """The ``Sam3VisionModel`` of a SAM 3; that of the detector for a video model."""
    return getattr(model, "detector_model", model).vision_encoder


def _configure(model: Any, config: Any, size: int, patch: int) -> None:
    """Write the trunk and the pixel size into every configuration and module that holds one of them."""
    seen: set[int] = set()
    for each in [model, *model.modules()]:
        held = getattr(each, "config", None)
        for part in _parts(held):
            if id(part) in seen:
                continue
            seen.add(id(part))
            if hasattr(part, "backbone_config"):
                part.backbone_config = copy.deepcopy(config)
            if str(getattr(part, "model_type", "")).endswith("prompt_encoder"):
                part.patch_size, part.image_size = patch, size
            if getattr(part, "model_type", "") == "sam3_tracker_video":
                part.__dict__["image_size"] = size
        if hasattr(each, "input_image_size"):  # of a prompt encoder: the frame of points and boxes
            each.input_image_size = size
        if type(each).__name__ == "Sam3TrackerVideoModel":
            each.image_size = size


def _parts(config: Any) -> list[Any]:
    """A configuration and those inside it, innermost first, without the trunk's."""
    if config is None:
        return []
    names = (
        "detector_config",
        "tracker_config",
        "vision_config",
        "prompt_encoder_config",
    )
    inner = [part for name in names for part in _parts(getattr(config, name, None))]
    return [*inner, config]


# --- the processor ----------------------------------------------------------------------------------------------------


def matching_processor(model: Any, kind: str, processor: Any, size: int, grid: int) -> Any:
    """A processor whose image size, frame of points and mask size are the model's.

    Args:
        model: a SAM 3.
        kind: its class.
        processor: to copy; None to load that of the model's own checkpoint.
        size: side of the pixels.
        grid: cells of a side of the trunk's map.

    Raises:
        ConfigError: the processor is of another model.
        AssetError: it cannot be loaded.
    """
    made = copy.deepcopy(processor) if processor is not None else _own_processor(model, kind)
    if type(made).__name__ != PROCESSORS[kind]:
        raise ConfigError(f"{_WHERE}: processor is a {type(made).__name__}; a {kind} needs a {PROCESSORS[kind]}")
    _check_normalisation(made)
    square = {"height": size, "width": size}
    for part in ("image_processor", "video_processor"):
        if (each := getattr(made, part, None)) is not None:
            each.size = type(each.size)(**square) if not isinstance(each.size, dict) else dict(square)
    made.image_processor.mask_size = {"height": 4 * grid, "width": 4 * grid}
    made.target_size = size  # else points and boxes of the tracker keep the frame of the old size
    return made


def _check_normalisation(processor: Any) -> None:
    """Refuse a video processor with other constants: a fresh ``Sam2VideoVideoProcessor`` has those of ImageNet."""
    stated = {
        part: (tuple(each.image_mean), tuple(each.image_std))
        for part in ("image_processor", "video_processor")
        if (each := getattr(processor, part, None)) is not None
    }
    if len(set(stated.values())) > 1:
        raise ConfigError(
            f"{_WHERE}: video_processor normalises with mean and std {stated['video_processor']} and image_processor "
            f"with {stated['image_processor']}: set image_mean and image_std of one to the other's"
        )


def _own_processor(model: Any, kind: str) -> Any:
    transformers = require("transformers", "teachers")
    name = str(getattr(model, "name_or_path", "") or "")
    if name:
        try:
            return getattr(transformers, PROCESSORS[kind]).from_pretrained(name)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AssetError(
                f"{_WHERE}: no processor in {name!r} ({error}); pass processor=, or put preprocessor_config.json and "
                "the tokenizer beside the weights"
            ) from error
    parts: dict[str, Any] = {"image_processor": transformers.Sam3ImageProcessor()}
    if kind == "Sam3TrackerModel":
        return transformers.Sam3TrackerProcessor(**parts)
    raise ConfigError(f"{_WHERE}: this {kind} was not loaded from a checkpoint: pass processor=, a {PROCESSORS[kind]}")


def pixel_size(model: Any) -> int:
    """Side in pixels of the square input."""
    return int(vision_encoder(model).config.backbone_config.image_size)


with contextlib.suppress(MissingExtraError):
    trunk_classes()
