"""Spatial features of a few images, each at its own aspect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from agglo.embedding.images import as_files
from agglo.embedding.limits import check_memory, legal_size
from agglo.model.model import Model
from agglo.preprocess import aspect_size, fit
from agglo.types import ConfigError, ImageError

MIN_SIDE = 512
"""Minimum longer side of :func:`image_features` in pixels: smaller maps of stride 16 are hardly recognisable."""


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """An image and its spatial features.

    Args:
        name: path of the image.
        image: upright RGB, at its original size.
        spatial: ``(D, H, W)`` float32, on the CPU; the grid has the image's aspect.
    """

    name: str
    image: Image.Image
    spatial: torch.Tensor


def image_features(
    paths: Sequence[str | Path], model: Model, *, size: int | None = None
) -> tuple[list[ImageFeatures], dict[str, str]]:
    """Spatial features of images, each at its own aspect.

    Args:
        paths: images, or folders of them.
        model: a model with spatial features.
        size: longer side in pixels; None for twice the preferred size, at least 512.

    Returns:
        Images with features, and name to reason of the skipped images.

    Raises:
        ConfigError: no spatial features, no such path, an illegal size, or no readable image.
    """
    if model.spec.spatial is None:
        raise ConfigError("this model has no spatial features")
    longest = max(MIN_SIDE, 2 * model.preferred_size) if size is None else legal_size(model, size)[0]
    check_memory(model, (longest, longest), 1)
    found: list[ImageFeatures] = []
    skipped: dict[str, str] = {}
    for source in [as_files(path) for path in paths]:
        for index in range(len(source)):
            try:
                image = source.read(index)
            except ImageError as error:
                skipped[error.name] = error.why
                continue
            view = aspect_size((image.height, image.width), (longest, longest), model.step(), inside=True)
            with torch.inference_mode():
                pixels = fit(image, view, "stretch")
                spatial = model(pixels[None], heads=(), resize=False).spatial
            found.append(ImageFeatures(source.name(index), image, spatial[0].float().cpu()))
    if not found:
        raise ConfigError("none of the images can be read: " + "; ".join(f"{n}: {why}" for n, why in skipped.items()))
    return found, skipped
