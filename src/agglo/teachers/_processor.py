"""Mean, standard deviation and size from a checkpoint's own image processor; nothing is assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agglo.hub import ModelFiles
from agglo.teachers._families import side, transformers
from agglo.types import AssetError

RGB = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Pixels:
    """How pixels in [0, 1] become a network's input: ``(x - mean) / std``.

    Args:
        mean, std: per RGB channel, for pixels in [0, 1].
        side: side in pixels of the square output, or None if it is not square.
        bgr: the network takes blue, green, red (MobileViT).
    """

    mean: RGB
    std: RGB
    side: int | None = None
    bgr: bool = False

    @property
    def processor(self) -> dict[str, Any]:
        """The JSON form (:attr:`agglo.teachers.base.Teacher.processor`)."""
        facts = {"mean": list(self.mean), "std": list(self.std), "size": self.side}
        return {**facts, "bgr": True} if self.bgr else facts


class Conditioner(nn.Module):
    """The normalisation as a module, so that its buffers follow the network to its device."""

    mean: Tensor
    std: Tensor

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.identity = pixels.mean == (0, 0, 0) and pixels.std == (1, 1, 1)
        self.bgr = pixels.bgr
        self.register_buffer("mean", torch.tensor(pixels.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise RGB ``(B, 3, H, W)`` in [0, 1], once."""
        images = images if self.identity else (images - self.mean) / self.std
        return images.flip(1) if self.bgr else images


IDENTITY = Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""For networks that normalise pixels themselves."""


def read_pixels(source: ModelFiles) -> Pixels:
    """Normalisation and size from the image part of processor_config.json, else from preprocessor_config.json.

    Missing keys have the default of the processor's class.

    Raises:
        AssetError: no such file, or no valid normalisation in it.
    """
    file = "processor_config.json"
    content = source.json(file).get("image_processor") or {}
    if not content:
        file = "preprocessor_config.json"
        content = source.json(file)
    if not content:
        raise source.missing("preprocessor_config.json", note=" (mean, std and size are never guessed)")
    return pixels_of(content, f"{source.where}: {file} of {source.label}")


def pixels_of(content: Mapping[str, Any], where: str) -> Pixels:
    """Normalisation and size from the content of a processor's file; raises :class:`AssetError` if invalid."""
    kind = str(content.get("image_processor_type") or content.get("feature_extractor_type"))
    defaults = getattr(transformers(), kind.replace("FeatureExtractor", "ImageProcessor"), None)

    def value(key: str) -> Any:
        return content[key] if key in content else getattr(defaults, key, None)

    def does(key: str) -> bool:  # files of an unknown class leave out what every class of their time did
        return bool(value(key)) if defaults is not None else value(key) in (None, True)

    # The processor scales bytes; images here are in [0, 1]. The remaining factor is 1 for nearly every checkpoint.
    rescales = does("do_rescale")
    scale = 255 * float(value("rescale_factor") or 1 / 255) if rescales else 255.0
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if does("do_normalize"):
        mean, std = _rgb(value("image_mean"), where, "image_mean"), _rgb(value("image_std"), where, "image_std")
    if 0 in std:
        raise AssetError(f"{where}: image_std is {value('image_std')!r}, which divides by 0; download it again")
    if rescales and value("rescale_offset"):  # EfficientNet: bytes become [-1, 1] before mean and std
        mean = (mean[0] + 1, mean[1] + 1, mean[2] + 1)
    if value("include_top"):  # EfficientNet: divided by std once more
        second = _rgb(value("image_std"), where, "image_std")
        std = (std[0] * second[0], std[1] * second[1], std[2] * second[2])
    mean, std = _times(mean, 1 / scale), _times(std, 1 / scale)
    bgr = bool(value("do_flip_channel_order"))
    if bgr:  # the file's numbers are in the network's order, ours in RGB
        mean, std = (mean[2], mean[1], mean[0]), (std[2], std[1], std[0])
    crop = value("crop_size") if value("do_center_crop") else None
    return Pixels(mean, std, _side(crop or value("size")), bgr)


def _side(size: Any) -> int | None:
    what = "size in the processor's file"
    if not isinstance(size, Mapping):
        return None if size is None else side(size, what)
    for keys in (("height", "width"), ("shortest_edge",), ("longest_edge",)):
        if all(size.get(key) is not None for key in keys):
            return side([size[key] for key in keys], what)
    return None


def _rgb(value: Any, where: str, key: str) -> RGB:
    if isinstance(value, int | float):
        value = [value] * 3
    if not isinstance(value, Sequence) or len(value) != 3:
        raise AssetError(f"{where}: {key} is {value!r}, not three numbers; download it again")
    try:
        return float(value[0]), float(value[1]), float(value[2])
    except (TypeError, ValueError):
        raise AssetError(f"{where}: {key} is {value!r}, not three numbers; download it again") from None


def _times(values: RGB, factor: float) -> RGB:
    return values if factor == 1 else (values[0] * factor, values[1] * factor, values[2] * factor)
