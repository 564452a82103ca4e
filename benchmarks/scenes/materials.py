"""Materials and procedural textures, as Mitsuba dictionaries."""

from __future__ import annotations

from typing import Any

import mitsuba as mi
import numpy as np
from scipy.ndimage import gaussian_filter, zoom

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.70, 0.09, 0.08),
    "orange": (0.90, 0.38, 0.08),
    "yellow": (0.93, 0.72, 0.16),
    "green": (0.20, 0.48, 0.22),
    "teal": (0.07, 0.46, 0.47),
    "blue": (0.11, 0.27, 0.62),
    "purple": (0.38, 0.20, 0.52),
    "pink": (0.90, 0.49, 0.56),
    "white": (0.90, 0.89, 0.86),
    "black": (0.09, 0.09, 0.10),
    "gray": (0.45, 0.46, 0.48),
    "brown": (0.40, 0.24, 0.14),
}
"""Display (sRGB) values of the object colours, by their word in captions."""

METALS = {"gold": "Au", "copper": "Cu", "aluminium": "Al", "chrome": "Cr"}
PHRASES = {
    "painted": "{colour} painted",
    "plastic": "{colour} plastic",
    "ceramic": "{colour} ceramic",
    "rubber": "{colour} rubber",
    "wood": "wooden",
    "marble": "marble",
    "gold": "gold",
    "copper": "copper",
    "aluminium": "aluminium",
    "chrome": "chrome",
}
"""Phrase of each material in captions."""

ALLOWED: dict[str, tuple[str, ...]] = {
    "ball": ("plastic", "rubber", "painted", "plastic"),
    "bottle": ("plastic", "ceramic", "painted", "aluminium"),
    "bowl": ("ceramic", "wood", "marble", "copper", "ceramic"),
    "bucket": ("plastic", "painted", "aluminium", "wood", "plastic"),
    "chair": ("wood", "painted", "plastic", "wood"),
    "dumbbell": ("rubber", "chrome", "painted", "plastic"),
    "hourglass": ("wood", "gold", "painted", "copper"),
    "ladder": ("wood", "aluminium", "painted"),
    "lamp": ("ceramic", "gold", "wood", "marble", "painted"),
    "mug": ("ceramic", "plastic", "painted", "ceramic"),
    "mushroom": ("painted", "plastic"),
    "table": ("wood", "marble", "painted", "wood"),
    "teapot": ("ceramic", "copper", "gold", "chrome", "ceramic"),
    "traffic cone": ("plastic", "rubber"),
    "umbrella": ("painted", "plastic"),
    "vase": ("ceramic", "marble", "gold", "copper", "ceramic"),
}
"""Possible materials of each class; repeated entries are more likely."""


def linear(rgb: Any) -> np.ndarray:
    """Linear-light reflectance of a display (sRGB) colour or image in [0, 1]."""
    c = np.asarray(rgb, float)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def noise(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int], octaves: int = 4) -> np.ndarray:
    """Tileable fractal noise in [0, 1] with ``cells`` lattice cells per side at the coarsest octave."""
    total = np.zeros(shape)
    for k in range(octaves):
        grid = rng.random((cells[0] * 2**k, cells[1] * 2**k))
        factors = [s / g for s, g in zip(shape, grid.shape, strict=True)]
        layer = zoom(grid, factors, order=3, mode="grid-wrap", grid_mode=True)
        total += layer[: shape[0], : shape[1]] / 2**k
    return (total - total.min()) / np.ptp(total)


def wood_texture(rng: np.random.Generator, tone: tuple[float, float, float], size: int = 256) -> np.ndarray:
    """Wood grain running along the image's y axis: ``(size, size, 3)`` sRGB in [0, 1]."""
    warp = noise(rng, (size, size), (2, 3), 2)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (np.linspace(0, 7, size, endpoint=False)[None] + 1.0 * warp))
    grain = noise(rng, (size, size), (2, 48), 2)
    shade = 1.08 - 0.26 * rings**2 - 0.22 * grain
    return np.clip(np.asarray(tone) * shade[..., None], 0, 1)


def marble_texture(rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """White stone with grey veins: ``(size, size, 3)`` sRGB in [0, 1]."""
    vein = 1 - np.abs(2 * noise(rng, (size, size), (3, 3), 5) - 1)
    fine = 1 - np.abs(2 * noise(rng, (size, size), (5, 5), 4) - 1)
    dark = 0.62 * vein**14 + 0.3 * fine**18
    base = np.array([0.93, 0.91, 0.88]) if rng.random() < 0.6 else np.array([0.86, 0.78, 0.72])
    return np.clip(base - dark[..., None] * np.array([0.55, 0.52, 0.48]), 0, 1)


def planks(rng: np.random.Generator, tone: tuple[float, float, float], size: int = 512, rows: int = 6) -> np.ndarray:
    """Floor boards running along the image's x axis."""
    image = np.zeros((size, size, 3))
    width = size // rows
    for r in range(rows):
        cut = int(rng.integers(size))
        board = np.swapaxes(wood_texture(rng, tone, size), 0, 1)[:width] * rng.uniform(0.82, 1.08)
        other = np.swapaxes(wood_texture(rng, tone, size), 0, 1)[:width] * rng.uniform(0.82, 1.08)
        board = np.roll(np.concatenate([board[:, : size // 2], other[:, size // 2 :]], 1), cut, 1)
        for seam in (cut % size, (cut + size // 2) % size):
            board[:, seam : seam + 2] *= 0.5
        board[:2] *= 0.5
        image[r * width : (r + 1) * width] = board
    image[rows * width :] = image[: size - rows * width]
    return np.clip(image, 0, 1)


def tiles(rng: np.random.Generator, first: Any, second: Any, size: int = 384, count: int = 4) -> np.ndarray:
    """A chessboard of tiles with light grout; equal colours give plain tiles."""
    i, j = np.indices((size, size))
    cell = size // count
    odd = ((i // cell + j // cell) % 2)[..., None]
    tint = rng.uniform(0.93, 1.04, (count, count)).repeat(cell, 0).repeat(cell, 1)[..., None]
    image = np.where(odd, np.asarray(first), np.asarray(second)) * tint
    grout = ((i % cell < 3) | (j % cell < 3))[..., None]
    return np.clip(np.where(grout, 0.72, image), 0, 1)


def bricks(rng: np.random.Generator, tone: Any, size: int = 384, rows: int = 8) -> np.ndarray:
    """A running-bond brick wall."""
    i, j = np.indices((size, size))
    tall, wide = size // rows, size // 4
    row = i // tall
    shifted = (j + (row % 2) * (wide // 2)) % size
    tint = rng.uniform(0.78, 1.12, (rows, 4))[row, shifted // wide]
    image = np.asarray(tone) * (tint * (0.86 + 0.24 * noise(rng, (size, size), (24, 24), 2)))[..., None]
    mortar = ((i % tall < 5) | (shifted % wide < 5)).astype(float)
    mortar = gaussian_filter(mortar, 0.8)[..., None]
    return np.clip(image * (1 - mortar) + np.array([0.74, 0.71, 0.66]) * mortar, 0, 1)


def checks(rng: np.random.Generator, first: Any, second: Any, size: int = 256, count: int = 8) -> np.ndarray:
    """A woven chequered cloth."""
    i, j = np.indices((size, size))
    odd = ((i * count // size + j * count // size) % 2)[..., None]
    weave = (0.9 + 0.1 * rng.random((size, size)))[..., None]
    return np.clip(np.where(odd, np.asarray(first), np.asarray(second)) * weave, 0, 1)


def plaster(rng: np.random.Generator, tone: Any, size: int = 256, depth: float = 0.07) -> np.ndarray:
    """A mottled painted wall or concrete."""
    mottle = 1 - depth + 2 * depth * noise(rng, (size, size), (4, 4), 5)
    return np.clip(np.asarray(tone) * mottle[..., None], 0, 1)


def image_texture(image: np.ndarray, tile: float) -> dict[str, Any]:
    """A repeating bitmap whose full width covers ``tile`` metres of box-projected texture coordinates."""
    scale = mi.ScalarTransform3f().scale([1 / tile, 1 / tile])
    bitmap = mi.Bitmap(linear(image).astype(np.float32))
    return {"type": "bitmap", "bitmap": bitmap, "raw": True, "wrap_mode": "repeat", "to_uv": scale}


def rgb(colour: Any) -> dict[str, Any]:
    """A constant reflectance from a display colour."""
    return {"type": "rgb", "value": [float(v) for v in linear(colour)]}


def surface(material: str, colour: Any, rng: np.random.Generator) -> dict[str, Any]:
    """The two-sided BSDF of an object material.

    Args:
        material: a key of `PHRASES`.
        colour: sRGB triple; metals, wood and marble use it in part or ignore it.
        rng: draws texture details and roughness.
    """
    if material in METALS:
        alpha = {"chrome": 0.14, "gold": 0.2, "copper": 0.22, "aluminium": 0.28}[material] + rng.uniform(0, 0.06)
        bsdf = {"type": "roughconductor", "material": METALS[material], "alpha": float(alpha), "distribution": "ggx"}
        return {"type": "twosided", "bsdf": bsdf}
    if material == "wood":
        tones = ((0.72, 0.50, 0.30), (0.55, 0.34, 0.19), (0.82, 0.63, 0.42), (0.42, 0.25, 0.15))
        diffuse = image_texture(wood_texture(rng, tones[rng.integers(len(tones))]), 0.3)
        alpha, gloss = 0.28, 0.5
    elif material == "marble":
        diffuse, alpha, gloss = image_texture(marble_texture(rng), 0.42), 0.09, 1.0
    else:
        diffuse = rgb(colour)
        alpha, gloss = {"painted": (0.4, 0.35), "plastic": (0.14, 1.0), "ceramic": (0.06, 1.0), "rubber": (0.45, 0.5)}[
            material
        ]
    bsdf = {
        "type": "roughplastic",
        "distribution": "ggx",
        "alpha": alpha,
        "diffuse_reflectance": diffuse,
        "specular_reflectance": {"type": "rgb", "value": gloss},
        "nonlinear": material in ("plastic", "ceramic"),
    }
    return {"type": "twosided", "bsdf": bsdf}


def matte(texture: np.ndarray, tile: float, gloss: float = 0.0) -> dict[str, Any]:
    """A diffuse (or, with ``gloss`` as roughness, lightly polished) textured two-sided surface for floors and walls."""
    picture = image_texture(texture, tile)
    inner = {"type": "diffuse", "reflectance": picture}
    if gloss:
        inner = {"type": "roughplastic", "diffuse_reflectance": picture, "alpha": gloss}
    return {"type": "twosided", "bsdf": inner}
