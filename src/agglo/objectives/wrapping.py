"""Teachers of one size, shown more: many small views at a time (``mosaic``), or a larger image (``upsampler``).

Both wrappers are teachers themselves, so nothing that teaches knows of them: a recipe writes ``mosaic: true`` or
``upsampler: {kind: ...}`` beside a teacher's own keys.
"""

from __future__ import annotations

from collections.abc import Iterable
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
"""An upsampler steps in where the student's grid has more than so many times the teacher's own cells a side."""

_PROBES = (64, 224, 1024)


def wrap(teacher: Teacher, entry: TeacherEntry, name: str, *, untrained: bool = False) -> Teacher:
    """The teacher as the recipe wants it: as it is, or in one of the wrappers of this page.

    Args:
        teacher: the entry's kind.
        entry: the recipe's.
        name: of the teacher, for messages.
        untrained: allow an upsampler that has not learned anything yet, because it is about to.

    Raises:
        ConfigError: the keys do not go together, or the teacher has no size of its own.
    """
    if entry.mosaic and entry.upsampler is not None:
        raise ConfigError(f"teachers.{name}: mosaic packs small views, upsampler looks at large ones: keep one of them")
    if entry.mosaic:
        if entry.summary_weight != 0:
            raise ConfigError(
                f"teachers.{name}.mosaic: the images of a canvas share one forward pass, so that none has a summary of "
                "its own: set summary_weight: 0"
            )
        return Mosaic(teacher, _only_size(teacher, f"teachers.{name}.mosaic"))
    if entry.upsampler is None:
        return teacher
    where = f"teachers.{name}.upsampler"
    size = _only_size(teacher, where)
    if teacher.spec.spatial is None:
        raise ConfigError(f"{where}: the teacher has no map to make finer: leave `upsampler:` out")
    upsampler: Upsampler = build("upsamplers", entry.upsampler, teacher.spec, size, where=where)
    if not untrained and not upsampler.trained:
        raise ConfigError(
            f"{where}: this {entry.upsampler['kind']} has learned nothing yet: name the run that trained it in "
            "`weights:` (a recipe with `objective: {kind: upsample}` makes one), or use kind: tiles or bilinear"
        )
    return Upsampled(teacher, upsampler)


def begin_step(teachers: Iterable[Teacher], seed: int, step: int) -> None:
    """Tell teachers whose view of a batch is random which step it is."""
    for teacher in teachers:
        if isinstance(teacher, Mosaic):
            teacher.begin_step(seed, step)


class _Wrapper(Teacher):
    """What both have: the teacher inside, its licence, its processor, and its language."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.licence, self.processor = teacher.licence, teacher.processor

    def vocabulary(self) -> Vocabulary | None:
        return self.teacher.vocabulary() if self.spec.summary is not None else None

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.teacher.encode_text(texts) if self.spec.summary is not None else super().encode_text(texts)


class Mosaic(_Wrapper):
    """A teacher of one size that is shown canvases of many small views, and cut back to one map a view (METHOD 3.4).

    It sees each view at the scale at which one of its cells is one of the student's, whatever the student's size. A
    view that fills the canvas is the plain pass, bit for bit. What no view covers has the teacher's mean colour. Tiles
    and places in them belong to the step (:meth:`begin_step`). Where several processes train, each packs its own views.

    Args:
        teacher: has one size only.
        canvas: that size, ``(H, W)`` in pixels.

    Raises:
        ConfigError: the teacher has no map, or its size is no whole number of its cells.
    """

    empty: Tensor

    def __init__(self, teacher: Teacher, canvas: tuple[int, int]) -> None:
        super().__init__(teacher)
        cell = teacher.spec.stride
        if teacher.spec.spatial is None or canvas[0] % cell or canvas[1] % cell:
            raise ConfigError(
                f"mosaic: a teacher with a map on a canvas of whole cells is needed; this one has "
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
        """Which step of which run the next batches belong to: tiles and places are a pure function of both."""
        self._seed, self._step = seed, step

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """As many of the teacher's cells as the student has of its own, at most the whole canvas.

        ``r_T = P_T round(r_S / P_S)``: 224 pixels of a student with patches of 16 are 196 of a teacher with 14.
        """
        cell = self.spec.stride
        height, width = (
            min(whole, max(1, round(side / stride))) * cell for side, whole in zip(size, self.cells, strict=True)
        )
        return height, width

    def forward(self, images: Tensor) -> Features:
        """Encode RGB views ``(B, 3, h, w)`` in [0, 1] of whole cells, no larger than the canvas."""
        cell = self.spec.stride
        height, width = images.shape[-2:]
        if height % cell or width % cell or height > self.whole[0] or width > self.whole[1]:
            raise ConfigError(
                f"views are {height}x{width}, but this mosaic takes multiples of {cell} pixels up to "
                f"{self.whole[0]}x{self.whole[1]}"
            )
        tiling = Tiling(self.cells, (height // cell, width // cell))
        places = draw_layout(tiling, len(images), self._seed, self._step, dist.rank())
        spatial = self.teacher(pack(images, places, cell, self.empty)).spatial
        return Features(None, unpack(spatial, places))


class Upsampled(_Wrapper):
    """A teacher of one size with an upsampler: a larger image in, a finer map out; the summary is the small image's.

    A student whose grid is not finer than :data:`ENOUGH` times the teacher's own gets the plain pass at the teacher's
    size (METHOD 3.2: 432 pixels and less meet SigLIP2 at 24 x 24 cells); above that the teacher looks at
    ``factor`` times its size and answers on ``factor`` times its grid, whatever the student's size.

    Args:
        teacher: has one size only.
        upsampler: made for it.
    """

    def __init__(self, teacher: Teacher, upsampler: Upsampler) -> None:
        super().__init__(teacher)
        self.upsampler = upsampler
        # Cells of the finer map cover as many pixels of the larger image as those of the teacher's of its own.
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
    """The one size a teacher sees square views at.

    Raises:
        ConfigError: it has none.
    """
    sizes: set[Any] = {teacher.input_size((side, side), 16) for side in _PROBES}
    if len(sizes) > 1:
        raise ConfigError(
            f"{where}: this teacher takes images of any size (shown a student's {_PROBES[0]} and {_PROBES[-1]} pixels "
            f"it wants {min(sizes)[0]} and {max(sizes)[0]}): fix it with `size:`, or leave the key out"
        )
    height, width = sizes.pop()
    return height, width
