"""Dense correspondence between images by features alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import encode, need_spatial, report_unusable, required
from agglo.evals.base import SCENES_TEST, Backbone, Eval, EvalContext, ProbeError, Records, input_size
from agglo.preprocess import crop_box
from agglo.sources.base import AnnotationError, Source
from agglo.types import ConfigError, ImageError

REFERENCE = 512
"""Thresholds in pixels refer to an image whose longer side has this length."""

_SCORES = 2**26


class Correspondence(Eval):
    """Correspondence without training: a point is matched to the most similar feature of the other image.

    The source has ``pairs()``, objects with ``first`` and ``second`` (indices). Each of two protocols runs if the
    source has its annotations; nothing is fitted. Images are cropped to the aspect of ``size``; points outside are
    ignored.

    **Geometric** (NAVI by Probe3d, arXiv:2404.08636), if ``annotation(index)`` has ``depth``, ``K`` and
    ``cam_from_world``. Features are resized bilinearly to a grid of ``grid`` times the view's sides. Every grid point
    of the first image with a valid depth (and on an object, if the annotation has ``instances``) is matched to the grid
    point of the second image with the greatest cosine. The ``matches`` best by Lowe's ratio of cosine distances,
    nearest to second nearest, are kept. With ``X`` the true world point of a grid point ``x``:

    - ``3d@1cm``, ...: share with ``||X_1 - X_2||`` below the threshold; ``3d``: their mean;
    - ``2d@5px``, ...: share with ``||project_2(X_1) - x_2||`` below it, in pixels of an image whose longer side is 512;
      ``2d``: their mean; RADIO reports the means;
    - ``3d@2cm/0-30``, ...: the same over pairs whose cameras differ by 0 to 30 degrees.

    **Key points** (SPair-71k, arXiv:1908.10543), if pairs have ``points (N, 2, 2)``, ``(x, y)`` in the first and in the
    second image, NaN where hidden. The first image's feature at a point is matched on the second's grid; ``pck@0.10``
    is the share of points within 0.10 of the longer side of the pair's ``box`` (``xyxy`` of the object in the second
    image), or of the image for pairs without one, averaged over ``category`` if pairs have one. ``pck_image@0.10`` is
    the mean over pairs.

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        grid: side of the grid relative to that of the view in the image, or to 512 pixels if that is longer.
        matches: number kept per pair of the geometric protocol; all when there are fewer.
        metres: thresholds of world distances.
        pixels: thresholds of image distances.
        angles: edges of the bins of relative rotation, degrees; empty for no bins.
        pck: thresholds relative to the box.
        source: of the pairs.
    """

    revision = 2

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 128,
        grid: float = 0.25,
        matches: int = 1000,
        metres: list[float] | tuple[float, ...] = (0.01, 0.02, 0.05),
        pixels: list[float] | tuple[float, ...] = (5, 25, 50),
        angles: list[float] | tuple[float, ...] = (0, 30, 60, 90, 120),
        pck: list[float] | tuple[float, ...] = (0.1,),
        source: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if not 0 < grid <= 1:
            raise ConfigError(
                f"evals.correspondence: grid must be above 0 and at most 1, got {grid}; Probe3d uses 0.25"
            )
        if matches < 1:
            raise ConfigError(f"evals.correspondence: matches must be at least 1, got {matches}")
        for key, values in (("metres", metres), ("pixels", pixels), ("pck", pck)):
            if not values or min(values) <= 0:
                raise ConfigError(f"evals.correspondence: {key} must be a list of positive numbers; got {list(values)}")
        self.size = size
        self.grid = grid
        self.matches = matches
        self.metres = tuple(metres)
        self.pixels = tuple(pixels)
        self.angles = tuple(angles)
        self.pck = tuple(pck)
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        need_spatial(model, "correspondence")
        source = context.sources.open(self.source)
        pairs: Callable[[], Sequence[Any]] | None = getattr(source, "pairs", None)
        if pairs is None:
            raise ConfigError(f"{type(source).__name__} has no pairs of images: use a source such as {{kind: scenes}}")
        encoded = encode(model, self.source, self.size, context, want="spatial")
        spatial = required(encoded.spatial, model)
        maps = {i: spatial[row] for row, i in enumerate(encoded.index)}
        frames = {
            i: Frame.of(full, input_size(model, self.size), self.grid)
            for i, full in zip(encoded.index, encoded.sizes, strict=True)
        }
        geometric, points = _Geometric(self, context.records), _KeyPoints(self, context.records)
        for pair in pairs():
            if pair.first not in maps or pair.second not in maps:
                continue  # unreadable; a warning named it
            name = f"{source.name(pair.first)} -> {source.name(pair.second)}"
            views = [View(maps[i], frames[i]) for i in (pair.first, pair.second)]
            if getattr(pair, "points", None) is not None:
                points.add(name, pair, *views)
            geometric.add(name, source, pair, *views)
        found = {**geometric.metrics(), **points.metrics()}
        if not found:
            raise ProbeError("no pair has points, or depth and cameras: no correspondence to measure")
        return found


class Frame(NamedTuple):
    """A model's view of an image, and the grid of points.

    Args:
        box: the view, ``xyxy`` in pixels of the image.
        full: ``(H, W)`` of the image.
        grid: ``(h, w)``.
    """

    box: tuple[int, int, int, int]
    full: tuple[int, int]
    grid: tuple[int, int]

    @classmethod
    def of(cls, full: tuple[int, int], view: tuple[int, int], scale: float) -> Frame:
        """Frame of an image of ``full`` pixels and a model input of ``view``."""
        box = crop_box(full, view)
        # A photograph of 12 megapixels would have a grid of 750 000 points; Probe3d's views have 512 pixels.
        scale *= min(1.0, REFERENCE / max(box[2] - box[0], box[3] - box[1]))
        grid = max(1, round((box[3] - box[1]) * scale)), max(1, round((box[2] - box[0]) * scale))
        return cls(box, full, grid)

    def points(self) -> Tensor:
        """``(h*w, 2)`` float64: ``(x, y)`` pixels of the image of the grid's cell centres."""
        x0, y0, x1, y1 = self.box
        y = y0 + (torch.arange(self.grid[0], dtype=torch.float64) + 0.5) * ((y1 - y0) / self.grid[0])
        x = x0 + (torch.arange(self.grid[1], dtype=torch.float64) + 0.5) * ((x1 - x0) / self.grid[1])
        yy, xx = torch.meshgrid(y, x, indexing="ij")
        return torch.stack((xx, yy), -1).view(-1, 2)

    def inside(self, points: Tensor) -> Tensor:
        """Which ``(x, y)`` of ``(N, 2)`` lie in the view."""
        x0, y0, x1, y1 = self.box
        x, y = points.unbind(1)
        return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


class View(NamedTuple):
    """A map ``(D, h, w)`` and its frame."""

    features: Tensor
    frame: Frame

    def on_grid(self) -> Tensor:
        """Unit-norm ``(grid h * grid w, D)``, bilinear."""
        map_ = F.interpolate(self.features[None], size=self.frame.grid, mode="bilinear", align_corners=False)
        return F.normalize(map_[0].flatten(1).T, dim=1)

    def at(self, points: Tensor) -> Tensor:
        """Unit-norm ``(N, D)`` at ``(x, y)`` pixels of the image, bilinear."""
        x0, y0, x1, y1 = self.frame.box
        low = torch.tensor([x0, y0], dtype=torch.float64)
        where = ((points - low) / torch.tensor([x1 - x0, y1 - y0])).float() * 2 - 1
        found = F.grid_sample(
            self.features[None], where[None, None], mode="bilinear", padding_mode="border", align_corners=False
        )
        return F.normalize(found[0, :, 0].T, dim=1)


def ratio_matches(a: Tensor, b: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The nearest row of ``b`` for each row of ``a``, most distinctive first.

    Args:
        a, b: unit-norm ``(N, D)``, ``(M, D)``.
        most: maximum number of matches.

    Returns:
        rows of ``a`` and of ``b``, ``(K,)`` each, by ascending ratio of cosine distances
        ``(1 - c_1) / (1 - c_2)``; ties keep the order of ``a``.
    """
    ratios, near = [], []
    for part in a.split(max(1, _SCORES // max(1, len(b)))):
        cosine = (part @ b.T).clamp(-1, 1)
        top, index = torch.topk(cosine, min(2, len(b)))
        distance = (1 - top.double()).clamp_min(0)
        second = distance[:, 1] if distance.shape[1] > 1 else torch.full_like(distance[:, 0], 2.0)
        # Two perfect matches are ambiguous: 0 / 0 counts as 1.
        ratios.append(torch.where(second > 1e-12, distance[:, 0] / second.clamp_min(1e-12), 1.0))
        near.append(index[:, 0])
    order = torch.sort(torch.cat(ratios), stable=True).indices[:most]
    return order, torch.cat(near)[order]


class _Geometric:
    """Errors of matches in the world and in the image, pair by pair."""

    def __init__(self, protocol: Correspondence, records: Records) -> None:
        self.protocol = protocol
        self.records = records
        self.names: list[str] = []
        self.world: list[Tensor] = []
        self.image: list[Tensor] = []
        self.angle: list[float] = []
        self.unusable: list[ImageError] = []

    def add(self, name: str, source: Source, pair: Any, first: View, second: View) -> None:
        annotation: Callable[[int], Any] | None = getattr(source, "annotation", None)
        if annotation is None:
            return
        try:
            both = [annotation(pair.first), annotation(pair.second)]
            if any(getattr(one, key, None) is None for one in both for key in ("depth", "K", "cam_from_world")):
                return
            clouds = [
                _cloud(one, view.frame, source.name(index))
                for one, view, index in zip(both, (first, second), (pair.first, pair.second), strict=True)
            ]
        except ImageError as error:
            self.unusable.append(error)
            return
        rows = [cloud.rows for cloud in clouds]
        if not len(rows[0]) or not len(rows[1]):
            return
        a, b = ratio_matches(first.on_grid()[rows[0]], second.on_grid()[rows[1]], self.protocol.matches)
        x1, x2 = clouds[0].world[a], clouds[1].world[b]
        self.names.append(name)
        self.world.append(torch.linalg.vector_norm(x1 - x2, dim=1))
        projected, matched = project(x1, both[1]), clouds[1].points[b]
        scale = REFERENCE / max(second.frame.full)
        self.image.append(torch.linalg.vector_norm(projected - matched, dim=1) * scale)
        self.angle.append(rotation_between(both[0].cam_from_world, both[1].cam_from_world))

    def metrics(self) -> dict[str, float]:
        report_unusable(self.unusable, len(self.names), "pairs")
        if not self.names:
            return {}
        found: dict[str, float] = {}
        for key, thresholds, errors, label in (
            ("3d", self.protocol.metres, self.world, lambda t: f"{t * 100:g}cm"),
            ("2d", self.protocol.pixels, self.image, lambda t: f"{t:g}px"),
        ):
            recall = torch.stack([torch.stack([(e < t).double().mean() for t in thresholds]) for e in errors])
            found |= {f"{key}@{label(t)}": float(v) for t, v in zip(thresholds, recall.mean(0), strict=True)}
            found[key] = float(recall.mean())
            self.records.add_images(key, self.names, recall.mean(1))
        angle = torch.tensor(self.angle)
        two = torch.stack([(e < 0.02).double().mean() for e in self.world])
        borders = self.protocol.angles
        for low, high in pairwise(borders):
            chosen = (angle >= low) & (angle < high)
            if bool(chosen.any()):
                found[f"3d@2cm/{low:g}-{high:g}"] = float(two[chosen].mean())
        return found


class _KeyPoints:
    """Correct key points, pair by pair."""

    def __init__(self, protocol: Correspondence, records: Records) -> None:
        self.protocol = protocol
        self.records = records
        self.names: list[str] = []
        self.right: list[Tensor] = []
        self.category: list[str] = []

    def add(self, name: str, pair: Any, first: View, second: View) -> None:
        points = torch.as_tensor(np.asarray(pair.points, np.float64))
        if points.ndim != 3 or points.shape[1:] != (2, 2):
            raise ConfigError(f"{name}: points have shape {tuple(points.shape)}; expected (N, 2, 2)")
        keep = torch.isfinite(points).all(2).all(1)
        points = points[keep]
        points = points[first.frame.inside(points[:, 0]) & second.frame.inside(points[:, 1])]
        if not len(points):
            return
        box = getattr(pair, "box", None)
        side = max(second.frame.full) if box is None else max(box[2] - box[0], box[3] - box[1])
        cosine = first.at(points[:, 0]) @ second.on_grid().T
        found = second.frame.points()[cosine.argmax(1)]
        error = torch.linalg.vector_norm(found - points[:, 1], dim=1) / float(side)
        self.names.append(name)
        self.right.append(torch.stack([error <= t for t in self.protocol.pck]).double())
        self.category.append(str(getattr(pair, "category", None) or ""))

    def metrics(self) -> dict[str, float]:
        if not self.names:
            return {}
        every = torch.stack([one.mean(1) for one in self.right])
        groups: dict[str, list[Tensor]] = {}
        for category, one in zip(self.category, self.right, strict=True):
            groups.setdefault(category, []).append(one)
        classes = torch.stack([torch.cat(members, 1).mean(1) for members in groups.values()])
        self.records.add_images("pck", self.names, every[:, 0])
        return {
            **{f"pck@{t:.2f}": float(v) for t, v in zip(self.protocol.pck, classes.mean(0), strict=True)},
            **{f"pck_image@{t:.2f}": float(v) for t, v in zip(self.protocol.pck, every.mean(0), strict=True)},
        }


class _Cloud(NamedTuple):
    """Grid points with a depth: grid rows, ``(x, y)`` in the image, and world coordinates."""

    rows: Tensor
    points: Tensor
    world: Tensor


def _cloud(annotation: Any, frame: Frame, name: str) -> _Cloud:
    depth = torch.as_tensor(np.asarray(annotation.depth, np.float64))
    if tuple(depth.shape) != frame.full:
        raise AnnotationError(name, f"is {frame.full[0]}x{frame.full[1]} pixels and its depth {tuple(depth.shape)}")
    points = frame.points()
    column, row = points.long().unbind(1)  # the pixel that holds the point: its centre is at +0.5
    z = depth[row, column]
    valid = torch.isfinite(z) & (z > 0)
    instances = getattr(annotation, "instances", None)
    if instances is not None:
        valid &= torch.as_tensor(np.asarray(instances, np.int64))[row, column] > 0
    rows = valid.nonzero()[:, 0]
    homogeneous = torch.cat((points[rows], torch.ones(len(rows), 1, dtype=torch.float64)), 1)
    camera = homogeneous @ torch.linalg.inv(_matrix(annotation.K)).T * z[rows, None]
    pose = _matrix(annotation.cam_from_world)
    return _Cloud(rows, points[rows], (camera - pose[:3, 3]) @ pose[:3, :3])  # R^T (X - t)


def project(world: Tensor, annotation: Any) -> Tensor:
    """World points ``(N, 3)`` as ``(x, y)`` pixels of a camera; points behind it are at infinity."""
    pose, K = _matrix(annotation.cam_from_world), _matrix(annotation.K)
    camera = world @ pose[:3, :3].T + pose[:3, 3]
    flat = camera @ K.T
    return torch.where(camera[:, 2:] > 0, flat[:, :2] / flat[:, 2:], torch.inf)


def rotation_between(a: Any, b: Any) -> float:
    """Degrees between the orientations of two ``cam_from_world``."""
    turn = _matrix(a)[:3, :3] @ _matrix(b)[:3, :3].T
    return math.degrees(math.acos(max(-1.0, min(1.0, (float(turn.trace()) - 1) / 2))))


def _matrix(x: Any) -> Tensor:
    return torch.as_tensor(np.asarray(x, np.float64))
