"""Legal sizes of a teacher's input."""

from __future__ import annotations

from torch import Tensor

from agglo.types import ConfigError


def check_images(images: Tensor, step: int) -> None:
    """Refuse a batch that is not ``(B, 3, H, W)`` with sides that are multiples of ``step``.

    Raises:
        ConfigError: names the nearest legal size.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"expected RGB images (B, 3, H, W), got a tensor of shape {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % step or width % step or not height or not width:
        legal = snap((height, width), step)
        raise ConfigError(
            f"images are {height}x{width}, but this teacher takes sides that are multiples of {step}: "
            f"the nearest legal size is {legal[0]}x{legal[1]}"
        )


def check_canvas(images: Tensor, canvas: int) -> None:
    """Refuse a batch that is not ``(B, 3, canvas, canvas)``: for models that run at one size only.

    Raises:
        ConfigError: names the legal size.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"expected RGB images (B, 3, H, W), got a tensor of shape {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if (height, width) != (canvas, canvas):
        raise ConfigError(f"images are {height}x{width}, but this teacher runs at {canvas}x{canvas} only")


def snap(size: tuple[float, float], step: int) -> tuple[int, int]:
    """``(H, W)`` rounded to the nearest positive multiples of ``step``."""
    return max(step, round(size[0] / step) * step), max(step, round(size[1] / step) * step)


def scaled_size(size: tuple[int, int], side: int, step: int) -> tuple[int, int]:
    """``(H, W)`` scaled so that the shorter side is ``side``, snapped to ``step``."""
    scale = side / min(size)
    return snap((size[0] * scale, size[1] * scale), step)
