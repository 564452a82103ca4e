"""Images in any form to a batch of a size that a model accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.decoding import ImageFile
from agglo.nn.windows import check_window_divides, check_window_fits
from agglo.preprocess import check_size, image_name, load_image, snap, to_batch
from agglo.types import ConfigError, ImageError

ImageLike = Tensor | Image.Image | np.ndarray | ImageFile


@dataclass(frozen=True, slots=True)
class InputRules:
    """What a model accepts in one call.

    Args:
        step: image sides must be a multiple of this many pixels.
        window: side of the attention windows, in steps; 1 for none.
        windowed: whether the student has windowed attention.
        conditioned: images are expected to be conditioned already.
        device: of the batch.
        max_size: largest side the model was made for, in pixels; None where unknown.
        warn: called with each warning.
    """

    step: int
    window: int
    windowed: bool
    conditioned: bool
    device: torch.device
    max_size: int | None
    warn: Callable[[str], None]


def prepare(images: ImageLike, rules: InputRules, *, resize: bool = True, in_list: bool = False) -> Tensor:
    """Convert images to a float batch ``(B, 3, H, W)`` of legal size on the model's device.

    Args:
        images: as in :meth:`agglo.Model.forward`, without lists and clips.
        rules: what the model accepts.
        resize: False raises where a side is not a multiple of the step.
        in_list: the image is one of a list; its size is then not taken as chosen for the window.

    Raises:
        ValueError: not images in [0, 1]; an illegal size; a window that does not divide a tensor's patches, or for
            which the image would have to be more than doubled. The legal values are named.
        TypeError: not images; or unconditioned ones for a model without conditioner.
    """
    batch = _batch(images, rules)
    step, (height, width) = rules.step, batch.shape[-2:]
    if not resize:
        check_size(height, width, step)
    elif rules.window > 1 and rules.windowed:
        # The grid of a tensor of whole patches was chosen by the caller; any other image is resized anyway.
        if isinstance(images, Tensor) and not in_list and height % step == 0 and width % step == 0:
            check_window_divides((height // step, width // step), rules.window, step)
        check_window_fits((height, width), rules.window, step)
    if min(height, width) < step and resize:
        rules.warn(f"images with a side below one patch are stretched to {step} pixels")
    if rules.max_size is not None and max(height, width) > rules.max_size:
        rules.warn(f"images exceed the {rules.max_size} pixels this model was made for: quality is untested")
    return snap(batch, step * rules.window) if resize else batch


def prepare_list(images: Sequence[ImageLike], rules: InputRules, *, resize: bool = True) -> list[Tensor]:
    """Prepare each image of a list, see :func:`prepare`, as ``(1, 3, H, W)``.

    Raises:
        ConfigError, ImageError: as in :func:`prepare`, or an entry is a batch; the message starts with the image's path
            or its index.
    """
    found = []
    for index, image in enumerate(images):
        name = image_name(image, f"images[{index}]")
        try:
            batch = prepare(image, rules, resize=resize, in_list=True)
        except ImageError as error:
            raise ImageError(name, error.why) from error
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
        if len(batch) != 1:
            raise ImageError(name, f"is a batch of {len(batch)}; a list takes single images")
        found.append(batch)
    return found


def _batch(images: ImageLike, rules: InputRules) -> Tensor:
    if rules.conditioned:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise TypeError("this model's conditioner was taken: pass conditioned images as a tensor (B, 3, H, W)")
        if not images.numel():
            raise ImageError("images", f"has no pixels (shape {tuple(images.shape)})")
        if not torch.isfinite(torch.stack(torch.aminmax(images))).all():
            raise ImageError("images", "contain NaN or infinity")
        return images.to(rules.device)
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        rules.warn("images are a uint8 tensor: divided by 255 to floats in [0, 1]")
    batch = to_batch(images) if isinstance(images, Tensor) and images.ndim == 4 else load_image(images)[None]
    return batch.to(rules.device, torch.float32)
