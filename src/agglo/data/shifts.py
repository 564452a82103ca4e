"""Crops of one rendered batch, shifted against each other by whole patches (docs/method.md, 2.4 and 6.3).

The loader renders images with a margin around the field of view. Each view of a step (the student's, each teacher's,
the EMA student's) is a crop at an independent offset from the centre: ``round(N(0, std))`` of *its own* patches, per
axis and sample. No shift is rejected, no padding is visible, and views whose patches show equal content differ by whole
cells.
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
"""Random stream (:func:`agglo.data.views.generator`) of shifts."""


@dataclass(frozen=True)
class RenderedBatch:
    """A batch's rendered images, with a margin around the field of view.

    Args:
        images: ``(B, 3, H, W)``.
        field: central share ``(h, w)`` of each side that a view covers; (1, 1) without a margin.
    """

    images: Tensor
    field: tuple[float, float]

    def crop(self, size: tuple[int, int], cell: float, shifts: Tensor) -> tuple[Tensor, Placement]:
        """Resize the images to the scale of a view and crop each sample at its own offset.

        Args:
            size: ``(h, w)`` of the view in pixels.
            cell: pixels per unit of shift: the view's patch size.
            shifts: ``(B, 2)`` integers ``(y, x)``.

        Returns:
            ``(B, 3, h, w)``, and the placement of its pixels in the rendered image (side length 1), for
            :meth:`Placement.on`.
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
        # Common unit of all views of a step: the rendered image has side 1.
        unit = [1 / outer[0], 1 / outer[1]]
        start = corner.double() * torch.tensor(unit, dtype=torch.float64)
        return images, Placement(start, (unit[0], unit[1]), size)


def max_shift(std: float) -> int:
    """Maximum shift in patches, which also sets the margin: five standard deviations (2 for 0.5, 0 for 0).

    Only one draw in 1.7 million would exceed it, so clipped draws do not accumulate at the maximum.
    """
    return max(2, math.ceil(5 * std - 0.5)) if std > 0 else 0


def draw_shifts(seed: int, step: int, view: int, batch: int, std: float) -> Tensor:
    """Shifts ``(B, 2)`` in patches, ``(y, x)``: ``round(N(0, std))``, clipped to ±:func:`max_shift`.

    A pure function of its arguments.

    Args:
        seed: seed of the run.
        step: the step.
        view: index of the view; each has independent shifts.
        batch: number of samples.
        std: standard deviation in patches; 0.5 in C-RADIOv4.
    """
    if std <= 0:
        return torch.zeros(batch, 2, dtype=torch.long)
    drawn = generator(seed, step, view, _SHIFTS).normal(0.0, std, (batch, 2))
    return torch.from_numpy(np.rint(drawn).clip(-max_shift(std), max_shift(std))).long()
