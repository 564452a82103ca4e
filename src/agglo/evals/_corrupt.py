"""Image corruptions in five severities after ImageNet-C (arXiv:1903.12261), with NumPy and Pillow.

The severities of noise, blur, brightness, contrast, saturation, pixelation and JPEG are the paper's, which are defined
at 224 pixels: lengths are scaled by the shorter side. Snow, frost, fog, glass and elastic deformation are omitted.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

_SIDE = 224
"""Side in pixels at which lengths are defined."""

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""RGB ``(H, W, 3)`` float64 in [0, 1], severity 0 to 4, and a generator; the same shape, clipped by the caller."""


def gaussian_noise(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise."""
    return x + draw.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[s], x.shape)


def shot_noise(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Sample Poisson noise."""
    photons = (60, 25, 12, 5, 3)[s]
    return draw.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Set random values to 0 or 1 (salt and pepper)."""
    hit = draw.random(x.shape)
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[s]
    return np.where(hit < share / 2, 0.0, np.where(hit < share, 1.0, x))


def defocus_blur(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Convolve with an antialiased disc."""
    radius = (3, 4, 6, 8, 10)[s] * _scale(x)
    reach = max(1, math.ceil(radius))
    yy, xx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _convolve(x, np.clip(radius + 0.5 - np.hypot(yy, xx), 0, 1))


def motion_blur(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Convolve with a line at a random angle of at most 45 degrees."""
    length = (10, 15, 15, 20, 25)[s] * _scale(x)
    angle = math.radians(draw.uniform(-45, 45))
    reach = max(1, math.ceil(length / 2))
    yy, xx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along = xx * math.cos(angle) + yy * math.sin(angle)
    across = yy * math.cos(angle) - xx * math.sin(angle)
    kernel = np.clip(1 - abs(across), 0, 1) * np.clip(length / 2 + 0.5 - abs(along), 0, 1)
    return _convolve(x, kernel)


def zoom_blur(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Average enlarged copies."""
    last, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[s]
    image, (h, w) = _image(x), x.shape[:2]
    zooms = np.arange(1, last, step)
    total = np.zeros_like(x)
    for zoom in zooms:
        dx, dy = w / 2 * (1 - 1 / zoom), h / 2 * (1 - 1 / zoom)
        total += _array(image.resize((w, h), Image.Resampling.BILINEAR, box=(dx, dy, w - dx, h - dy)))
    return total / len(zooms)


def brightness(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Add to the value of HSV."""
    top = x.max(2, keepdims=True)
    lit = np.clip(top + (0.1, 0.2, 0.3, 0.4, 0.5)[s], 0, 1)
    return np.where(top > 0, x * lit / np.maximum(top, 1e-12), lit)


def contrast(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Blend with the mean colour of the image."""
    mean = x.mean((0, 1), keepdims=True)
    return mean + (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s]


def saturate(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Scale and shift the saturation of HSV."""
    factor, shift = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[s]
    top = x.max(2, keepdims=True)
    saturation = (top - x.min(2, keepdims=True)) / np.maximum(top, 1e-12)
    wanted = np.clip(saturation * factor + shift, 0, 1)
    grey = saturation <= 1e-12  # a grey pixel has hue 0: it turns red
    ratio = np.where(grey, 0.0, wanted / np.maximum(saturation, 1e-12))
    red = np.concatenate((top, top * (1 - wanted), top * (1 - wanted)), 2)
    return np.where(grey, red, top - (top - x) * ratio)


def pixelate(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Downsample by a box filter, upsample by nearest neighbours."""
    share, (h, w) = (0.6, 0.5, 0.4, 0.3, 0.25)[s], x.shape[:2]
    small = _image(x).resize((max(1, int(w * share)), max(1, int(h * share))), Image.Resampling.BOX)
    return _array(small.resize((w, h), Image.Resampling.NEAREST))


def jpeg(x: np.ndarray, s: int, draw: np.random.Generator) -> np.ndarray:
    """Compress as JPEG at low quality."""
    file = io.BytesIO()
    _image(x).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[s])
    return _array(Image.open(file).convert("RGB"))


CORRUPTIONS: dict[str, Corruption] = {
    one.__name__: one
    for one in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        motion_blur,
        zoom_blur,
        brightness,
        contrast,
        saturate,
        pixelate,
        jpeg,
    )
}


def corrupt(image: Image.Image, name: str, severity: int, draw: np.random.Generator) -> Image.Image:
    """Corrupt an RGB image.

    Args:
        image: of any size.
        name: of the corruption.
        severity: 1 to 5.
        draw: random generator.
    """
    return _image(CORRUPTIONS[name](_array(image), severity - 1, draw))


def _scale(x: np.ndarray) -> float:
    return min(x.shape[:2]) / _SIDE


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64) / 255


def _image(x: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(x, 0, 1) * 255).round().astype(np.uint8))


def _convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve with a kernel ``(2r + 1, 2r + 1)`` normalised to sum 1; borders are reflected."""
    reach = len(kernel) // 2
    # "symmetric" also pads an image that is smaller than the kernel.
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), "symmetric")
    total, (h, w) = np.zeros_like(x), x.shape[:2]
    for (i, j), weight in np.ndenumerate(kernel / kernel.sum()):
        if weight:
            total += weight * padded[i : i + h, j : j + w]
    return total
