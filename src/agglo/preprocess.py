"""Preprocessing: from image files, arrays and tensors to model inputs of a legal size.

:func:`read_image` reads any kind of image; :func:`to_tensor` and :func:`load_image` convert to tensors; :func:`fit`
crops, stretches or pads an image to the model's input; :func:`nearest_size`, :func:`aspect_size` and :func:`check_size`
compute legal sizes; :class:`Conditioner` normalises inside the model. Views in training are made by ``agglo.data``.

``model(image)`` and ``model.encode_image(image)`` keep the image's native size and aspect ratio (:func:`snap`);
``agglo.embed``, ``agglo search``, the evals and the reports use :func:`fit`, by default the centre crop at the model's
preferred size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from agglo.decoding import ImageFile, as_rgb, decode
from agglo.files import printable
from agglo.types import ImageError

_ROUNDING = 1e-3
"""Tolerance of float images beyond [0, 1], because resampling overshoots slightly."""


# ---------------------------------------------------------------------------------------------------- tensors


def to_tensor(image: Image.Image | np.ndarray | Tensor, name: str = "image") -> Tensor:
    """Convert one image to a tensor.

    Args:
        image: a PIL image of any mode, whose EXIF orientation is applied; an array ``(H, W)``, ``(H, W, 1)``,
            ``(H, W, 3)`` or ``(H, W, 4)`` (alpha is composited over white); or a tensor ``(H, W)``, ``(1, H, W)``,
            ``(3, H, W)`` or ``(4, H, W)``. Values: uint8, uint16, bool, or floats in [0, 1].
        name: of the image in errors.

    Returns:
        RGB float32 ``(3, H, W)`` in [0, 1]; a tensor stays on its device.

    Raises:
        ImageError: wrong layout, dtype or range, NaN, or no pixels.
        TypeError: not an image.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(as_rgb(image, name))
    if isinstance(image, np.ndarray):
        planes = _planes(np.asarray(image), name)  # of np.matrix every slice is 2-D
        try:
            channels_first = torch.from_numpy(planes.astype(planes.dtype.newbyteorder("="), copy=True))
        except TypeError:
            raise ImageError(name, f"array of dtype {image.dtype}: pass uint8, uint16, bool or floats") from None
    elif isinstance(image, Tensor):
        _check_planes(tuple(image.shape), name)
        channels_first = image if image.ndim == 3 else image[None]
    else:
        raise TypeError(f"{name}: expected a PIL image, an array or a tensor, got {type(image).__name__}")
    if channels_first.numel() == 0:
        raise ImageError(name, f"has no pixels (shape {tuple(image.shape)})")
    values = _unit_range(channels_first, name)
    if values.shape[0] == 4:
        values = values[:3] * values[3:] + (1 - values[3:])
    return values.expand(3, -1, -1).contiguous()


def to_batch(images: Tensor, name: str = "images") -> Tensor:
    """Convert a batch of images to RGB float32 ``(B, 3, H, W)`` in [0, 1].

    Args:
        images: ``(B, 3, H, W)`` or ``(B, 1, H, W)`` of uint8, uint16, bool, or floats in [0, 1].
        name: of the batch in errors.

    Raises:
        ImageError: wrong layout, dtype or range, NaN, or no pixels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        hint = "; pass tensor.permute(0, 3, 1, 2)" if images.ndim == 4 and images.shape[3] == 3 else ""
        raise ImageError(name, f"tensor of shape {tuple(images.shape)}: expected (B, 3, H, W){hint}")
    if images.numel() == 0:
        raise ImageError(name, f"has no pixels (shape {tuple(images.shape)})")
    return _unit_range(images, name).expand(-1, 3, -1, -1)


def load_image(image: ImageFile | Image.Image | np.ndarray | Tensor) -> Tensor:
    """Load any kind of image as RGB float32 ``(3, H, W)`` in [0, 1].

    Args:
        image: an image file (:func:`agglo.decoding.decode`), or any input of :func:`to_tensor`.

    Raises:
        ImageError: the image cannot be read or converted.
    """
    if isinstance(image, Image.Image | np.ndarray | Tensor):
        return to_tensor(image, image_name(image))
    return to_tensor(read_image(image))


def read_image(image: ImageFile | Image.Image | np.ndarray | Tensor, name: str | None = None) -> Image.Image:
    """Read any kind of image as 8-bit RGB: the same pixels and errors for a path, bytes, a file, PIL, array or tensor.

    The EXIF orientation is applied. A path that exists is taken literally; otherwise ``~`` is expanded.

    Args:
        image: as in :func:`load_image`.
        name: of the image in errors.

    Raises:
        ImageError: the image cannot be read or converted.
        TypeError: not an image.
    """
    name = name or image_name(image)
    if isinstance(image, Image.Image):
        return as_rgb(image, name)
    if isinstance(image, np.ndarray | Tensor):
        return Image.fromarray(to_tensor(image, name).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        return decode(path if os.path.lexists(path) else os.path.expanduser(path), name)
    if isinstance(image, bytes | bytearray | memoryview) or hasattr(image, "read"):
        return decode(image, name)
    raise TypeError(f"expected a path, bytes, a file, a PIL image, an array or a tensor, got {type(image).__name__}")


def image_name(image: object, default: str = "image") -> str:
    """Name of an image in errors: its path, the path that a file or PIL image was opened from, or ``default``."""
    if isinstance(image, str | os.PathLike):
        return printable(os.fspath(image))
    known = getattr(image, "filename", None) or getattr(image, "name", None)
    return printable(known) if isinstance(known, str) else default


def _planes(array: np.ndarray, name: str) -> np.ndarray:
    """Move the channels of an array image first."""
    shape = array.shape
    if array.ndim == 2:
        return array[None]
    if array.ndim == 3 and shape[2] in (1, 3, 4):
        return array.transpose(2, 0, 1)
    if array.ndim == 3 and shape[0] in (1, 3, 4):
        why = "arrays have channels last, (H, W, 3): pass array.transpose(1, 2, 0) or torch.from_numpy(array)"
    elif array.ndim == 4:
        why = "this is a batch: pass one image at a time"
    else:
        why = "expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
    raise ImageError(name, f"array of shape {shape}: {why}")


def _check_planes(shape: tuple[int, ...], name: str) -> None:
    if len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)):
        return
    if len(shape) == 3 and shape[0] == 4 and shape[2] not in (1, 3, 4):
        return
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        why = "tensors have channels first, (3, H, W): pass tensor.permute(2, 0, 1)"
    elif len(shape) == 4:
        why = "this is a batch: pass one image at a time"
    else:
        why = "expected (H, W), (1, H, W), (3, H, W) or (4, H, W)"
    raise ImageError(name, f"tensor of shape {shape}: {why}")


def _unit_range(values: Tensor, name: str) -> Tensor:
    """Convert any supported dtype to float32 in [0, 1]."""
    if values.dtype == torch.bool:
        return values.float()
    if values.dtype == torch.uint8:
        return values.float() / 255
    if values.dtype == torch.uint16:
        return (values.float() / 257).round() / 255  # as in a file of 16 bits
    if not values.is_floating_point():
        hint = "use uint8 (0..255), uint16 or floats in [0, 1]; cast to uint8 if values are 0..255"
        raise ImageError(name, f"dtype {str(values.dtype).removeprefix('torch.')} is not supported: {hint}")
    values = values.float()
    low, high = float(values.detach().min()), float(values.detach().max())
    if not (np.isfinite(low) and np.isfinite(high)):  # min and max propagate NaN
        raise ImageError(name, "contains NaN or infinity")
    if low < -_ROUNDING:
        hint = "pass images in [0, 1], not normalised: the model subtracts its mean itself"
        raise ImageError(name, f"values from {low:.4g} to {high:.4g}: {hint}")
    if high > 1 + _ROUNDING:
        raise ImageError(name, f"values from {low:.4g} to {high:.4g}: floats must be in [0, 1]; divide by 255")
    return values.clamp(0, 1)


# ---------------------------------------------------------------------------------------------------- sizes


def nearest_size(size: tuple[float, float], step: int) -> tuple[int, int]:
    """The legal ``(H, W)`` nearest to ``size``: each side ``max(step, round(side / step) * step)``, ties to even."""
    _check_step(step)
    height, width = (max(step, round(side / step) * step) for side in size)
    return height, width


def aspect_size(size: tuple[int, int], target: tuple[int, int], step: int, *, inside: bool = False) -> tuple[int, int]:
    """``(H, W)`` of an image scaled to cover ``target``, with its aspect preserved up to rounding to ``step``.

    A square ``target`` is the rule "shorter side to r". Each side is ``max(step, round(n * scale / step) * step)``,
    ties to even, as RADIO's evaluations scale images.

    Args:
        size: ``(H, W)`` of the image in pixels.
        target: ``(H, W)`` to cover.
        step: sides become multiples of it.
        inside: fit inside ``target`` instead ("longer side to r").
    """
    scale = (min if inside else max)(target[0] / size[0], target[1] / size[1])
    return nearest_size((size[0] * scale, size[1] * scale), step)


def legal_sizes_near(side: int, step: int) -> tuple[int, int]:
    """The largest legal side at or below ``side`` (at least ``step``), and the smallest at or above it."""
    _check_step(step)
    return max(step, side // step * step), max(step, -(-side // step) * step)


def check_size(height: int, width: int, step: int) -> None:
    """Raise ValueError, with the nearest legal sizes, unless both sides are positive multiples of ``step`` pixels."""
    _check_step(step)
    wrong = [(n, side) for n, side in (("height", height), ("width", width)) if side < step or side % step]
    if wrong:
        which = " and ".join(f"{n} {side}" for n, side in wrong)
        legal = "; ".join(
            f"nearest legal {n}: {' or '.join(map(str, sorted(set(legal_sizes_near(side, step)))))}"
            for n, side in wrong
        )
        raise ValueError(f"images of {height}x{width} pixels (HxW): {which} must be a multiple of {step}; {legal}")


# ---------------------------------------------------------------------------------------------------- views


def crop_box(full: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centred box ``xyxy`` of an image of ``full`` ``(H, W)`` with the aspect of ``size``; whole pixels."""
    height, width = full
    w = min(width, max(1, round(height * size[1] / size[0])))
    h = min(height, max(1, round(width * size[0] / size[1])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre crop to the aspect of ``size`` ``(H, W)``, then resize to it (bicubic, antialiased).

    The same pixels as "shorter side to r, then centre crop"; the crop comes first so that ground truth can be cropped
    by :func:`crop_map` and is never resampled.
    """
    box = crop_box((image.height, image.width), size)
    if (box[3] - box[1], box[2] - box[0]) == tuple(size):
        return image.crop(box)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def stretch(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize a whole image to ``size`` ``(H, W)``; returned as is if it has that size."""
    width_height = size[1], size[0]
    return image if image.size == width_height else image.resize(width_height, resample)


def crop_map(values: object, size: tuple[int, int]) -> Tensor:
    """A mask or depth map ``(H, W)`` cropped as :func:`crop` crops its image, at full resolution."""
    array = np.asarray(values)
    x0, y0, x1, y1 = crop_box((array.shape[0], array.shape[1]), size)
    return torch.from_numpy(np.ascontiguousarray(array[y0:y1, x0:x1]))


def fit(
    image: Image.Image,
    size: tuple[int, int],
    mode: Literal["crop", "stretch", "pad"] = "crop",
    *,
    fill: Sequence[float] = (0.5, 0.5, 0.5),
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Tensor:
    """An image brought to one size, as every encoder of agglo sees it outside training.

    Args:
        image: of any size and mode.
        size: ``(H, W)`` in pixels.
        mode: ``crop``: :func:`crop`, the centre at the aspect of ``size``. ``stretch``: the whole image, resized to
            ``size``; with a ``size`` from :func:`aspect_size` its aspect is kept. ``pad``: the whole image, scaled to
            fit into ``size``, in the upper left corner.
        fill: RGB in [0, 1] of the padding; a model's ``fill`` is the colour that its normalisation maps to zero.
        resample: filter of ``stretch`` and ``pad``.

    Returns:
        RGB float32 ``(3, H, W)`` in [0, 1].
    """
    if image.mode != "RGB" or image.info:  # opened elsewhere: a palette cannot be resized, nor a sideways image cropped
        image = as_rgb(image, image_name(image))
    if mode == "crop":
        return to_tensor(crop(image, size))
    height, width = size if mode == "stretch" else aspect_size((image.height, image.width), size, 1, inside=True)
    pixels = to_tensor(stretch(image, (height, width), resample))
    if mode == "stretch":
        return pixels
    padded = torch.tensor(fill, dtype=torch.float32)[:, None, None].expand(3, *size).clone()
    padded[:, :height, :width] = pixels
    return padded


# ---------------------------------------------------------------------------------------------------- batches


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Stretch a batch ``(B, 3, H, W)`` to ``size``, bilinear and antialiased; returned as is if it has that size."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def snap(images: Tensor, step: int) -> Tensor:
    """:func:`resize` a batch ``(B, 3, H, W)`` to the nearest legal size; returned as is if its size is legal."""
    height, width = images.shape[-2:]
    return resize(images, nearest_size((height, width), step))


def _check_step(step: int) -> None:
    if step < 1:
        raise ValueError(f"step must be a positive number of pixels, got {step}")


class Conditioner(nn.Module):
    """Per-channel normalisation inside the model: ``(x - mean) / std``, images in [0, 1].

    Args:
        mean, std: three numbers each, RGB; buffers ``(3, 1, 1)``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std need three numbers each (RGB), got {len(mean)} and {len(std)}")
        if not all(s > 0 for s in std):
            raise ValueError(f"std must be positive, got {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Conditioner:
        """Move to another device but stay in float32, also in a half-precision model."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalise RGB ``(B, 3, H, W)`` in [0, 1]."""
        return (images - self.mean) / self.std
