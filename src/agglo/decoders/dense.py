"""Masks without a segmentation decoder: text embeddings against the text-aligned map of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from agglo.model.cells import text_cells
from agglo.model.model import Model
from agglo.preprocess import aspect_size, fit
from agglo.types import ConfigError


class Cells(NamedTuple):
    """An image's vectors by cell: ``text`` ``(1, E, h, w)`` of unit norm, and spatial features ``(1, D, h', w')``."""

    text: Tensor
    spatial: Tensor | None


def text_scores(
    model: Model,
    image: Image.Image,
    texts: Sequence[str],
    *,
    size: int | None = None,
    head: str | None = None,
    slide: int | None = None,
    outliers: float | None = None,
    affinity: float | None = 0.1,
    centre: float = 0.5,
) -> Tensor:
    """Similarity of every pixel with every text: :func:`image_cells`, then :func:`cell_scores`, upsampled bilinearly.

    Args:
        model: with a text-aligned head that applies to cells.
        image: of any size.
        texts: at least one; with one text the texts are not centred.
        size: longer side of the input in pixels; None for twice the preferred size.
        head: the text-aligned head; None for the first.
        slide: side of sliding windows in pixels; None for one pass.
        outliers: see :func:`without_outliers`.
        affinity: see :func:`cell_scores`.
        centre: see :func:`cell_scores`.

    Returns:
        ``(K, H, W)`` float32 cosines in [-1, 1] at the size of the image.

    Raises:
        TypeError: the model has no text tower.
        ConfigError: its head cannot be applied to cells.
    """
    cells = image_cells(model, image, size=size, head=head, slide=slide)
    bank = model.encode_text(list(texts), head).float()
    scores = cell_scores(cells, bank, outliers=outliers, affinity=affinity, centre=centre)
    return F.interpolate(scores, size=(image.height, image.width), mode="bilinear", align_corners=False)[0]


def image_cells(
    model: Model, image: Image.Image, *, size: int | None = None, head: str | None = None, slide: int | None = None
) -> Cells:
    """The text-aligned vectors of an image's cells (:func:`text_cells`), and the spatial features.

    With ``slide`` the scaled image is encoded in square windows that overlap by a third or more, and the vectors of
    overlapping windows are averaged: the model sees windows of the size that it was trained on.

    Args:
        model: with a text-aligned head that applies to cells.
        image: of any size.
        size: longer side of the input in pixels; None for twice the preferred size.
        head: the text-aligned head; None for the first.
        slide: side of the windows in pixels, snapped to a legal size; the image's own side where that is smaller.

    Raises:
        TypeError: the model has no text tower.
        ConfigError: its head cannot be applied to cells, or ``slide`` is not positive.
    """
    if slide is not None and slide < 1:
        raise ConfigError(f"slide: {slide} is not a positive number of pixels; use None for one pass")
    longest, step = size or 2 * model.preferred_size, model.step()
    view = aspect_size((image.height, image.width), (longest, longest), step, inside=True)
    pixels = fit(image, view, "stretch")[None].to(next(model.parameters()).device)
    if slide is None:
        out, cells = text_cells(model, pixels, head)
        return Cells(cells, None if out.spatial is None else out.spatial.float())
    side = max(step, slide // step * step)
    rows, columns = (_starts(extent, side, step) for extent in view)
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for top in rows:
        for left in columns:
            out, cells = text_cells(model, pixels[..., top : top + side, left : left + side], head)
            maps = [cells] if out.spatial is None else [cells, out.spatial.float()]
            if not sums:
                height, width = min(side, view[0]), min(side, view[1])
                grids = [(each.shape[-2] * view[0] // height, each.shape[-1] * view[1] // width) for each in maps]
                sums = [each.new_zeros(1, each.shape[1], *grid) for each, grid in zip(maps, grids, strict=True)]
                counts = [each.new_zeros(grid) for each, grid in zip(maps, grids, strict=True)]
            for each, total, count in zip(maps, sums, counts, strict=True):
                y, x = top * total.shape[-2] // view[0], left * total.shape[-1] // view[1]
                part = (..., slice(y, y + each.shape[-2]), slice(x, x + each.shape[-1]))
                total[part] += each
                count[part] += 1
    text, *spatial = (total / count for total, count in zip(sums, counts, strict=True))
    return Cells(F.normalize(text, dim=1), spatial[0] if spatial else None)


def _starts(extent: int, side: int, step: int) -> list[int]:
    """Starts of windows of ``side`` that cover ``extent``, at most two thirds of a side apart, on multiples of step."""
    if extent <= side:
        return [0]
    stride = max(step, side * 2 // 3 // step * step)
    return [*range(0, extent - side, stride), extent - side]


def cell_scores(
    cells: Cells,
    bank: Tensor,
    *,
    outliers: float | None = None,
    affinity: float | None = 0.1,
    centre: float = 0.5,
) -> Tensor:
    """Similarity of every cell with every text, by training-free steps.

    Outlier tokens are replaced first (:func:`without_outliers`). Each cell's vector becomes the mean of all cells'
    vectors, weighted by ``softmax(cos(f_i, f_j) / affinity)`` of the centred spatial features ``f``: cells of one
    object get one vector. Then ``centre`` times the mean vector of the image is subtracted, which removes what all
    cells share, and the texts are centred by their own mean.

    Args:
        cells: of one image.
        bank: ``(K, E)`` text embeddings of unit norm; one text is not centred.
        outliers: see :func:`without_outliers`; None to keep all tokens.
        affinity: temperature of the weights; None to leave the vectors as they are.
        centre: in [0, 1]; 0 for plain cosines.

    Returns:
        ``(1, K, h, w)`` float32 cosines in [-1, 1].
    """
    found, spatial = cells
    if outliers is not None and spatial is not None:
        found, spatial = without_outliers(found, spatial, outliers)
    if affinity is not None and spatial is not None:
        found = by_affinity(found, spatial, affinity)
    found = F.normalize(found, dim=1)
    if centre and len(bank) > 1:
        found = F.normalize(found - centre * found.mean((2, 3), keepdim=True), dim=1)
        bank = F.normalize(bank - bank.mean(0), dim=1)
    return torch.einsum("ke,behw->bkhw", bank, found)


def without_outliers(cells: Tensor, spatial: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Replace tokens of outlying norm, which hold global information, by the mean of their neighbours.

    Vision transformers without enough registers keep global information in a few background tokens of large norm
    (Darcet et al. 2024, arXiv:2309.16588). A token is an outlier if the norm of its spatial features exceeds the median
    by ``limit`` times 1.4826 times the median absolute deviation; it gets the mean of its neighbours (3 x 3) that are
    none, and keeps its value if there are none.

    Args:
        cells: ``(1, E, h, w)``, resized bilinearly to the grid of ``spatial``.
        spatial: ``(1, D, h', w')``.
        limit: in robust standard deviations, e.g. 5.

    Returns:
        Both on the grid of ``spatial``.

    Raises:
        ConfigError: the limit is not positive.
    """
    if not limit > 0:
        raise ConfigError(f"outliers: {limit} is not positive; use None to keep all tokens")
    cells = F.interpolate(cells, size=spatial.shape[-2:], mode="bilinear", align_corners=False)
    norms = spatial.norm(dim=1, keepdim=True)
    middle = norms.median()
    kept = norms <= middle + limit * 1.4826 * (norms - middle).abs().median()
    weights = F.avg_pool2d(kept.float(), 3, 1, 1)
    usable = kept | (weights == 0)

    def fill(values: Tensor) -> Tensor:
        around = F.avg_pool2d(values * kept, 3, 1, 1) / weights.clamp_min(1e-6)
        return torch.where(usable, values, around)

    return fill(cells), fill(spatial)


def by_affinity(cells: Tensor, spatial: Tensor, temperature: float) -> Tensor:
    """Average vectors over cells with similar spatial features.

    Args:
        cells: ``(1, E, h, w)``, resized bilinearly to the grid of ``spatial``.
        spatial: ``(1, D, h', w')``.
        temperature: of the softmax over cosines; towards 0 each cell keeps its own vector.

    Returns:
        ``(1, E, h', w')``.

    Raises:
        ConfigError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"affinity: {temperature} is not positive; use None to leave the vectors as they are")
    grid = spatial.shape[-2:]
    vectors = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False).flatten(2)[0]
    features = spatial.flatten(2)[0].T
    features = F.normalize(features - features.mean(0), dim=1)
    weights = torch.softmax(features @ features.T / temperature, 1)
    return (vectors @ weights.T).unflatten(1, grid)[None]


def shares(scores: Tensor, temperature: float = 0.1) -> Tensor:
    """Probability of each text at each pixel: the softmax over texts of ``(K, H, W)`` scores."""
    return torch.softmax(scores / temperature, 0)
