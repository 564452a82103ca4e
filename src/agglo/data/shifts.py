"""Crops of one canvas, shifted against each other by whole patches (METHOD 2.4, 6.3).

The loader renders a canvas with a margin around what a view shows. Every view of a step (the student's, each
teacher's, the averaged student's) is a crop of that canvas at a place of its own: ``round(N(0, std))`` of *its own*
patches from the middle, each axis and sample by itself. No shift is rejected, no padding is seen, and views whose
patches show equal content differ by whole cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agglo.data.views import generator
from agglo.nn.placement import Placement
from agglo.preprocess import resize

_SHIFTS = 4
"""The stream of random numbers (:func:`agglo.data.views.generator`), apart from those of views and mixing."""


@dataclass(frozen=True)
class RenderedBatch:
    """A batch's images with a margin, and where the view lies in them.

    Args:
        images: ``(B, 3, H, W)``; the field of view is the middle ``field`` of it.
        field: ``(h, w)``, share of each side that a view shows; (1, 1) where there is no margin.
    """

    images: Tensor
    field: tuple[float, float]

    def crop(self, size: tuple[int, int], cell: float, shifts: Tensor) -> tuple[Tensor, Placement]:
        """A view: the canvas at the view's scale, cropped at a place of each sample's own.

        Args:
            size: ``(h, w)`` of the view in pixels.
            cell: pixels of the view a shift of 1 moves it by: its own patch.
            shifts: ``(B, 2)`` whole numbers ``(y, x)``.

        Returns:
            ``(B, 3, h, w)``, and where its pixels lie on the canvas, whose sides count as 1; the grid is that of
            pixels, for :meth:`Placement.on`.
        """
        outer = [max(side, round(side / share)) for side, share in zip(size, self.field, strict=True)]
        scaled = resize(self.images, (outer[0], outer[1]))
        middle = torch.tensor([(outer[axis] - size[axis]) // 2 for axis in (0, 1)])
        room = torch.tensor([outer[axis] - size[axis] for axis in (0, 1)])
        corner = (middle + (shifts * cell).round().long()).clamp(min=torch.zeros(2).long(), max=room)
        if bool((corner == corner[:1]).all()):
            y, x = corner[0].tolist()
            images = scaled[:, :, y : y + size[0], x : x + size[1]]
        else:
            images = torch.stack(
                [scaled[i, :, y : y + size[0], x : x + size[1]] for i, (y, x) in enumerate(corner.tolist())]
            )
        # One unit for all views of a step: the whole canvas has side 1.
        unit = [1 / outer[0], 1 / outer[1]]
        start = corner.double() * torch.tensor(unit, dtype=torch.float64)
        return images, Placement(start, (unit[0], unit[1]), size)


def max_shift(std: float) -> int:
    """How many patches a shift of such a deviation is cut off at: 2 at the usual 0.5, 0 at 0.

    Five deviations, so that one in 1.7 million would go further, and none piles up at the end. The margin of a canvas
    is as large.
    """
    return max(2, math.ceil(5 * std - 0.5)) if std > 0 else 0


def draw_shifts(seed: int, step: int, view: int, batch: int, std: float) -> Tensor:
    """Shifts ``(B, 2)`` in patches, ``(y, x)``: ``round(N(0, std))``, at most :func:`max_shift` either way.

    A pure function of its arguments; ``std`` 0 gives zeros.

    Args:
        seed: of the run.
        step: the step.
        view: number of the view; views differ.
        batch: samples.
        std: deviation in patches; 0.5 in C-RADIOv4.
    """
    if std <= 0:
        return torch.zeros(batch, 2, dtype=torch.long)
    drawn = generator(seed, step, view, _SHIFTS).normal(0.0, std, (batch, 2))
    return torch.from_numpy(np.rint(drawn).clip(-max_shift(std), max_shift(std))).long()
