"""Procedural triangle meshes: surfaces of revolution, swept tubes and bevelled convex blocks.

Everything is numpy; z points up and lengths are in metres (or any unit, if the result is scaled).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import ConvexHull

CREASE_COS = float(np.cos(np.radians(38.0)))
"""Faces that meet at more than 38 degrees keep a sharp edge; flatter joints are shaded smoothly."""


@dataclass
class Part:
    """A triangle mesh that takes one material.

    Attributes:
        vertices: ``(V, 3)`` float64 positions.
        faces: ``(F, 3)`` int64 vertex indices, counter-clockwise from outside.
        slot: the identity's material that covers it, e.g. ``"main"`` or ``"accent"``.
    """

    vertices: np.ndarray
    faces: np.ndarray
    slot: str = "main"

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Part:
        """The same part shifted by ``(x, y, z)``."""
        return Part(self.vertices + np.array([x, y, z]), self.faces, self.slot)

    def turned(self, degrees: float, axis: str = "z") -> Part:
        """The same part rotated about a coordinate axis through the origin."""
        return Part(self.vertices @ rotation(degrees, axis).T, self.faces, self.slot)

    def stretched(self, x: float = 1.0, y: float = 1.0, z: float = 1.0) -> Part:
        """The same part scaled per axis (positive factors only, so that faces keep their orientation)."""
        return Part(self.vertices * np.array([x, y, z]), self.faces, self.slot)


def rotation(degrees: float, axis: str = "z") -> np.ndarray:
    """A ``(3, 3)`` right-handed rotation matrix about ``x``, ``y`` or ``z``."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def _grid_faces(rows: int, columns: int, wrap_rows: bool = False) -> np.ndarray:
    """Triangles of a ``rows`` x ``columns`` vertex grid whose columns wrap around (optionally the rows too)."""
    count = rows if wrap_rows else rows - 1
    r, c = np.meshgrid(np.arange(count), np.arange(columns), indexing="ij")
    a, b = r * columns + c, r * columns + (c + 1) % columns
    d, e = (r + 1) % rows * columns + c, (r + 1) % rows * columns + (c + 1) % columns
    return np.concatenate([np.stack([a, b, e], -1).reshape(-1, 3), np.stack([a, e, d], -1).reshape(-1, 3)])


def smooth_curve(points: Sequence[Sequence[float]], samples: int = 40) -> np.ndarray:
    """A Catmull-Rom curve through ``points`` ``(N, D)``, resampled to ``(samples, D)``."""
    p = np.asarray(points, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, len(p) - 3 - 1e-9, samples)
    i, u = t.astype(int), (t % 1)[:, None]
    a, b, c, d = p[i], p[i + 1], p[i + 2], p[i + 3]
    return 0.5 * (2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3)


def revolve(profile: Sequence[Sequence[float]], slot: str = "main", segments: int = 48) -> Part:
    """Turn a ``(radius, height)`` profile about the z axis.

    Args:
        profile: ``(N, 2)`` points, running from the bottom outside upwards; ends at radius 0 close the surface.
        slot: material slot.
        segments: number of facets around the axis.
    """
    p = np.asarray(profile, float)
    angle = np.linspace(0, 2 * np.pi, segments, endpoint=False)
    r = np.maximum(p[:, :1], 1e-5)
    vertices = np.stack([r * np.cos(angle), r * np.sin(angle), np.broadcast_to(p[:, 1:], (len(p), segments))], -1)
    return Part(vertices.reshape(-1, 3), _grid_faces(len(p), segments), slot)


def cylinder(radius: float, height: float, slot: str = "main", bevel: float = 0.01, top: float | None = None) -> Part:
    """A bevelled cylinder (or truncated cone, with ``top`` as upper radius) standing on z = 0."""
    t = radius if top is None else top
    profile = [(0, 0), (radius - bevel, 0), (radius, bevel), (t, height - bevel), (t - bevel, height), (0, height)]
    return revolve(profile, slot)


def sphere(radius: float, slot: str = "main", rows: int = 32) -> Part:
    """A sphere about the origin."""
    a = np.linspace(-np.pi / 2, np.pi / 2, rows)
    return revolve(np.stack([radius * np.cos(a), radius * np.sin(a)], -1), slot)


def tube(
    path: Sequence[Sequence[float]],
    radius: float | Sequence[float],
    slot: str = "main",
    sides: int = 16,
    closed: bool = False,
) -> Part:
    """Sweep a circle along a 3D path.

    Args:
        path: ``(N, 3)`` points.
        radius: one radius, or one for each point.
        slot: material slot.
        sides: facets around the circle.
        closed: join the last point to the first (otherwise the ends are capped).
    """
    p = np.asarray(path, float)
    r = np.broadcast_to(np.asarray(radius, float), (len(p),))
    tangent = np.roll(p, -1, 0) - np.roll(p, 1, 0) if closed else np.gradient(p, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.cross(tangent[0], [0.0, 0.0, 1.0] if abs(tangent[0, 2]) < 0.9 else [1.0, 0.0, 0.0])
    rings = []
    for point, direction, size in zip(p, tangent, r, strict=True):
        normal = normal - direction * (normal @ direction)  # carry the frame along without twist
        normal /= np.linalg.norm(normal)
        other = np.cross(direction, normal)
        angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)[:, None]
        rings.append(point + size * (np.cos(angle) * normal + np.sin(angle) * other))
    faces = _grid_faces(len(p), sides, wrap_rows=closed)
    vertices = np.concatenate(rings)
    if not closed:
        first, last, n = len(vertices), len(vertices) + 1, sides
        around = np.arange(n)
        start = np.stack([np.full(n, first), (around + 1) % n, around], -1)
        base = (len(p) - 1) * n
        end = np.stack([np.full(n, last), base + around, base + (around + 1) % n], -1)
        vertices = np.concatenate([vertices, p[:1], p[-1:]])
        faces = np.concatenate([faces, start, end])
    return Part(vertices, faces, slot)


def rod(start: Sequence[float], end: Sequence[float], radius: float, slot: str = "main", taper: float = 1.0) -> Part:
    """A straight round bar between two points; ``taper`` is the end radius over the start radius."""
    path = np.linspace(np.asarray(start, float), np.asarray(end, float), 4)
    return tube(path, np.linspace(radius, radius * taper, 4), slot)


def torus(ring: float, radius: float, slot: str = "main") -> Part:
    """A torus about the z axis, centred on the origin."""
    a = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return tube(np.stack([ring * np.cos(a), ring * np.sin(a), 0 * a], -1), radius, slot, closed=True)


def hull(points: np.ndarray, slot: str = "main") -> Part:
    """The convex hull of ``(N, 3)`` points."""
    p = np.asarray(points, float)
    shape = ConvexHull(p)
    faces = shape.simplices.astype(np.int64).copy()
    a, b, c = (p[faces[:, k]] for k in range(3))
    inward = np.einsum("ij,ij->i", np.cross(b - a, c - a), shape.equations[:, :3]) < 0
    faces[inward] = faces[inward][:, ::-1]
    return Part(p, faces, slot)


def block(x: float, y: float, z: float, slot: str = "main", bevel: float = 0.008, taper: float = 1.0) -> Part:
    """A bevelled box of the given full sizes, standing on z = 0, its top scaled by ``taper`` in x and y."""
    half = np.array([x, y, z]) / 2
    bevel = min(bevel, 0.45 * float(half.min()))
    signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], float)
    points = np.concatenate([signs * (half - bevel * (np.arange(3) != keep)) for keep in range(3)])
    points[:, 2] += half[2]
    points[:, :2] *= 1 + (taper - 1) * points[:, 2:] / z
    return hull(points, slot)


def shading_mesh(part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unshared corners with crease-aware normals and box-projected texture coordinates.

    Returns:
        Positions ``(3F, 3)``, unit normals ``(3F, 3)`` and texture coordinates ``(3F, 2)`` in mesh units. Corners
        ``3i, 3i + 1, 3i + 2`` form triangle ``i``; triangles without area are dropped.
    """
    v, f = part.vertices, part.faces
    area = np.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]])
    size = np.linalg.norm(area, axis=1)
    f, area, size = f[size > 1e-12], area[size > 1e-12], size[size > 1e-12]
    unit = area / size[:, None]
    corner = f.reshape(-1)
    order = np.argsort(corner, kind="stable")
    start = np.searchsorted(corner[order], np.arange(len(v)))
    count = np.bincount(corner, minlength=len(v))
    # For each corner, add the area vectors of adjacent faces that are not across a crease.
    own = unit[np.arange(len(corner)) // 3]
    total = np.zeros_like(own)
    for k in range(int(count.max())):
        here = k < count[corner]
        face = order[np.minimum(start[corner] + k, len(corner) - 1)] // 3
        here &= np.einsum("ij,ij->i", unit[face], own) > CREASE_COS
        total += np.where(here[:, None], area[face], 0)
    normals = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-20)
    axis = np.abs(own).argmax(1)
    p = v[corner]
    uv = np.where((axis == 0)[:, None], p[:, [1, 2]], np.where((axis == 1)[:, None], p[:, [0, 2]], p[:, [0, 1]]))
    return p, normals, uv
