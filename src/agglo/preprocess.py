"""Preprocessing: from image files, arrays and tensors to model inputs of a legal size.

:func:`decode` reads image files; :func:`to_tensor` and :func:`load_image` convert to tensors; :func:`fit` crops,
stretches or pads an image to the model's input, for ``embed``, evals and reports alike; :func:`nearest_size`,
:func:`aspect_size` and :func:`check_size` compute legal sizes; :class:`Conditioner` normalises inside the model. Views
in training are made by ``agglo.data``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from agglo.types import ImageError

_WITH_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_ROUNDING = 1e-3
"""Tolerance of float images beyond [0, 1], because resampling overshoots slightly."""


# ---------------------------------------------------------------------------------------------------- decoding


def decode(source: str | os.PathLike[str] | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode one image file to upright 8-bit RGB; the file is closed.

    The EXIF orientation is applied. Greyscale and palette images are expanded; transparency is composited over white;
    CMYK is converted without its colour profile; 16-bit greyscale is divided by 257 (65535 is white); other integer and
    float ranges follow :func:`_eight_bits`; of an animation or a document the first frame is read.

    Args:
        source: a path, or a seekable binary file object.
        name: of the image in errors; the path when None.

    Returns:
        A loaded ``PIL.Image`` of mode "RGB", 1x1 or larger.

    Raises:
        ImageError: the file is missing, empty, not an image, truncated, damaged, a decompression bomb or of an
            unsupported mode.
    """
    if name is None:
        name = str(source if isinstance(source, str | os.PathLike) else getattr(source, "name", "image"))
    try:
        with Image.open(source) as image:
            if image.format == "EPS":
                # Loading one would run Ghostscript.
                raise ImageError(name, "EPS files are programs and are not executed; convert it to PNG")
            image.load()
            _turn_upright(image)
            return _rgb(image, name)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(name, "no such file") from None
    except IsADirectoryError:
        raise ImageError(name, "is a folder, not an image") from None
    except PermissionError:
        raise ImageError(name, "cannot be read (permission denied)") from None
    except UnidentifiedImageError:
        raise ImageError(name, _not_an_image(source)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"too large to decode safely ({error})") from None
    except Exception as error:  # PIL's readers raise nearly anything on damaged files: SyntaxError, struct.error, ...
        detail = str(error) or type(error).__name__
        kind = "truncated" if "truncated" in detail.lower() or isinstance(error, EOFError) else "damaged"
        raise ImageError(name, f"{kind} image file ({detail})") from error


def _not_an_image(source: str | os.PathLike[str] | BinaryIO) -> str:
    """Describe a file that PIL did not recognise."""
    try:
        if isinstance(source, str | os.PathLike):
            with open(source, "rb") as file:
                head, size = file.read(8), os.fstat(file.fileno()).st_size
        else:
            size = source.seek(0, os.SEEK_END)
            source.seek(0)
            head = source.read(8)
    except OSError:
        return "not an image that can be read"
    if size == 0:
        return "is empty (0 bytes)"
    return f"not an image that can be read ({size} bytes, beginning with {head!r})"


def _turn_upright(image: Image.Image) -> None:
    """Apply the EXIF orientation in place; unreadable EXIF is ignored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # noqa: BLE001 (damaged metadata fails in many ways and must not make an image unreadable)
        return


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit "RGB"."""
    if min(image.size) < 1:
        raise ImageError(name, f"has no pixels ({image.width}x{image.height})")
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image), name)).convert("RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        result = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        try:
            result = image.convert("RGB")
        except ValueError:
            raise ImageError(name, f"colour mode {image.mode} is not supported; convert it to RGB first") from None
    result.info = {}  # profiles and EXIF would stay in memory with a cached image
    return result


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Convert high-bit-depth greyscale ``(H, W)`` to uint8.

    Integers within 0..65535 are 16-bit samples: ``round(v / 257)``. Floats within [0, 1] are multiplied by 255, floats
    within [0, 255] rounded. Other ranges have no standard white: their minimum and maximum become black and white.
    """
    data = values.astype(np.float64)
    if not np.isfinite(data).all():
        raise ImageError(name, "contains NaN or infinity")
    low, high = float(data.min()), float(data.max())
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        data = data / 257
    elif values.dtype.kind == "f" and low >= 0 and high <= 1:
        data = data * 255
    elif not (values.dtype.kind == "f" and low >= 0 and high <= 255):
        data = (data - low) * (255 / (high - low) if high > low else 0)
    return np.rint(data).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------- tensors


def to_tensor(image: Image.Image | np.ndarray | Tensor, name: str = "image") -> Tensor:
    """Convert one image to a tensor.

    Args:
        image: a PIL image of any mode; an array ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)`` or ``(H, W, 4)`` (alpha is
            composited over white); or a tensor ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``. Values: uint8, uint16, bool,
            or floats in [0, 1].
        name: of the image in errors.

    Returns:
        RGB float32 ``(3, H, W)`` in [0, 1]; a tensor stays on its device.

    Raises:
        ImageError: wrong layout, dtype or range, NaN, or no pixels.
        TypeError: not an image.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(_rgb(_loaded(image, name), name))
    if isinstance(image, np.ndarray):
        channels_first = torch.from_numpy(np.array(_planes(image, name)))
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


def load_image(image: str | os.PathLike[str] | BinaryIO | Image.Image | np.ndarray | Tensor) -> Tensor:
    """Load any kind of image as RGB float32 ``(3, H, W)`` in [0, 1].

    Args:
        image: a path or binary file (see :func:`decode`), or any input of :func:`to_tensor`. The EXIF orientation of
            PIL images is applied.

    Raises:
        ImageError: the image cannot be read or converted.
    """
    if isinstance(image, np.ndarray | Tensor):
        return to_tensor(image)
    if isinstance(image, Image.Image):
        name = str(getattr(image, "filename", "") or "image")
        return to_tensor(ImageOps.exif_transpose(_loaded(image, name)), name)
    if isinstance(image, str | os.PathLike):
        return to_tensor(decode(Path(image).expanduser(), os.fspath(image)))
    if hasattr(image, "read"):
        return to_tensor(decode(image))
    raise TypeError(f"expected a path, a file, a PIL image, an array or a tensor, got {type(image).__name__}")


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """Read the pixels of a PIL image that may be opened lazily."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(name, f"damaged image file ({error})") from error
    return image


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
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        why = "tensors have channels first, (3, H, W): pass tensor.permute(2, 0, 1)"
    elif len(shape) == 4:
        why = "this is a batch: pass one image at a time"
    else:
        why = "expected (H, W), (1, H, W) or (3, H, W)"
    raise ImageError(name, f"tensor of shape {shape}: {why}")


def _unit_range(values: Tensor, name: str) -> Tensor:
    """Convert any supported dtype to float32 in [0, 1]."""
    if values.dtype == torch.bool:
        return values.float()
    if values.dtype == torch.uint8:
        return values.float() / 255
    if values.dtype == torch.uint16:
        return values.float() / 65535
    if not values.is_floating_point():
        hint = "use uint8 (0..255), uint16 or floats in [0, 1]; cast to uint8 if values are 0..255"
        raise ImageError(name, f"dtype {str(values.dtype).removeprefix('torch.')} is not supported: {hint}")
    values = values.float()
    low, high = float(values.min()), float(values.max())
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
    if mode == "crop":
        return to_tensor(crop(image, size))
    height, width = size if mode == "stretch" else aspect_size((image.height, image.width), size, 1, inside=True)
    pixels = to_tensor(image if image.size == (width, height) else image.resize((width, height), resample))
    if mode == "stretch":
        return pixels
    canvas = torch.tensor(fill, dtype=torch.float32)[:, None, None].expand(3, *size).clone()
    canvas[:, :height, :width] = pixels
    return canvas


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
