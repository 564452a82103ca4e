"""Images encoded with their aspect kept: shorter side to r, as RADIO's evaluations of summaries show them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agglo.evals._features import (
    Encoded,
    _text_features,
    check,
    device_of,
    encode,
    encoded_once,
    frozen,
    input_size,
    nothing_read,
    open_source,
    read_batches,
    step_of,
)
from agglo.evals._rows import Rows, rounded
from agglo.evals.base import Backbone, Progress
from agglo.preprocess import aspect_size
from agglo.sources.base import Source
from agglo.teachers.base import Teacher
from agglo.types import ConfigError


def encode_summaries(
    model: Backbone,
    options: Mapping[str, Any] | Source,
    size: int | tuple[int, int],
    *,
    aspect: str,
    want: str = "summary",
    progress: Progress | None = None,
    precision: torch.dtype = torch.float32,
) -> Encoded:
    """:func:`encode` for summaries, of views cropped to ``size`` or of whole images.

    With ``aspect="keep"`` an image is scaled to cover ``size``, each side to the nearest multiple of the model's step
    (:func:`agglo.preprocess.aspect_size`), and nothing is cut off. A teacher that sees one canvas only is shown crops,
    and a warning says so: the settings are those of the models that saw whole images.

    Args:
        aspect: ``crop`` or ``keep``.
        want: ``summary`` or ``text``.
    """
    canvas: int | None = getattr(model, "canvas", None)
    if aspect == "keep" and canvas is not None:
        warnings.warn(
            f"aspect: keep had no effect: {type(model).__name__} sees {canvas}x{canvas} pixels only, and was shown the "
            "middle of each image, not the whole",
            stacklevel=2,
        )
    if aspect == "crop" or canvas is not None:
        return encode(model, options, size, want=want, progress=progress, precision=precision)
    target = (size, size) if isinstance(size, int) else (size[0], size[1])
    input_size(model, target)  # refuses what is no size

    def make() -> Encoded:
        return _encode(model, open_source(options), target, want, progress, precision)

    return encoded_once(model, options, ("keep", *target), want, precision, make)


def check_aspect(kind: str, aspect: str) -> str:
    """The key of an eval.

    Raises:
        ConfigError: neither ``crop`` nor ``keep``.
    """
    if aspect not in ("crop", "keep"):
        raise ConfigError(f"evals.{kind}: aspect is crop or keep, not {aspect!r}")
    return aspect


def view_of_all(model: Backbone, size: int | tuple[int, int], aspect: str | None) -> tuple[int, int] | None:
    """``(H, W)`` at which a model sees every image of an eval; None where whole images have sizes of their own.

    Args:
        model: of which it is asked.
        size: of the eval.
        aspect: of the eval, None where it has no such key.

    Raises:
        ConfigError: ``size`` is no size.
    """
    one = input_size(model, size)
    return None if aspect == "keep" and getattr(model, "canvas", None) is None else one


def shown(model: Backbone, image: Image.Image, target: tuple[int, int]) -> tuple[int, int]:
    """``(H, W)`` at which a model sees a whole image that is to cover ``target``."""
    full = image.height, image.width
    if isinstance(model, Teacher):
        return model.input_size(aspect_size(full, target, 1), model.spec.stride)
    return aspect_size(full, target, step_of(model))


def _encode(
    model: Backbone,
    source: Source,
    target: tuple[int, int],
    want: str,
    progress: Progress | None,
    precision: torch.dtype,
) -> Encoded:
    forward = _text_features(model) if want == "text" else model
    device = device_of(model)
    names: list[str] = []
    index: list[int] = []
    skipped: list[str] = []
    sizes: list[tuple[int, int]] = []
    rows = Rows(len(source))
    with frozen(model):
        for where, batch_names, images in read_batches(source, skipped, progress):
            views = [shown(model, image, target) for image in images]
            found: dict[int, Tensor] = {}
            for view in dict.fromkeys(views):  # images of one shape go through together
                at = [i for i, own in enumerate(views) if own == view]
                out = forward(torch.stack([_pixels(images[i], view) for i in at]).to(device))
                own_names = [batch_names[i] for i in at]
                summary = check(out.summary, "summary", own_names, 2)
                if summary is None:
                    spatial = check(out.spatial, "spatial", own_names, 4)
                    summary = None if spatial is None else spatial.mean((2, 3))
                if summary is not None:
                    found |= dict(zip(at, rounded(summary, precision, own_names), strict=True))
            if found:
                rows.add(torch.stack([found[i] for i in range(len(images))]))
            names += batch_names
            index += where
            sizes += [(image.height, image.width) for image in images]
    if not names:
        raise nothing_read(source, skipped)
    return Encoded(tuple(names), tuple(index), rows.all(), None, tuple(skipped), tuple(sizes))


def _pixels(image: Image.Image, view: tuple[int, int]) -> Tensor:
    """The whole image at a size, ``(3, H, W)`` in [0, 1]; bicubic, antialiased."""
    if (image.height, image.width) != view:
        image = image.resize((view[1], view[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
