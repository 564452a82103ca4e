"""Backgrounds and lights, and the assembly of a composed scene into a Mitsuba dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import materials as m
import mitsuba as mi
import numpy as np
from compose import Layout
from meshes import Part, block, rotation, shading_mesh

WALL_TONES = ((0.86, 0.82, 0.74), (0.66, 0.75, 0.78), (0.80, 0.66, 0.58), (0.60, 0.68, 0.58), (0.78, 0.76, 0.80))
STUDIO_TONES = (
    (0.90, 0.88, 0.84),
    (0.55, 0.68, 0.78),
    (0.90, 0.71, 0.60),
    (0.60, 0.73, 0.64),
    (0.88, 0.80, 0.58),
    (0.70, 0.64, 0.78),
    (0.42, 0.45, 0.50),
)
FLOOR_WOODS = ((0.70, 0.52, 0.36), (0.56, 0.38, 0.25), (0.80, 0.67, 0.50), (0.45, 0.32, 0.24))
BRICK_TONES = ((0.66, 0.34, 0.26), (0.78, 0.72, 0.66), (0.56, 0.40, 0.34))
CLOTHS = (
    ((0.20, 0.33, 0.46), (0.90, 0.87, 0.80)),
    ((0.68, 0.25, 0.22), (0.92, 0.86, 0.76)),
    ((0.28, 0.42, 0.34), (0.88, 0.84, 0.72)),
    ((0.24, 0.24, 0.26), (0.84, 0.70, 0.42)),
)


def write_ply(part: Part, path: Path) -> None:
    """Save a part with its shading normals and texture coordinates."""
    positions, normals, uv = shading_mesh(part)
    count = len(positions)
    fields = "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz", "u", "v"))
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {count}\n{fields}"
        f"element face {count // 3}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    faces = np.zeros(count // 3, dtype=[("n", "u1"), ("i", "<i4", 3)])
    faces["n"], faces["i"] = 3, np.arange(count).reshape(-1, 3)
    data = np.concatenate([positions, normals, uv], 1).astype("<f4")
    path.write_bytes(header.encode() + data.tobytes() + faces.tobytes())


def _quad(corners: list[tuple[float, float, float]]) -> Part:
    return Part(np.asarray(corners, float), np.array([[0, 1, 2], [0, 2, 3]]), "stage")


def _floor(z: float = 0.0) -> Part:
    return _quad([(-12, -12, z), (12, -12, z), (12, 12, z), (-12, 12, z)])


def _wall(distance: float, turn: float = 0.0) -> Part:
    """A wide wall ``distance`` behind the origin, rotated about the vertical through its foot."""
    wall = _quad([(-12, 0, -0.1), (12, 0, -0.1), (12, 0, 8), (-12, 0, 8)])
    return Part(wall.vertices @ rotation(turn).T, wall.faces, "stage").moved(y=distance)


def _sweep(distance: float, radius: float = 0.7) -> Part:
    """A seamless studio backdrop: floor, quarter circle and wall in one sheet."""
    a = np.linspace(0, np.pi / 2, 24)
    y = np.concatenate([[-12], distance - radius + radius * np.sin(a), [distance]])
    z = np.concatenate([[0], radius - radius * np.cos(a), [8]])
    vertices = np.stack([np.stack([np.full_like(y, x), y, z], -1) for x in (-12, 12)], 1).reshape(-1, 3)
    k = 2 * np.arange(len(y) - 1)
    faces = np.concatenate([np.stack([k, k + 1, k + 3], -1), np.stack([k, k + 3, k + 2], -1)])
    return Part(vertices, faces, "stage")


def _room_corner(distance: float, turn: float) -> list[Part]:
    """Two walls that meet in a vertical edge ``distance`` behind the origin."""
    return [
        _quad([(0, 0, -0.1), (14 * dx, 14 * dy, -0.1), (14 * dx, 14 * dy, 8), (0, 0, 8)]).moved(y=distance, x=turn / 60)
        for dx, dy in ((np.cos(np.radians(a)), np.sin(np.radians(a))) for a in (-45 + turn, -135 + turn))
    ]


def background(layout: Layout, rng: np.random.Generator) -> tuple[list[tuple[Part, dict[str, Any]]], str]:
    """The stage's parts with their BSDFs, and a phrase for captions."""
    spread = max(float(np.hypot(*p.centre[:2]) + p.radius) for p in layout.objects)
    distance = spread + rng.uniform(0.5, 1.2)
    wall = m.matte(m.plaster(rng, WALL_TONES[rng.integers(len(WALL_TONES))]), 1.6)
    cloth = CLOTHS[rng.integers(len(CLOTHS))]
    if layout.background == "studio":
        tone = STUDIO_TONES[rng.integers(len(STUDIO_TONES))]
        return [(_sweep(distance + 0.5), m.matte(m.plaster(rng, tone, depth=0.01), 3.0))], "in a photo studio"
    if layout.background == "room":
        wood = m.matte(m.planks(rng, FLOOR_WOODS[rng.integers(len(FLOOR_WOODS))]), 1.1, 0.3)
        walls = _room_corner(distance + 0.5, rng.uniform(-14, 14))
        return [(_floor(), wood), *((part, wall) for part in walls)], "on a wooden floor in the corner of a room"
    if layout.background == "brick":
        brick = m.matte(m.bricks(rng, BRICK_TONES[rng.integers(len(BRICK_TONES))]), 1.0)
        ground = m.matte(m.plaster(rng, (0.60, 0.58, 0.55), depth=0.12), 1.2)
        return [(_floor(), ground), (_wall(distance, rng.uniform(-12, 12)), brick)], "in front of a brick wall"
    if layout.background == "checks":
        floor = m.matte(m.tiles(rng, cloth[0], cloth[1]), 0.9, 0.15)
        return [(_floor(), floor), (_wall(distance, rng.uniform(-15, 15)), wall)], "on a chequered tile floor"
    if layout.background == "rug":
        wood = m.matte(m.planks(rng, FLOOR_WOODS[rng.integers(len(FLOOR_WOODS))]), 1.1, 0.3)
        rug = (
            block(2 * spread + 0.3, 2 * spread + 0.2, 0.014, "stage", 0.006)
            .turned(rng.uniform(-25, 25))
            .moved(z=-0.014)
        )
        weave = m.matte(m.checks(rng, *cloth), 0.7)
        back = _wall(distance + 0.4, rng.uniform(-15, 15))
        return [(_floor(-0.014), wood), (rug, weave), (back, wall)], "on a chequered rug"
    plain = np.asarray(((0.82, 0.80, 0.76), (0.62, 0.70, 0.72), (0.74, 0.60, 0.50))[rng.integers(3)])
    floor = m.matte(m.tiles(rng, plain, plain * 0.94), 0.9, 0.12)
    return [(_floor(), floor), (_wall(distance, rng.uniform(-15, 15)), wall)], "on a tiled floor"


def _environment(top: Any, horizon: Any, strength: float) -> dict[str, Any]:
    """A generated environment map: horizon colour fading to the top colour, a darker ground."""
    up = np.cos(np.linspace(0, np.pi, 64))[:, None]
    sky = np.asarray(horizon) + (np.asarray(top) - np.asarray(horizon)) * np.clip(up, 0, 1) ** 0.6
    image = np.where(up > 0, sky, np.asarray(horizon) * 0.35) * strength
    image = np.broadcast_to(image[:, None], (64, 128, 3)).astype(np.float32)
    turn = mi.ScalarTransform4f().rotate([1, 0, 0], 90)
    return {"type": "envmap", "bitmap": mi.Bitmap(np.ascontiguousarray(image)), "to_world": turn}


def _panel(
    at: tuple[float, float, float], width: float, height: float, radiance: Any, disk: bool = False
) -> dict[str, Any]:
    """A one-sided luminous panel facing the group."""
    up = [0, 1, 0] if abs(at[0]) + abs(at[1]) < 1 else [0, 0, 1]
    pose = mi.ScalarTransform4f().look_at(list(at), [0, 0, 0.15], up).scale([width / 2, height / 2, 1])
    light = {"type": "area", "radiance": {"type": "rgb", "value": [float(v) for v in radiance]}}
    return {"type": "disk" if disk else "rectangle", "to_world": pose, "emitter": light}


def lights(name: str, rng: np.random.Generator) -> dict[str, Any]:
    """The emitters of a named lighting."""
    s = float(rng.choice([-1, 1]))
    u = rng.uniform
    if name == "softbox":
        return {
            "env": _environment((1, 1, 1), (0.8, 0.8, 0.82), 0.22),
            "key": _panel((s * u(1.4, 2.2), -u(1.2, 2.0), u(2.2, 2.9)), 1.5, 1.5, (11, 10.8, 10.4)),
            "fill": _panel((-s * 2.6, -1.8, 1.4), 1.2, 1.6, (1.6, 1.65, 1.8)),
        }
    if name == "sunset":
        return {
            "env": _environment((0.42, 0.5, 0.78), (0.95, 0.66, 0.5), 0.36),
            "key": _panel((s * u(2.2, 2.8), -u(1.4, 2.2), u(1.2, 1.7)), 0.8, 0.8, (37, 21, 9.8)),
        }
    if name == "window":
        return {
            "env": _environment((0.8, 0.88, 1), (0.85, 0.85, 0.85), 0.2),
            "key": _panel((s * u(2.0, 2.5), -u(0.4, 1.0), u(1.4, 1.8)), 1.0, 1.6, (12.5, 14.2, 16.5)),
        }
    if name == "spot":
        return {
            "env": _environment((0.75, 0.8, 1), (0.7, 0.7, 0.8), 0.16),
            "key": _panel((s * u(0.2, 0.6), -u(0.3, 0.8), u(2.7, 3.1)), 0.7, 0.7, (44, 41, 36), disk=True),
        }
    return {
        "env": _environment((0.55, 0.75, 1.0), (1.0, 0.96, 0.9), 0.95),
        "key": _panel((s * u(2.2, 3.0), -u(2.0, 3.0), u(2.6, 3.2)), 0.7, 0.7, (29, 27.3, 24)),
    }


def _object_parts(layout: Layout) -> dict[str, tuple[int, Part]]:
    """One mesh per object and material slot, by shape id, with the object's instance id (from 1)."""
    shapes = {}
    for number, item in enumerate(layout.objects, 1):
        for slot in dict.fromkeys(part.slot for part in item.parts):
            group = [part for part in item.parts if part.slot == slot]
            starts = np.cumsum([0, *(len(part.vertices) for part in group[:-1])])
            faces = np.concatenate([part.faces + start for part, start in zip(group, starts, strict=True)])
            vertices = np.concatenate([part.vertices for part in group])
            shapes[f"object{number}_{slot}"] = (number, Part(vertices, faces, slot))
    return shapes


def assemble(layout: Layout, folder: Path, bare: bool = False) -> tuple[dict[str, Any], dict[str, int], str]:
    """Write the meshes of a layout and describe the scene for `mitsuba.load_dict`.

    Args:
        layout: the composed scene.
        folder: folder of the mesh files; must exist until the scene is loaded.
        bare: only the objects, without stage, lights or materials, to determine their visibility.

    Returns:
        The dictionary (without sensor or integrator), the instance id (from 1) of every object shape by shape id, and
        the phrase of the background in captions.
    """
    rng = np.random.default_rng(layout.seed)
    parts, phrase = ([], "") if bare else background(layout, rng)
    scene: dict[str, Any] = {"type": "scene"} if bare else {"type": "scene", **lights(layout.light, rng)}
    owners: dict[str, int] = {}

    def add(name: str, part: Part, bsdf: dict[str, Any] | None) -> None:
        write_ply(part, folder / f"{name}.ply")
        scene[name] = {"type": "ply", "filename": str(folder / f"{name}.ply")} | ({"bsdf": bsdf} if bsdf else {})

    for k, (part, bsdf) in enumerate(parts):
        add(f"stage{k}", part, bsdf)
    looks: dict[int, dict[str, dict[str, Any]]] = {}
    if not bare:
        for number, item in enumerate(layout.objects, 1):
            grain = np.random.default_rng(item.identity.seed)
            looks[number] = {slot: m.surface(*look, grain) for slot, look in item.identity.slots.items()}
    for name, (number, part) in _object_parts(layout).items():
        add(name, part, None if bare else looks[number][part.slot])
        owners[name] = number
    return scene, owners, phrase
