"""Wrappers of teachers with one input size: a mosaic of small views, or an upsampler for larger images.

Both wrappers are teachers. A recipe enables them with ``mosaic: true`` or ``upsampler: {kind: ...}`` among a teacher's
keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agglo import dist
from agglo.config import build
from agglo.data.mosaic import Tiling, draw_layout, pack, unpack
from agglo.recipe import TeacherEntry
from agglo.teachers.base import Teacher, Vocabulary
from agglo.types import ConfigError, Features
from agglo.upsamplers.base import Upsampler

ENOUGH = 1.25
"""The upsampler is used where the student's grid has more than this many times the teacher's cells per side."""

_PROBES = (64, 224, 1024)
"""Student sizes in pixels at which a teacher's input size is compared."""


def wrap(teacher: Teacher, entry: TeacherEntry, name: str, *, untrained: bool = False) -> Teacher:
    """The teacher, in the wrapper that its entry configures, if any.

    Args:
        teacher: built from the entry.
        entry: the recipe's.
        name: of the teacher, for messages.
        untrained: allow an upsampler without trained weights, for the run that trains it.

    Raises:
        ConfigError: keys that exclude each other, or a teacher that takes images of any size.
    """
    if entry.mosaic and entry.upsampler is not None:
        raise ConfigError(f"teachers.{name}: mosaic and upsampler exclude each other: remove one of them")
    if entry.mosaic:
        if entry.summary_weight != 0:
            raise ConfigError(
                f"teachers.{name}.mosaic: several images share one forward pass, so none has a summary: set "
                "summary_weight: 0"
            )
        return Mosaic(teacher, _only_size(teacher, f"teachers.{name}.mosaic"))
    if entry.upsampler is None:
        return teacher
    where = f"teachers.{name}.upsampler"
    size = _only_size(teacher, where)
    if teacher.spec.spatial is None:
        raise ConfigError(f"{where}: the teacher has no map to upsample: remove `upsampler:`")
    upsampler: Upsampler = build("upsamplers", entry.upsampler, teacher.spec, size, where=where)
    if not untrained and not upsampler.trained:
        raise ConfigError(
            f"{where}: this {entry.upsampler['kind']} is untrained: set `weights:` to the run that trained it (a "
            "recipe with `objective: {kind: upsample}`), or use kind: tiles or bilinear"
        )
    return Upsampled(teacher, upsampler)


class _Wrapper(Teacher):
    """A teacher around another one, with its licence, processor and text tower."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.licence, self.processor = teacher.licence, teacher.processor

    def vocabulary(self) -> Vocabulary | None:
        return self.teacher.vocabulary() if self.spec.summary is not None else None

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.teacher.encode_text(texts) if self.spec.summary is not None else super().encode_text(texts)


class Mosaic(_Wrapper):
    """Packs small views into one input of a teacher with a fixed size, and cuts its map back (docs/method.md, 3.4).

    Each view is scaled so that a teacher cell covers as much of it as a student cell, whatever the student's size. A
    view that fills the input gives the plain forward pass, bit for bit. Uncovered pixels have the teacher's mean
    colour. The layout is drawn per step (:meth:`begin_step`); each process packs its own views.

    Args:
        teacher: takes one size only.
        canvas: that size, ``(H, W)`` in pixels.

    Raises:
        ConfigError: the teacher has no map, or its size is not a whole number of its cells.
    """

    empty: Tensor

    def __init__(self, teacher: Teacher, canvas: tuple[int, int]) -> None:
        super().__init__(teacher)
        cell = teacher.spec.stride
        if teacher.spec.spatial is None or canvas[0] % cell or canvas[1] % cell:
            raise ConfigError(
                f"mosaic: needs a teacher with a map and an input of whole cells; this one has "
                f"{teacher.spec.spatial or 'no'} channels and {canvas[0]}x{canvas[1]} pixels in cells of {cell}"
            )
        self.whole = canvas
        self.cells = canvas[0] // cell, canvas[1] // cell
        self.spec = replace(teacher.spec, summary=None, step=cell, slots=1)
        self.patch, self.native, self.fill = cell, teacher.native, teacher.fill
        self.register_buffer("empty", torch.tensor(teacher.fill), persistent=False)
        self._seed, self._step = 0, 0
        self.eval()

    def begin_step(self, seed: int, step: int) -> None:
        """Set the seed and step that the layout of the next batches is drawn from."""
        self._seed, self._step = seed, step

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """As many cells as the student has for the view, at most the whole input.

        ``r_T = P_T round(r_S / P_S)``: 224 pixels of a student with patches of 16 are 196 of a teacher with 14.
        """
        cell = self.spec.stride
        height, width = (
            min(whole, max(1, round(side / stride))) * cell for side, whole in zip(size, self.cells, strict=True)
        )
        return height, width

    def forward(self, images: Tensor) -> Features:
        """Encode RGB views ``(B, 3, h, w)`` in [0, 1]: whole cells, at most the whole input."""
        cell = self.spec.stride
        height, width = images.shape[-2:]
        if height % cell or width % cell or height > self.whole[0] or width > self.whole[1]:
            raise ConfigError(
                f"views are {height}x{width} pixels; this mosaic takes multiples of {cell} up to "
                f"{self.whole[0]}x{self.whole[1]}"
            )
        tiling = Tiling(self.cells, (height // cell, width // cell))
        layout = draw_layout(tiling, len(images), self._seed, self._step, dist.rank())
        spatial = self.teacher(pack(images, layout, cell, self.empty)).spatial
        return Features(None, unpack(spatial, layout))


class Upsampled(_Wrapper):
    """A teacher of one size with an upsampler: a larger image in, a finer map out; the summary is the small image's.

    Where the student's grid has at most :data:`ENOUGH` times the teacher's cells per side, the teacher runs alone at
    its own size (SigLIP2 at 24 x 24 cells up to 432 pixels; docs/method.md, 3.2). Above, the input has ``factor`` times
    its size and the map ``factor`` times its grid, whatever the student's size.

    Args:
        teacher: takes one size only.
        upsampler: built for it.
    """

    def __init__(self, teacher: Teacher, upsampler: Upsampler) -> None:
        super().__init__(teacher)
        self.upsampler = upsampler
        # A cell of the finer map covers as many pixels of the larger image as a teacher cell of the small one.
        self.spec = replace(teacher.spec, step=upsampler.size[0])
        self.native, self.fill = upsampler.size[0], teacher.fill
        self.eval()

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """The teacher's own size, or ``factor`` times that where the student's grid is finer."""
        upsampler = self.upsampler
        finer = any(side / stride > ENOUGH * cells for side, cells in zip(size, upsampler.grid, strict=True))
        return upsampler.larger if finer else upsampler.size

    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1] of the teacher's size or ``factor`` times that."""
        if tuple(images.shape[-2:]) == self.upsampler.size:
            return self.upsampler.plain(self.teacher, images)
        return self.upsampler(self.teacher, images)


def _only_size(teacher: Teacher, where: str) -> tuple[int, int]:
    """The only size ``(H, W)`` that a teacher takes.

    Raises:
        ConfigError: it takes several.
    """
    sizes: set[Any] = {teacher.input_size((side, side), 16) for side in _PROBES}
    if len(sizes) > 1:
        raise ConfigError(
            f"{where}: this teacher takes images of any size ({min(sizes)[0]} to {max(sizes)[0]} pixels for student "
            f"sizes {_PROBES[0]} to {_PROBES[-1]}): fix its size with `size:`, or remove the key"
        )
    height, width = sizes.pop()
    return height, width
