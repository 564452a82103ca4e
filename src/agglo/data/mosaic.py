"""Many small views on one canvas, for teachers that take images of one size only (METHOD 3.4, D-10b, D-12).

A canvas of ``n`` token cells a side holds ``(n // v)^2`` views of ``v`` cells. Tile ``i`` of an axis with ``k`` tiles
begins at cell ``floor(i n / k)``: every tile has at least ``floor(n / k)`` cells, and the cells that are left over lie
between tiles as a margin. All borders fall on token borders, so features are cut back by indexing. Which view lies in
which tile, and where in it, is drawn anew every step: what a canvas's positions and a view's neighbours do to its
features then averages out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agglo.data.views import generator
from agglo.types import ConfigError

_MOSAIC = 16
"""The stream of random numbers (:func:`agglo.data.views.generator`), apart from those of views, shifts and windows."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles for views of one size on a canvas; all sizes are ``(H, W)`` in token cells.

    Args:
        canvas: of a whole forward pass.
        view: of one image.

    Raises:
        ConfigError: the view is empty or larger than the canvas.
    """

    mosaic: tuple[int, int]
    view: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.view) < 1 or self.view[0] > self.mosaic[0] or self.view[1] > self.mosaic[1]:
            raise ConfigError(
                f"a view of {self.view[0]}x{self.view[1]} token cells does not fit a canvas of "
                f"{self.mosaic[0]}x{self.mosaic[1]}: views have 1 to {self.mosaic[0]}x{self.mosaic[1]} cells"
            )

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles down and across."""
        return self.mosaic[0] // self.view[0], self.mosaic[1] // self.view[1]

    @property
    def count(self) -> int:
        """Tiles a canvas."""
        return self.tiles[0] * self.tiles[1]

    def starts(self, axis: int) -> list[int]:
        """The first cell of each tile of an axis (0: rows), and the canvas's end."""
        return [index * self.mosaic[axis] // self.tiles[axis] for index in range(self.tiles[axis] + 1)]


@dataclass(frozen=True)
class MosaicLayout:
    """Where each image of a batch lies, in cells: ``canvas[canvas[j], :, y[j] : y[j] + h, x[j] : x[j] + w]``.

    Args:
        tiling: of every canvas.
        canvases: how many there are.
        canvas, y, x: one number an image.
    """

    tiling: Tiling
    mosaics: int
    mosaic: Sequence[int]
    y: Sequence[int]
    x: Sequence[int]

    def masks(self) -> Tensor:
        """``(B, H, W)`` bool: the cells of its canvas that are image ``j``'s own; no two of a canvas share one."""
        height, width = self.tiling.view
        out = torch.zeros(len(self.mosaic), *self.tiling.mosaic, dtype=torch.bool)
        for j, (y, x) in enumerate(zip(self.y, self.x, strict=True)):
            out[j, y : y + height, x : x + width] = True
        return out


def draw_layout(tiling: Tiling, batch: int, seed: int, step: int, part: int = 0) -> MosaicLayout:
    """Random tiles for a batch, and a random place inside each: a pure function of its arguments.

    As many canvases as hold the batch, ``ceil(batch / tiles)``; tiles that stay empty are anywhere.

    Args:
        tiling: what a canvas holds.
        batch: images.
        seed: of the run.
        step: the step.
        part: of the step's images, where several processes share them.
    """
    rng, per_canvas = generator(seed, step, part, _MOSAIC), tiling.count
    canvases = -(-batch // per_canvas)
    # Where a canvas holds one view, an order would only decide the order of the pass.
    slots = (rng.permutation(canvases * per_canvas) if per_canvas > 1 else torch.arange(batch).numpy())[:batch]
    canvas, tile = slots // per_canvas, slots % per_canvas
    index = tile // tiling.tiles[1], tile % tiling.tiles[1]
    found = []
    for axis in (0, 1):
        starts, view = tiling.starts(axis), tiling.view[axis]
        room = [starts[i + 1] - starts[i] - view for i in index[axis]]
        jitter = rng.integers(0, [r + 1 for r in room])
        found.append([starts[i] + int(j) for i, j in zip(index[axis], jitter, strict=True)])
    return MosaicLayout(tiling, canvases, canvas.tolist(), found[0], found[1])


def pack(images: Tensor, places: MosaicLayout, cell: int, fill: Tensor) -> Tensor:
    """Views onto canvases.

    Args:
        images: ``(B, 3, h, w)``, sides of the tiling's view in pixels.
        places: of the batch.
        cell: pixels a token cell.
        fill: ``(3,)`` colour of what no view covers: the teacher's mean, which its normalisation makes 0.

    Returns:
        ``(N, 3, H, W)``.

    Raises:
        ValueError: the batch is not the one the places were drawn for.
    """
    tiling = places.tiling
    wanted = len(places.mosaic), 3, tiling.view[0] * cell, tiling.view[1] * cell
    if tuple(images.shape) != wanted:
        raise ValueError(f"the places are for images {wanted}, not {tuple(images.shape)}")
    height, width = (side * cell for side in tiling.mosaic)
    canvases = fill.to(images).view(1, 3, 1, 1).expand(places.mosaics, 3, height, width).clone()
    for image, canvas, y, x in zip(images, places.mosaic, places.y, places.x, strict=True):
        canvases[canvas, :, y * cell : y * cell + wanted[2], x * cell : x * cell + wanted[3]] = image
    return canvases


def unpack(spatial: Tensor, places: MosaicLayout) -> Tensor:
    """Each image's own cells of the canvases' maps: ``(N, C, H, W)`` to ``(B, C, h, w)``; empty tiles are dropped.

    Raises:
        ValueError: the maps are not those of the canvases.
    """
    tiling = places.tiling
    if len(spatial) != places.mosaics or tuple(spatial.shape[-2:]) != tiling.mosaic:
        raise ValueError(
            f"expected maps of {places.mosaics} canvases of {tiling.mosaic} cells, got {tuple(spatial.shape)}"
        )
    height, width = tiling.view
    return torch.stack(
        [
            spatial[canvas, :, y : y + height, x : x + width]
            for canvas, y, x in zip(places.mosaic, places.y, places.x, strict=True)
        ]
    )
