"""Any image-like as a batch of a size that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from agglo.nn.windows import check_room, check_window
from agglo.preprocess import check_size, load_image, snap, to_batch
from agglo.types import ConfigError, ImageError

if TYPE_CHECKING:
    from agglo.model.model import Model

ImageLike = Tensor | Image.Image | np.ndarray | str | Path


def prepare(
    model: Model, images: ImageLike, *, resize: bool = True, window: int | None = None, listed: bool = False
) -> Tensor:
    """Any image-like to a float batch of legal size on the model's device.

    Args:
        model: says which sizes are legal, and how far images are made for it.
        images: as :meth:`agglo.Model.forward` takes them, no list and no clips.
        resize: False raises where a side is no multiple of a patch.
        window: side of the windows in patches; None for the model's own.
        listed: the image comes from a list of many, whose sizes nobody chose for this window.

    Raises:
        ValueError: not images in [0, 1]; or an illegal size, a window that does not divide a tensor's patches, or one
            that an image would have to be more than doubled for (the legal ones are named).
        TypeError: not images at all; or not conditioned ones, where the conditioner was taken.
    """
    batch = _batch(model, images)
    step, (height, width) = model.spec.step, batch.shape[-2:]
    side = model.step(window) // step
    if not resize:
        check_size(height, width, step)
    elif side > 1 and model.student.windows:
        # Whoever hands over a tensor of whole patches has chosen its grid; what has to be resized anyway has none.
        if isinstance(images, Tensor) and not listed and height % step == 0 and width % step == 0:
            check_window((height // step, width // step), side, step)
        check_room((height, width), side, step)
    if min(height, width) < step and resize:
        model.say_once(f"images with a side below one patch are stretched to its {step} pixels")
    largest = model.provenance.get("max_size")
    if largest is not None and max(height, width) > largest:
        model.say_once(f"images larger than the {largest} pixels this model was made for: it runs, but was not tried")
    return snap(batch, step * side) if resize else batch


def prepare_list(
    model: Model, images: Sequence[ImageLike], *, resize: bool = True, window: int | None = None
) -> list[Tensor]:
    """Each image of a list as :func:`prepare` makes it, ``(1, 3, H, W)``.

    Raises:
        ConfigError, ImageError: as there, and a batch among the images; the first such image is named, by its path or
            its place in the list.
    """
    found = []
    for index, image in enumerate(images):
        path = image if isinstance(image, str | Path) else getattr(image, "filename", "")
        name = str(path or f"images[{index}]")
        try:
            batch = prepare(model, image, resize=resize, window=window, listed=True)
        except ImageError as error:
            raise ImageError(name, error.why) from error
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
        if len(batch) != 1:
            raise ImageError(name, f"is a batch of {len(batch)}: a list holds single images")
        found.append(batch)
    return found


def _batch(model: Model, images: ImageLike) -> Tensor:
    device = next(model.student.parameters()).device
    if isinstance(model.conditioner, nn.Identity):
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise TypeError("this model's conditioner was taken: pass conditioned images, a tensor (B, 3, H, W)")
        if not images.numel():
            raise ImageError("images", f"has no pixels (shape {tuple(images.shape)})")
        if not torch.isfinite(torch.stack(torch.aminmax(images))).all():
            raise ImageError("images", "hold NaN or infinity")
        return images.to(device)
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        model.say_once("images are a uint8 tensor: divided by 255, as floats in [0, 1] are meant")
    batch = to_batch(images) if isinstance(images, Tensor) and images.ndim == 4 else load_image(images)[None]
    return batch.to(device, torch.float32)
