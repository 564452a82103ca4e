"""Random views of an image: resized crop and RandAugment (Cubuk et al. 2020, arXiv:1909.13719), with Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (128, 128, 128)
"""Fill of the area that a rotation or a shift uncovers."""

Op = Callable[[Image.Image, float, float], Image.Image]
"""Image, level in [0, 1], sign (-1 or 1)."""


def _moved(a: float, b: float, c: float, d: float, e: float, f: float) -> Callable[[Image.Image], Image.Image]:
    def move(image: Image.Image) -> Image.Image:
        where = (a, b, c * image.width, d, e, f * image.height)
        return image.transform(image.size, Image.Transform.AFFINE, where, Image.Resampling.BILINEAR, fillcolor=GREY)

    return move


def _enhanced(
    kind: type[ImageEnhance.Color | ImageEnhance.Contrast | ImageEnhance.Brightness | ImageEnhance.Sharpness],
) -> Op:
    return lambda image, level, sign: kind(image).enhance(1 + sign * 0.9 * level)


OPS: dict[str, Op] = {
    "identity": lambda image, level, sign: image,
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "rotate": lambda image, level, sign: image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=GREY),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, round(256 * (1 - level))),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 8 - round(4 * level)),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign: _moved(1, sign * 0.3 * level, 0, 0, 1, 0)(image),
    "shear_y": lambda image, level, sign: _moved(1, 0, 0, sign * 0.3 * level, 1, 0)(image),
    "translate_x": lambda image, level, sign: _moved(1, 0, sign * 0.45 * level, 0, 1, 0)(image),
    "translate_y": lambda image, level, sign: _moved(1, 0, 0, 0, 1, sign * 0.45 * level)(image),
}
"""The fourteen operations of the paper, with its ranges at level 1."""


def rand_augment(image: Image.Image, draw: np.random.Generator, count: int = 3, magnitude: float = 9) -> Image.Image:
    """Apply ``count`` random operations in turn, at ``magnitude`` of 30."""
    for name in draw.choice(list(OPS), count):
        image = OPS[str(name)](image, magnitude / 30, float(draw.choice([-1.0, 1.0])))
    return image


def random_crop(
    image: Image.Image, size: tuple[int, int], draw: np.random.Generator, scale: tuple[float, float] = (0.5, 1.0)
) -> Image.Image:
    """A crop of a random share of the area and an aspect of 3:4 to 4:3 (log-uniform), stretched to ``size`` ``(H, W)``.

    If no crop fits in ten draws, it is the largest centred one of a legal aspect.
    """
    box: tuple[float, float, float, float] | None = None
    for _ in range(10):
        area = image.width * image.height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= image.width and 0 < h <= image.height:
            x, y = int(draw.integers(image.width - w + 1)), int(draw.integers(image.height - h + 1))
            box = (x, y, x + w, y + h)
            break
    if box is None:
        w = min(image.width, max(1, round(image.height * 4 / 3)))
        h = min(image.height, max(1, round(image.width * 4 / 3)))
        x, y = (image.width - w) // 2, (image.height - h) // 2
        box = (x, y, x + w, y + h)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
