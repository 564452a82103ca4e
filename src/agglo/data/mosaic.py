"""Mosaics: several small views packed into one image, for teachers with a fixed input size.

See docs/method.md, 3.4, D-10b and D-12. A mosaic of ``n`` token cells per side holds ``(n // v)^2`` views of ``v``
cells. Tile ``i`` of an axis with ``k`` tiles starts at cell ``floor(i n / k)``: each tile has at least ``floor(n / k)``
cells, and the remaining cells form margins between tiles. All borders fall on token borders, so features are unpacked
by indexing. Tile and offset of each view are drawn anew every step, so that effects of position and neighbours on the
features average out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agglo.data.views import generator
from agglo.types import ConfigError

_MOSAIC = 16
"""Random stream (:func:`agglo.data.views.generator`) of mosaics."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles for views of one size in a mosaic; all sizes are ``(H, W)`` in token cells.

    Args:
        mosaic: size of the teacher's input.
        view: size of one view.

    Raises:
        ConfigError: the view is empty or larger than the mosaic.
    """

    mosaic: tuple[int, int]
    view: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.view) < 1 or self.view[0] > self.mosaic[0] or self.view[1] > self.mosaic[1]:
            raise ConfigError(
                f"a view of {self.view[0]}x{self.view[1]} token cells does not fit a mosaic of "
                f"{self.mosaic[0]}x{self.mosaic[1]}; use 1x1 to {self.mosaic[0]}x{self.mosaic[1]} cells"
            )

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.mosaic[0] // self.view[0], self.mosaic[1] // self.view[1]

    @property
    def count(self) -> int:
        """Tiles per mosaic."""
        return self.tiles[0] * self.tiles[1]

    def starts(self, axis: int) -> list[int]:
        """First cell of each tile along an axis (0: rows), followed by the mosaic's side."""
        return [index * self.mosaic[axis] // self.tiles[axis] for index in range(self.tiles[axis] + 1)]


@dataclass(frozen=True)
class MosaicLayout:
    """Position of each image of a batch, in cells: ``mosaics[mosaic[j], :, y[j] : y[j] + h, x[j] : x[j] + w]``.

    Args:
        tiling: tiles of every mosaic.
        mosaics: number of mosaics.
        mosaic, y, x: one number per image.
    """

    tiling: Tiling
    mosaics: int
    mosaic: Sequence[int]
    y: Sequence[int]
    x: Sequence[int]

    def masks(self) -> Tensor:
        """``(B, H, W)`` bool: the cells of its mosaic that each image covers; disjoint within a mosaic."""
        height, width = self.tiling.view
        out = torch.zeros(len(self.mosaic), *self.tiling.mosaic, dtype=torch.bool)
        for j, (y, x) in enumerate(zip(self.y, self.x, strict=True)):
            out[j, y : y + height, x : x + width] = True
        return out


def draw_layout(tiling: Tiling, batch: int, seed: int, step: int, part: int = 0) -> MosaicLayout:
    """Random tiles and offsets for a batch, in ``ceil(batch / tiles)`` mosaics: a pure function of its arguments.

    Args:
        tiling: tiles of a mosaic.
        batch: number of images.
        seed: seed of the run.
        step: the step.
        part: rank of the process, if several share the batch.
    """
    rng, per_mosaic = generator(seed, step, part, _MOSAIC), tiling.count
    mosaics = -(-batch // per_mosaic)
    # With one view per mosaic a permutation would only reorder the forward pass.
    slots = (rng.permutation(mosaics * per_mosaic) if per_mosaic > 1 else torch.arange(batch).numpy())[:batch]
    mosaic, tile = slots // per_mosaic, slots % per_mosaic
    index = tile // tiling.tiles[1], tile % tiling.tiles[1]
    found = []
    for axis in (0, 1):
        starts, view = tiling.starts(axis), tiling.view[axis]
        room = [starts[i + 1] - starts[i] - view for i in index[axis]]
        jitter = rng.integers(0, [r + 1 for r in room])
        found.append([starts[i] + int(j) for i, j in zip(index[axis], jitter, strict=True)])
    return MosaicLayout(tiling, mosaics, mosaic.tolist(), found[0], found[1])


def pack(images: Tensor, layout: MosaicLayout, cell: int, fill: Tensor) -> Tensor:
    """Pack views ``(B, 3, h, w)`` into mosaics ``(N, 3, H, W)``.

    Args:
        images: views of the tiling's size, in pixels.
        layout: layout of the batch.
        cell: pixels per token cell.
        fill: ``(3,)`` colour of uncovered cells: the teacher's mean, which its normalisation maps to 0.

    Raises:
        ValueError: the images do not match the layout.
    """
    tiling = layout.tiling
    wanted = len(layout.mosaic), 3, tiling.view[0] * cell, tiling.view[1] * cell
    if tuple(images.shape) != wanted:
        raise ValueError(f"the layout is for images {wanted}, got {tuple(images.shape)}")
    height, width = (side * cell for side in tiling.mosaic)
    mosaics = fill.to(images).view(1, 3, 1, 1).expand(layout.mosaics, 3, height, width).clone()
    for image, mosaic, y, x in zip(images, layout.mosaic, layout.y, layout.x, strict=True):
        mosaics[mosaic, :, y * cell : y * cell + wanted[2], x * cell : x * cell + wanted[3]] = image
    return mosaics


def unpack(spatial: Tensor, layout: MosaicLayout) -> Tensor:
    """Feature maps of each view, ``(N, C, H, W)`` to ``(B, C, h, w)``; empty tiles are dropped.

    Raises:
        ValueError: the maps do not match the layout.
    """
    tiling = layout.tiling
    if len(spatial) != layout.mosaics or tuple(spatial.shape[-2:]) != tiling.mosaic:
        raise ValueError(
            f"expected maps of {layout.mosaics} mosaics of {tiling.mosaic} cells, got {tuple(spatial.shape)}"
        )
    height, width = tiling.view
    return torch.stack(
        [
            spatial[mosaic, :, y : y + height, x : x + width]
            for mosaic, y, x in zip(layout.mosaic, layout.y, layout.x, strict=True)
        ]
    )
