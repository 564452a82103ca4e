"""Masks without a segmentation decoder: text embeddings against the text-aligned map of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from agglo.model.cells import text_cells
from agglo.model.model import Model
from agglo.preprocess import aspect_size, fit
from agglo.types import ConfigError


def text_scores(
    model: Model,
    image: Image.Image,
    texts: Sequence[str],
    *,
    size: int | None = None,
    head: str | None = None,
    affinity: float | None = 0.1,
    centre: float = 0.5,
) -> Tensor:
    """Similarity of every pixel with every text, by two training-free steps on the map of :func:`text_cells`.

    Each cell's vector becomes the mean of all cells' vectors, weighted by ``softmax(cos(f_i, f_j) / affinity)`` of the
    centred spatial features ``f``: cells of one object get one vector. Then ``centre`` times the mean vector of the
    image is subtracted, which removes what all cells share, and the texts are centred by their own mean.

    Args:
        model: with a text-aligned head that applies to cells.
        image: of any size.
        texts: at least one; with one text the texts are not centred.
        size: longer side of the input in pixels; None for twice the preferred size.
        head: the text-aligned head; None for the first.
        affinity: temperature of the weights; None to leave the vectors as they are.
        centre: in [0, 1]; 0 for plain cosines.

    Returns:
        ``(K, H, W)`` float32 cosines in [-1, 1], upsampled bilinearly to the image.

    Raises:
        TypeError: the model has no text tower.
        ConfigError: its head cannot be applied to cells.
    """
    longest = size or 2 * model.preferred_size
    view = aspect_size((image.height, image.width), (longest, longest), model.step(), inside=True)
    pixels = fit(image, view, "stretch")[None].to(next(model.parameters()).device)
    out, cells = text_cells(model, pixels, head)
    bank = model.encode_text(list(texts), head).float()
    if affinity is not None and out.spatial is not None:
        cells = by_affinity(cells, out.spatial.float(), affinity)
    cells = F.normalize(cells, dim=1)
    if centre and len(texts) > 1:
        cells = F.normalize(cells - centre * cells.mean((2, 3), keepdim=True), dim=1)
        bank = F.normalize(bank - bank.mean(0), dim=1)
    scores = torch.einsum("ke,behw->bkhw", bank, cells)
    return F.interpolate(scores, size=(image.height, image.width), mode="bilinear", align_corners=False)[0]


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
