"""Histograms of oriented gradients: a dense-only teacher without weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from agglo.teachers.base import Teacher, check_images
from agglo.types import ConfigError, Features, FeatureSpec


class Hog(Teacher):
    """Histograms of oriented gradients: edges and their directions, no weights, no summary.

    Per pixel, the central difference ``g = (dx, dy) / 2`` of the RGB channel with the longest gradient (replicated
    borders). Its length is shared between the two nearest of K unsigned orientation bins centred at ``k pi / K``: bin k
    gets ``|g| max(0, 1 - d(theta K / pi, k))`` with d the distance on a circle of K bins. The mean over a cell is its
    histogram h, normalised over the 3x3 cells around it: ``v = h / sqrt(mean_{3x3} ||h||^2 + eps^2)``. A group of
    ``group x group`` cells is stacked into one output cell, channel ``k group^2 + row group + column``. (Dalal and
    Triggs 2005, CVPR; as a target: Wei et al. 2022, "MaskFeat", arXiv:2112.09133.)

    Args:
        cell: side of a histogram cell in pixels.
        orientations: K, bins over 180 degrees.
        group: cells per side of one output cell: stride ``cell * group``, channels ``orientations * group**2``.
        epsilon: gradient length below which contrast is not amplified, in intensities per pixel.

    Raises:
        ConfigError: a key is out of range.
    """

    licence = "Apache-2.0"

    def __init__(self, *, cell: int = 8, orientations: int = 9, group: int = 2, epsilon: float = 0.01) -> None:
        super().__init__()
        if cell < 1 or group < 1 or orientations < 2:
            raise ConfigError(
                f"teachers.hog: needs cell >= 1, group >= 1, orientations >= 2; got {cell}, {group}, {orientations}"
            )
        if not epsilon > 0:
            raise ConfigError(f"teachers.hog: epsilon must be positive, got {epsilon}")
        self.cell, self.orientations, self.group, self.epsilon = cell, orientations, group, epsilon
        stride = cell * group
        self.spec = FeatureSpec(summary=None, spatial=orientations * group**2, stride=stride, step=stride)
        self.eval()

    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1] to ``(B, K group^2, H / stride, W / stride)``, values >= 0."""
        check_images(images, self.spec.step)
        histogram = self._histograms(*self._gradients(images))
        energy = histogram.square().sum(1, keepdim=True)
        # At the border the mean covers existing cells only, so that edges are not brighter there.
        around = F.avg_pool2d(energy, 3, stride=1, padding=1, count_include_pad=False)
        return Features(None, F.pixel_unshuffle(histogram / (around + self.epsilon**2).sqrt(), self.group))

    def _gradients(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Length and orientation (in bins, [0, K]) of the strongest channel's gradient, each ``(B, 1, H, W)``."""
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
        dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
        squared, strongest = (dx.square() + dy.square()).max(1, keepdim=True)
        dx, dy = dx.gather(1, strongest), dy.gather(1, strongest)
        angle = torch.atan2(dy, dx) * (self.orientations / math.pi)
        return squared.sqrt(), angle.remainder(self.orientations)

    def _histograms(self, length: Tensor, position: Tensor) -> Tensor:
        """Mean gradient length per cell and orientation bin, ``(B, K, H / cell, W / cell)``."""
        half = self.orientations / 2
        bins = []
        for k in range(self.orientations):  # one bin at a time: K full-size maps of a large batch need too much memory
            distance = ((position - k + half).remainder(self.orientations) - half).abs()
            bins.append(F.avg_pool2d(length * (1 - distance).clamp_min(0), self.cell))
        return torch.cat(bins, 1)
