"""Rendering of views from partially read images (:meth:`agglo.sources.base.Source.read_part`)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from agglo.data.views import render
from agglo.sources.base import PartialImage, ReadRequest
from agglo.types import View

_GRIDS = (1, 2, 4, 8)
_FINEST = 64
"""Minimum number of grid cells along the shorter side of an image."""
_SPARE = 1.0
"""Minimum number of decoded pixels per view pixel when an image is shrunk while decoding. Near 1 the view shows the
JPEG decoder's low pass, which is slightly sharper than this one: by 0.9/255 on average over photographs at 1, by 0.4 at
1.25. The difference between the bilinear and the bicubic kernel is 1.1."""
_WHITE = np.float32(255)
_TOGETHER = 8
"""Number of images decoded before they are resampled together, which keeps code and tables in the CPU caches."""
_HELD = 1 << 26
"""Maximum bytes of decoded images waiting to be resampled."""


class BatchRenderer:
    """Renders the views of a batch into one array.

    Args:
        count: number of views.
        size: ``(H, W)`` of each, in pixels.
    """

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        self._images = np.empty((count, 3, *size), dtype=np.float32)
        self._done = 0
        self._waiting: list[tuple[PartialImage | Image.Image, View]] = []
        self._held = 0

    def add(self, image: PartialImage | Image.Image, view: View) -> None:
        """Add the next view; views of a :class:`~agglo.sources.base.PartialImage` must come from :func:`align_view`."""
        self._waiting.append((image, view))
        self._held += image.array.nbytes if isinstance(image, PartialImage) else 4 * image.width * image.height
        if len(self._waiting) == _TOGETHER or self._held > _HELD:
            self._render()

    def finish(self) -> Tensor:
        """All views, RGB float32 ``(B, 3, H, W)`` in [0, 1]."""
        self._render()
        return torch.from_numpy(self._images)

    def _render(self) -> None:
        for image, view in self._waiting:
            pixels = resample(image, view) if isinstance(image, PartialImage) else render(image, view).numpy()
            np.divide(pixels, _WHITE, out=self._images[self._done])
            self._done += 1
        self._waiting.clear()
        self._held = 0


def align_view(view: View, source_size: tuple[int, int]) -> tuple[View, ReadRequest]:
    """Align a view with the pixel grid of the image at reduced resolution; returns it with the part to read.

    Decoding may shrink an image by 2, 4 or 8, while each view pixel covers at least one decoded pixel. To cut every
    view out of the decoded image without resampling twice, its edges are rounded to a grid of 8 pixels, or fewer in
    images with a side below 512: by at most 1/128 of the side. The grid depends on the image alone, so views of the
    same crop at several sizes are rounded equally. The returned view holds the exact geometry.

    Args:
        view: a view inside its image.
        source_size: ``(H, W)`` of the image.
    """
    grid = max(n for n in _GRIDS if n == 1 or n * _FINEST <= min(source_size))
    x0, y0, x1, y1 = (round(side / grid) for side in view.box)
    x1, y1 = max(1, min(x1, source_size[1] // grid)), max(1, min(y1, source_size[0] // grid))
    x0, y0 = min(x0, x1 - 1), min(y0, y1 - 1)
    scale = view.size[1] / ((x1 - x0) * grid), view.size[0] / ((y1 - y0) * grid)
    moved = View(view.size, scale, (-x0 * grid * scale[0], -y0 * grid * scale[1]), view.flip)
    shrink = max((n for n in _GRIDS if n <= grid and n * max(scale) * _SPARE <= 1), default=1)
    return moved, ReadRequest(shrink, y1 * grid)


def resample(pixels: PartialImage, view: View) -> np.ndarray:
    """The pixels of a view from :func:`align_view`: one bicubic, antialiased resampling, then the flip.

    Equals :func:`agglo.data.views.render` up to rounding (a few 255ths at most, 0.3 on average), several times faster.

    Returns:
        uint8 ``(3, H, W)``, strided.
    """
    x0, y0, x1, y1 = (round(side / pixels.shrink) for side in view.box)
    window = np.require(pixels.array[y0:y1, x0:x1], requirements=["C", "W"])
    # For channels-last uint8 this is a vectorised single-threaded kernel, so any thread may call it.
    resized = interpolate(
        torch.from_numpy(window).permute(2, 0, 1)[None], view.size, mode="bicubic", align_corners=False, antialias=True
    )
    array = resized[0].numpy()
    return _mirrored(array) if view.flip else array


def _mirrored(array: np.ndarray) -> np.ndarray:
    """Reverse the last axis of a byte array; whole words are byte-swapped and reversed, which is much faster."""
    word = next(size for size in (8, 4, 2, 1) if array.shape[-1] % size == 0)
    if word == 1 or not array.flags.c_contiguous:
        return array[..., ::-1]
    return array.view(f"u{word}")[..., ::-1].byteswap().view(np.uint8)
