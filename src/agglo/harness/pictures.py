"""Pictures for the report of results: PCA of a model's maps, and matched points between two views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from agglo.config import build
from agglo.evals.base import SCENES_TEST, Backbone, frozen, input_size
from agglo.evals.correspondence import Frame, View, project, ratio_matches
from agglo.files import write_json
from agglo.preprocess import fit
from agglo.report.page import INDEX
from agglo.report.page import PICTURES as FOLDER
from agglo.report.picture import pca_basis, pca_picture
from agglo.report.visuals import gallery_images, square
from agglo.types import AggloError

SIDE = 224
INPUT = 320
"""Largest side of the model's input, in pixels."""
PAIRS = 3
SHOWN_MATCHES = 40
CORRECT, WRONG = (47, 170, 110), (214, 80, 58)
NEAR = 0.05
"""A match is correct within this share of the image's longer side from the true point."""


def paint(model: Backbone, model_hash: str, folder: Path) -> Path | None:
    """Write WebP files and their ``index.json`` to ``folder/pictures/<model hash>/``.

    Returns:
        The folder; None for a model without a spatial map.
    """
    if model.spec.spatial is None:
        return None
    target = folder / FOLDER / model_hash
    if (target / INDEX).is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"pca": _gallery(model, target), "matches": _matches(model, target)}
    write_json(target / INDEX, index)
    return target


def _gallery(model: Backbone, target: Path) -> list[dict[str, str]]:
    images = gallery_images(None)
    if not images:
        return []
    side = min(INPUT, 2 * int(getattr(model, "preferred_size", INPUT)))
    size = input_size(model, side)
    maps = [_map(model, square(image, side), size) for _, image in images]
    basis = pca_basis(maps)
    rows = []
    for number, ((name, image), seen) in enumerate(zip(images, maps, strict=True)):
        files = {"image": f"image-{number}.webp", "seen": f"pca-{number}.webp"}
        square(image, SIDE).save(target / files["image"], "WEBP", quality=82)
        pca_picture(seen, basis, (SIDE, SIDE)).save(target / files["seen"], "WEBP", quality=88)
        rows.append({"name": name, **files})
    return rows


def _matches(model: Backbone, target: Path) -> list[dict[str, Any]]:
    """Pairs of ``scenes`` with the most certain matches: green if correct, else red."""
    try:
        source = build("sources", SCENES_TEST)
        pairs = source.pairs()
    except AggloError:  # the archive is not installed
        return []
    size, rows = input_size(model, INPUT), []
    for number, pair in enumerate(pairs[:: max(1, len(pairs) // PAIRS)][:PAIRS]):
        images = [source.read(i) for i in (pair.first, pair.second)]
        known = [source.annotation(i) for i in (pair.first, pair.second)]
        views = [View(_map(model, image, size), Frame.of((image.height, image.width), size, 0.25)) for image in images]
        a, b, right = _found(views[0], views[1], known)
        name = target / f"pair-{number}.webp"
        _drawn(images, a, b, right).save(name, "WEBP", quality=85)
        rows.append({"name": source.name(pair.first), "file": name.name, "right": float(right.float().mean())})
    return rows


def _map(model: Backbone, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    with frozen(model):
        spatial = model(fit(image, size)[None]).spatial
    if spatial is None:
        raise ValueError("the model has a spatial spec but returned no map")
    return spatial[0].float().cpu()


def _found(one: View, two: View, known: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The most certain matches of points on objects: ``(x, y)`` in both images, and whether each is correct."""
    points = one.frame.points()
    column, row = points.long().unbind(1)
    instances, depth = (torch.as_tensor(known[0].instances)[row, column], torch.as_tensor(known[0].depth)[row, column])
    keep = (instances > 0).nonzero()[:, 0]
    a, b = ratio_matches(one.on_grid()[keep], two.on_grid(), SHOWN_MATCHES)
    first, second = points[keep][a], two.frame.points()[b]
    rays = torch.cat((first, torch.ones(len(first), 1, dtype=first.dtype)), 1)
    camera = rays @ torch.linalg.inv(torch.as_tensor(known[0].K)).T * depth[keep][a].double()[:, None]
    pose = torch.as_tensor(known[0].cam_from_world)
    truth = project((camera - pose[:3, 3]) @ pose[:3, :3], known[1])
    right = torch.linalg.vector_norm(truth - second, dim=1) < NEAR * max(two.frame.full)
    return first, second, right


def _drawn(images: list[Image.Image], a: torch.Tensor, b: torch.Tensor, right: torch.Tensor) -> Image.Image:
    width, height, gap = images[0].width + images[1].width + 8, max(i.height for i in images), images[0].width + 8
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    sheet.paste(images[0], (0, 0))
    sheet.paste(images[1], (gap, 0))
    draw = ImageDraw.Draw(sheet)
    for (x0, y0), (x1, y1), good in zip(a.tolist(), b.tolist(), right.tolist(), strict=True):
        draw.line((x0, y0, x1 + gap, y1), fill=CORRECT if good else WRONG, width=1)
    return sheet
