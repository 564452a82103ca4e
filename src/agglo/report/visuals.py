"""Pictures made with the models of a run: PCA of their spatial maps, and photos ranked by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from agglo.config import build
from agglo.model.model import Model
from agglo.preprocess import crop, fit, nearest_size
from agglo.recipe import Recipe
from agglo.report.picture import pca_basis, pca_picture
from agglo.sources.base import Source
from agglo.teachers.base import Teacher
from agglo.types import AggloError

PIXELS = 320
"""Largest input side for the gallery; smaller for models trained at less than half of it."""
SHOWN = 224
"""Side of a picture in the page, which stays below 3 MB."""
THUMB = 176
IMITATED = 3
"""Number of teachers up to which the student's head is shown beside each of them."""
FAVOURITES = ("chelsea", "coffee", "motorcycle_left", "astronaut", "flower", "rocket")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the gallery: ``title``, a ``note`` under it, and one picture per row (None if there is none)."""

    title: str
    note: str
    pictures: list[Image.Image | None]


@dataclass(frozen=True, slots=True)
class Gallery:
    """PCA pictures: the images' names, and columns whose first is the images themselves."""

    names: list[str]
    columns: list[Column]


@dataclass(frozen=True, slots=True)
class Hit:
    """One photo of a ranking."""

    name: str
    thumb: Image.Image
    score: float
    right: bool


@dataclass(frozen=True, slots=True)
class Query:
    """A text, its best photos, and the rank (from 1) of the right photo for the student and the untrained student."""

    text: str
    hits: list[Hit]
    rank: int
    rank_before: int | None


@dataclass(frozen=True, slots=True)
class Search:
    """Text search over held-out photos."""

    queries: list[Query]
    photos: int
    head: str

    @property
    def found(self) -> int:
        """Queries whose right photo comes first."""
        return sum(query.rank == 1 for query in self.queries)

    @property
    def found_before(self) -> int | None:
        """The same for the untrained student; None without it."""
        ranks = [query.rank_before for query in self.queries]
        return None if any(rank is None for rank in ranks) else sum(rank == 1 for rank in ranks)


@dataclass(slots=True)
class Models:
    """The models of a run; each may be missing."""

    student: Model | None = None
    untrained: Model | None = None
    teachers: Mapping[str, Teacher] = field(default_factory=dict)


def square(image: Image.Image, side: int) -> Image.Image:
    """The central square of an image, resampled to ``side`` pixels, for display; models get :func:`fit`."""
    return crop(image.convert("RGB"), (side, side))


def gallery_images(recipe: Recipe | None, count: int = 6) -> list[tuple[str, Image.Image]]:
    """Held-out images, half photos and half scenes; if neither is installed, images of the recipe's sources.

    Returns:
        Up to ``count`` pairs of name and image; empty if no source can be opened.
    """
    photos, scenes = _open({"kind": "photos", "split": "heldout"}), _open({"kind": "scenes", "split": "test"})
    found: list[tuple[str, Image.Image]] = []
    if photos is not None:
        names = {photos.name(i).rpartition("/")[2]: i for i in range(len(photos))}
        order = [names[name] for name in FAVOURITES if name in names]
        order += [i for i in range(len(photos)) if i not in order]
        found += _read(photos, order, count - count // 2 if scenes is not None else count)
    if scenes is not None:
        found += _read(scenes, _spread(len(scenes), count - len(found)), count - len(found))
    for entry in recipe.data.sources if recipe is not None and not found else []:
        source = _open(entry.source)
        if source is not None and len(found) < count:
            found += _read(source, _spread(len(source), count - len(found)), count - len(found))
    return found


def _open(options: Mapping[str, Any]) -> Source | None:
    try:
        source = build("sources", options)
        return source if len(source) else None  # opens a bundled archive, which may be missing
    except AggloError:  # not installed
        return None


def _spread(length: int, count: int) -> list[int]:
    return sorted({i * length // max(1, count) for i in range(count)}) if length else []


def _read(source: Source, order: Sequence[int], count: int) -> list[tuple[str, Image.Image]]:
    found: list[tuple[str, Image.Image]] = []
    for index in order:
        if len(found) == count:
            break
        try:
            found.append((source.name(index), source.read(index)))
        except AggloError:
            continue
    return found


@torch.inference_mode()
def gallery(models: Models, recipe: Recipe | None, images: Sequence[tuple[str, Image.Image]]) -> Gallery:
    """Images beside the PCA pictures of every model's spatial map; one basis per column, fitted over all images.

    The output of the student's head for a teacher stands beside the teacher, in the teacher's basis: equal colours
    mean equal features.

    Raises:
        ValueError: no image, or no model with a spatial map.
    """
    if not images:
        raise ValueError("no image source could be opened")
    names = [name for name, _ in images]
    columns = [Column("image", "", [square(image, SHOWN) for _, image in images])]
    guide = models.student or models.untrained
    side = PIXELS if guide is None else _legal(guide, min(PIXELS, 2 * guide.preferred_size))
    stride = 16 if guide is None else guide.spec.stride
    batch = _batch(images, (side, side))
    wanted = _dense_teachers(models, recipe)
    outputs: dict[str, Tensor] = {}
    for title, note, model in (
        ("untrained", "before step 0", models.untrained),
        ("student", "after training", models.student),
    ):
        if model is None or model.spec.spatial is None:
            continue
        heads = [name for name in wanted if name in model.heads] if model is models.student else []
        output = model(batch, heads=heads)
        columns.append(_column(title, note, output.spatial))
        outputs |= {name: f.spatial for name, f in output.heads.items() if f.spatial is not None}
    for name in wanted:
        teacher = models.teachers[name]
        spatial = teacher(_batch(images, teacher.input_size((side, side), stride))).spatial
        columns.append(_column(name, "teacher", spatial))
        if name in outputs and len(wanted) <= IMITATED:
            columns.append(_column(f"student as {name}", "in the same basis", outputs[name], basis=spatial))
    if len(columns) == 1:
        raise ValueError("no student and no teacher with a spatial map")
    return Gallery(names, columns)


def _batch(images: Sequence[tuple[str, Image.Image]], size: tuple[int, int]) -> Tensor:
    return torch.stack([fit(image, size) for _, image in images])


def _dense_teachers(models: Models, recipe: Recipe | None) -> list[str]:
    off = {name for name, entry in recipe.teachers.items() if entry.spatial_weight == 0} if recipe else set()
    return [name for name, t in models.teachers.items() if t.spec.spatial is not None and name not in off]


def _column(title: str, note: str, maps: Tensor | None, *, basis: Tensor | None = None) -> Column:
    if maps is None:
        raise ValueError(f"{title} returned no spatial map")
    fitted = pca_basis(list(maps if basis is None else basis))
    return Column(title, note, [pca_picture(one, fitted, (SHOWN, SHOWN)) for one in maps])


@torch.inference_mode()
def search(models: Models, recipe: Recipe | None, *, top: int = 3, limit: int = 12) -> Search:
    """Rank the held-out photos by text, as ``agglo search`` does: cosine of the text and the image embedding.

    Args:
        models: the student, and the untrained one for comparison.
        recipe: its ``retrieval`` eval, if any, gives the input size and the template.
        top: number of photos kept per text.
        limit: number of texts.

    Raises:
        TypeError: the student has no text-aligned head.
        AggloError: the photos are not installed.
    """
    if models.student is None:
        raise ValueError("the run folder has no trained model")
    head = models.student.text_head()
    photos = build("sources", {"kind": "photos", "split": "heldout"})
    queried = [photos.query(i) for i in range(len(photos))]
    images = [photos.read(i) for i in range(len(photos))]
    side = search_size(models.student, recipe)
    batch = torch.stack([fit(image, (side, side)) for image in images])
    queries = list(dict.fromkeys(queried))[:limit]
    evals = recipe.evals if recipe else []
    template = next((str(each.get("template")) for each in evals if each.get("kind") == "retrieval"), "{}")
    texts = models.student.encode_text([template.replace("{}", query) for query in queries])
    scores = texts @ models.student.encode_image(batch).T
    before = None
    if models.untrained is not None and head in models.untrained.heads:
        before = texts @ models.untrained.encode_image(batch, head).T
    thumbs = [square(image, THUMB) for image in images]
    results = []
    for row, query in enumerate(queries):
        order = scores[row].argsort(descending=True, stable=True).tolist()
        hits = [Hit(photos.name(i), thumbs[i], float(scores[row, i]), queried[i] == query) for i in order[:top]]
        old = None if before is None else _rank(before[row], queried, query)
        results.append(Query(query, hits, _rank(scores[row], queried, query), old))
    return Search(results, len(photos), head)


def _rank(scores: Tensor, queried: Sequence[str], query: str) -> int:
    order = scores.argsort(descending=True, stable=True).tolist()
    return 1 + next(rank for rank, index in enumerate(order) if queried[index] == query)


def search_size(model: Model, recipe: Recipe | None) -> int:
    """The ``size`` of the recipe's ``retrieval`` eval; else the model's preferred size, at least 224."""
    for entry in recipe.evals if recipe else []:
        if entry.get("kind") == "retrieval" and isinstance(entry.get("size"), int):
            return _legal(model, int(entry["size"]))
    return _legal(model, max(224, model.preferred_size))


def _legal(model: Model, side: int) -> int:
    """The nearest legal side: a multiple of the patch, or of a whole window."""
    return nearest_size((side, side), model.step())[0]
