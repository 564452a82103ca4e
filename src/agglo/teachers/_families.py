"""Which family a configuration of transformers belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agglo.teachers._agglomerated import Radio
from agglo.teachers._aligned import CLIP, SigLIP, SigLIP2NaFlex
from agglo.teachers._dino import DINO, DINOv3ConvNext
from agglo.teachers._family import Family, make_config
from agglo.teachers._generic import Generic
from agglo.teachers._segment import SAM, SAM3
from agglo.types import ConfigError

FAMILIES: dict[str, type[Family]] = {
    "siglip": SigLIP,  # SigLIP2 checkpoints of a fixed resolution call themselves so, too
    "siglip_vision_model": SigLIP,
    "siglip2": SigLIP2NaFlex,
    "siglip2_vision_model": SigLIP2NaFlex,
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "dinov3_vit": DINO,
    "dinov3_convnext": DINOv3ConvNext,
    "sam": SAM,
    "sam_vision_model": SAM,
    "sam3": SAM3,
    "sam3_vision_model": SAM3,
    "sam3_vit_model": SAM3,
    "sam3_video": SAM3,
    "radio": Radio,
}
"""``model_type`` of a config.json → the family; every other type goes by the rule of :class:`Generic`."""


def family_of(content: Mapping[str, Any], where: str) -> Family:
    """The family of a model, from the content of its config.json.

    Raises:
        ConfigError: transformers does not know the type, or it is no vision encoder.
    """
    config = make_config(content, where)
    try:
        return FAMILIES.get(config.model_type, Generic)(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
