"""The object classes: each builder draws the proportions of one identity and returns its parts.

Builders work in metres at toy scale (0.2 m to 0.6 m), z up, standing or lying on z = 0 after placement. Material slots
are ``main``, ``accent`` and, for fixed colours, ``dark``, ``light`` and ``metal``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from meshes import Part, block, cylinder, revolve, rod, rotation, smooth_curve, sphere, torus, tube

Builder = Callable[[np.random.Generator], list[Part]]


def mug(rng: np.random.Generator) -> list[Part]:
    """An open cup with a C-shaped handle."""
    h, r = rng.uniform(0.26, 0.36), rng.uniform(0.12, 0.15)
    foot, wall = r * rng.uniform(0.78, 1.0), 0.012
    outside = smooth_curve([(foot, 0.012), ((foot + r) / 2 * rng.uniform(1.0, 1.1), h * 0.5), (r, h - 0.006)], 12)
    inside = [(r - wall, h - 0.006), (foot - wall, 0.03), (0, 0.026)]
    body = revolve([(0, 0), (foot - 0.012, 0), *outside, (r - wall / 2, h), *inside])
    reach = rng.uniform(0.09, 0.12)
    x = (foot + r) / 2 - 0.012
    path = [(x, 0, h * 0.8), (x + reach * 0.8, 0, h * 0.8), (x + reach, 0, h * 0.55), (x + reach * 0.7, 0, h * 0.28)]
    handle = tube(smooth_curve([*path, (x, 0, h * 0.22)], 28), rng.uniform(0.015, 0.02))
    return [body, handle, revolve([(r - 0.02, h * 0.84), (r - wall - 0.004, h * 0.85), (0, h * 0.85)], "dark")]


def bottle(rng: np.random.Generator) -> list[Part]:
    """A shouldered bottle with a label band and a cap."""
    h, r, neck = rng.uniform(0.44, 0.58), rng.uniform(0.075, 0.1), rng.uniform(0.026, 0.034)
    shoulder = h * rng.uniform(0.52, 0.64)
    slope = smooth_curve([(r, shoulder), (r * 0.86, shoulder + 0.05), (neck * 1.15, h * 0.83), (neck, h * 0.94)], 24)
    body = revolve([(0, 0), (r - 0.012, 0), (r, 0.012), *slope, (neck, h * 0.95), (0, h * 0.95)])
    band = revolve(
        [(r - 0.01, h * 0.15), (r + 0.003, h * 0.151), (r + 0.003, shoulder * 0.88), (r - 0.01, shoulder * 0.9)],
        "accent",
    )
    return [body, band, cylinder(neck * 1.25, h * 0.09, "accent", 0.006).moved(z=h * 0.91)]


def vase(rng: np.random.Generator) -> list[Part]:
    """A bellied vase with a flared lip."""
    h, belly = rng.uniform(0.4, 0.52), rng.uniform(0.12, 0.16)
    foot, neck, lip = rng.uniform(0.06, 0.08), rng.uniform(0.04, 0.055), rng.uniform(0.07, 0.1)
    at = rng.uniform(0.3, 0.48)
    curve = smooth_curve([(foot, 0.0), (foot * 1.1, h * 0.06), (belly, h * at), (neck, h * 0.82), (lip, h)], 48)
    inner = curve[::-1][:24] * [1, 1] - [0.008, 0]
    rings = [torus(foot * 1.08, 0.008, "accent").moved(z=0.012), torus(lip - 0.004, 0.007, "accent").moved(z=h)]
    return [revolve([(0, 0), *curve, *inner, (0, inner[-1, 1])]), *rings]


def bowl(rng: np.random.Generator) -> list[Part]:
    """A wide open bowl on a foot ring."""
    r, h = rng.uniform(0.2, 0.25), rng.uniform(0.13, 0.18)
    foot = r * rng.uniform(0.36, 0.46)
    outer = smooth_curve([(foot, 0.03), (r * 0.78, h * 0.42), (r, h)], 24)
    inner = smooth_curve([(r - 0.014, h), (r * 0.74, h * 0.48), (foot * 0.8, 0.052), (0, 0.046)], 24)
    base = revolve([(0, 0), (foot * 0.92, 0), (foot, 0.03), (0, 0.031)], "accent")
    return [revolve([(0, 0.03), *outer, (r - 0.007, h + 0.006), *inner]), base]


def teapot(rng: np.random.Generator) -> list[Part]:
    """A round pot with spout, handle, lid and knob."""
    r, h = rng.uniform(0.15, 0.18), rng.uniform(0.22, 0.28)
    foot, top = r * 0.6, r * rng.uniform(0.5, 0.6)
    body = revolve([(0, 0), *smooth_curve([(foot, 0), (r, h * 0.42), (r * 0.9, h * 0.68), (top, h)], 28), (0, h)])
    lid = revolve(
        [(top * 1.06, h), *smooth_curve([(top * 1.06, h + 0.008), (top * 0.6, h + 0.045), (0, h + 0.055)], 12)]
    )
    out = rng.uniform(0.13, 0.17)
    way = [(r * 0.8, 0, h * 0.3), (r + out * 0.45, 0, h * 0.48), (r + out * 0.75, 0, h * 0.85), (r + out, 0, h * 1.06)]
    spout = tube(smooth_curve(way, 24), np.linspace(0.046, 0.019, 24))
    back = rng.uniform(0.1, 0.13)
    loop = [(-r * 0.86, 0, h * 0.8), (-r - back * 0.8, 0, h * 0.86), (-r - back, 0, h * 0.55), (-r * 0.95, 0, h * 0.25)]
    handle = tube(smooth_curve(loop, 28), 0.017, "accent")
    return [body, lid, spout, handle, sphere(0.028, "accent", 16).moved(z=h + 0.072)]


def bucket(rng: np.random.Generator) -> list[Part]:
    """A tapered pail with a wire bail."""
    h, r = rng.uniform(0.27, 0.34), rng.uniform(0.16, 0.19)
    foot = r * rng.uniform(0.68, 0.78)
    body = revolve([(0, 0), (foot, 0), (r, h), (r - 0.012, h), (foot - 0.012, 0.02), (0, 0.02)])
    a = np.linspace(0, np.pi, 28)
    tilt = rng.uniform(-35, 20)
    bail = np.stack([r * 1.03 * np.cos(a), 0 * a, r * 1.1 * np.sin(a)], -1) @ rotation(tilt, "x").T
    grip = rod((-0.05, 0, r * 1.1), (0.05, 0, r * 1.1), 0.018, "accent").turned(tilt, "x")
    rim = [torus(r, 0.012).moved(z=h), torus(foot + (r - foot) * 0.75, 0.008).moved(z=h * 0.75)]
    lugs = [sphere(0.02, "metal", 12).moved(x=s * r * 1.02, z=h * 0.93) for s in (-1, 1)]
    return [body, *rim, tube(bail, 0.008, "metal").moved(z=h * 0.93), grip.moved(z=h * 0.93), *lugs]


def chair(rng: np.random.Generator) -> list[Part]:
    """A four-legged chair with a slatted or solid back."""
    w, d, seat, h = rng.uniform(0.26, 0.31), rng.uniform(0.25, 0.3), rng.uniform(0.25, 0.3), rng.uniform(0.52, 0.6)
    t, splay = rng.uniform(0.024, 0.034), rng.uniform(0, 0.02)
    x, y = w / 2 - t / 2, d / 2 - t / 2
    legs = [
        rod((sx * (x + splay), sy * (y + splay), 0), (sx * x, sy * y, seat), t / 2 * 0.8, taper=1.25)
        for sx in (-1, 1)
        for sy in (-1, 1)
    ]
    lean = rng.uniform(0.02, 0.05)
    posts = [rod((s * x, y, seat), (s * x, y + lean, h), t / 2) for s in (-1, 1)]
    parts = [*legs, *posts, block(w + 0.02, d + 0.02, 0.032, "accent", 0.012).moved(z=seat)]
    style = rng.integers(3)
    if style == 0:
        heights = np.linspace(seat + 0.1, h - 0.03, int(rng.integers(2, 4)))
        slats = [block(w - t, 0.016, 0.042).moved(y=y + lean * (z - seat) / (h - seat), z=z - 0.02) for z in heights]
    elif style == 1:
        slats = [rod((s * x * 0.55, y, seat), (s * x * 0.55, y + lean, h), t / 3) for s in (-1, 0, 1)]
        slats.append(block(w + 0.01, 0.022, 0.05).moved(y=y + lean, z=h - 0.03))
    else:
        slats = [
            block(w - t * 0.5, 0.018, (h - seat) * 0.62, "accent").moved(y=y + lean * 0.6, z=seat + (h - seat) * 0.36)
        ]
    return parts + slats


def table(rng: np.random.Generator) -> list[Part]:
    """A dining table, square, long or round."""
    h, t = rng.uniform(0.3, 0.38), rng.uniform(0.025, 0.04)
    style = rng.integers(3)
    if style == 2:
        r = rng.uniform(0.24, 0.29)
        column = smooth_curve([(0.13, 0.018), (0.05, 0.05), (0.032, h * 0.5), (0.06, h - t)], 24)
        return [cylinder(r, t, "accent", 0.008).moved(z=h - t), revolve([(0, 0), (0.14, 0), *column, (0, h - t)])]
    w, d = rng.uniform(0.44, 0.6), rng.uniform(0.32, 0.4)
    parts = [block(w, d, t, "accent", 0.008).moved(z=h - t), block(w - 0.07, d - 0.07, 0.045).moved(z=h - t - 0.044)]
    leg = rng.uniform(0.032, 0.044)
    for sx in (-1, 1):
        for sy in (-1, 1):
            x, y = sx * (w / 2 - leg), sy * (d / 2 - leg)
            parts.append(
                rod((x, y, 0), (x, y, h - t), leg * 0.3, taper=1.7)
                if style
                else block(leg, leg, h - t, bevel=0.004).moved(x, y)
            )
    return parts


def ladder(rng: np.random.Generator) -> list[Part]:
    """A step ladder: an A-frame with flat treads."""
    h, w, spread = rng.uniform(0.52, 0.62), rng.uniform(0.2, 0.25), rng.uniform(0.15, 0.19)
    parts = []
    for side in (-1, 1):
        parts.append(rod((side * w / 2, -spread, 0), (side * w / 2 * 0.75, -0.015, h), 0.015))
        parts.append(rod((side * w / 2, spread, 0), (side * w / 2 * 0.75, 0.015, h), 0.012))
    for u in np.linspace(0.0, 1.0, int(rng.integers(4, 6)) + 1)[1:-1]:
        width = w * (1 - 0.25 * u)
        parts.append(block(width, 0.06, 0.018, "accent", 0.004).moved(y=-spread * (1 - u) + 0.005, z=h * u))
    for u in (0.25, 0.65):
        half = w / 2 * (1 - 0.25 * u)
        y = spread * (1 - u)
        parts.append(rod((-half, y, h * u), (half, y, h * u), 0.009))
    return [*parts, block(w * 0.84, 0.1, 0.03, "accent").moved(z=h - 0.01)]


def lamp(rng: np.random.Generator) -> list[Part]:
    """A bedside lamp: base, stem and a lit-looking fabric shade."""
    h, r = rng.uniform(0.46, 0.58), rng.uniform(0.14, 0.18)
    shade, top = rng.uniform(0.17, 0.22), r * rng.uniform(0.45, 0.8)
    z = h - shade
    cover = revolve([(r, z), (top, h), (top - 0.006, h), (r - 0.008, z)], "light")
    parts = [cover, revolve([(top - 0.004, h - 0.012), (0, h - 0.012)], "light"), sphere(0.014, rows=12).moved(z=h)]
    if rng.random() < 0.5:
        body = smooth_curve([(0.07, 0), (0.095, h * 0.16), (0.03, h * 0.42), (0.016, z + 0.04)], 28)
        return [*parts, revolve([(0, 0), *body, (0, z + 0.05)])]
    base = revolve([(0, 0), (0.1, 0), (0.1, 0.012), (0.09, 0.022), (0.02, 0.03), (0, 0.03)], "accent")
    return [*parts, base, rod((0, 0, 0.02), (0, 0, z + 0.06), 0.014), sphere(0.03, rows=16).moved(z=z * 0.5)]


def ball(rng: np.random.Generator) -> list[Part]:
    """A ball: beach-ball wedges, a belt, or seams."""
    r = rng.uniform(0.17, 0.22)
    base = sphere(r, rows=49)
    style = rng.integers(3)
    centre = base.vertices[base.faces].mean(1)
    if style == 0:
        turn = (np.arctan2(centre[:, 1], centre[:, 0]) / (2 * np.pi) * 8) % 8
        marked = (turn.astype(int) % 2 == 0) | (np.abs(centre[:, 2]) > r * 0.965)
    elif style == 1:
        marked = np.abs(centre[:, 2]) < r * rng.uniform(0.16, 0.3)
    else:
        rings = [torus(r * 0.998, 0.005, "dark"), torus(r * 0.998, 0.005, "dark").turned(90, "x")]
        side = torus(r * 0.8, 0.005, "dark")
        rings += [side.moved(z=s * r * 0.6).turned(90, "y") for s in (-1, 1)]
        return [part.turned(50, "x") for part in (base, *rings)]
    tilt = rng.uniform(20, 60)
    parts = [Part(base.vertices, base.faces[~marked]), Part(base.vertices, base.faces[marked], "accent")]
    return [part.turned(tilt, "x") for part in parts]


def dumbbell(rng: np.random.Generator) -> list[Part]:
    """A dumbbell on the floor: a bar between two heads (hexagonal, stacked discs or globes)."""
    length, r = rng.uniform(0.4, 0.5), rng.uniform(0.095, 0.125)
    thick = rng.uniform(0.1, 0.13)
    style = rng.integers(3)
    parts = [rod((0, 0, -length / 2 + 0.02), (0, 0, length / 2 - 0.02), 0.025, "metal")]
    for side in (-1, 1):
        z = side * (length / 2 - thick / 2) - thick / 2
        if style == 0:
            head = revolve(
                [(0, 0), (r * 0.8, 0), (r, 0.02), (r, thick - 0.02), (r * 0.8, thick), (0, thick)], segments=6
            )
            parts.append(head.turned(30).moved(z=z))
        elif style == 1:
            parts.append(cylinder(r, thick * 0.48, "main", 0.012).moved(z=z + (thick * 0.5 if side < 0 else 0)))
            parts.append(cylinder(r * 0.8, thick * 0.48, "accent", 0.012).moved(z=z + (0 if side < 0 else thick * 0.5)))
        else:
            parts.append(sphere(r * 0.95).moved(z=z + thick / 2))
    return [part.turned(90, "y") for part in parts]


def umbrella(rng: np.random.Generator) -> list[Part]:
    """An open umbrella lying on its rim and handle, with alternating panels."""
    r, depth, n = rng.uniform(0.3, 0.36), rng.uniform(0.14, 0.19), 8
    length = rng.uniform(0.46, 0.54)
    two_tone = rng.random() < 0.65
    groups: dict[str, list[np.ndarray]] = {"main": [], "accent": []}
    rows = 10
    u = np.linspace(0, 1, rows)
    for k in range(n):
        a = (k + np.linspace(0, 1, 7)) * 2 * np.pi / n
        sag = 1 - 0.1 * np.sin(np.linspace(0, np.pi, 7)) * u[:, None]  # panels hang in between the ribs
        radius = r * u[:, None] * sag
        height = length - depth * (1 - np.cos(u * 1.25)[:, None]) / (1 - np.cos(1.25)) * np.ones_like(sag)
        grid = np.stack([radius * np.cos(a), radius * np.sin(a), height], -1)
        groups["accent" if two_tone and k % 2 else "main"].append(grid)
    parts = []
    for slot, grids in groups.items():
        for grid in grids:
            index = np.arange(rows * 7).reshape(rows, 7)
            q = [index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]]
            faces = np.concatenate(
                [np.stack([q[0], q[1], q[2]], -1).reshape(-1, 3), np.stack([q[0], q[2], q[3]], -1).reshape(-1, 3)]
            )
            parts.append(Part(grid.reshape(-1, 3), faces, slot))
    hook = [(0, 0, 0.06), (0.004, 0, 0.02), (0.035, 0, -0.01), (0.07, 0, 0.015), (0.073, 0, 0.04)]
    parts.append(rod((0, 0, 0.05), (0, 0, length + 0.045), 0.009, "metal"))
    parts.append(tube(smooth_curve(hook, 24), 0.013, "dark"))
    fall = np.degrees(np.arctan2(length - depth + 0.01, r - 0.06))  # the rim and the hook both touch the floor
    return [part.turned(float(fall), "y") for part in parts]


def mushroom(rng: np.random.Generator) -> list[Part]:
    """A toadstool with a spotted cap."""
    h, r = rng.uniform(0.3, 0.4), rng.uniform(0.17, 0.22)
    rise = rng.uniform(0.6, 0.85) * r
    z = h - rise
    stem = smooth_curve([(0.075, 0), (0.07, 0.05), (0.045, z * 0.7), (0.05, z + 0.02)], 20)
    a = np.linspace(0, np.pi / 2, 20)
    dome = np.stack([r * np.cos(a), z + rise * np.sin(a)], -1)
    gills = revolve([(0, z + 0.02), (r * 0.5, z + 0.012), (r * 0.97, z - 0.004)], "light")
    parts = [revolve([(0, 0), *stem, (0, z + 0.03)], "light"), gills, revolve([(r * 0.96, z - 0.006), *dome])]
    turns = rng.uniform(0, 2 * np.pi)
    for ring, (count, tilt) in enumerate(((1, 0.0), (5, 0.72), (7, 1.2))):
        for k in range(count):
            b = turns + ring * 0.5 + k * 2 * np.pi / count
            t = tilt + rng.uniform(-0.06, 0.06)
            out = np.array([r * np.sin(t) * np.cos(b), r * np.sin(t) * np.sin(b), z + rise * np.cos(t)])
            spot = sphere(rng.uniform(0.024, 0.036), "accent", 12).stretched(z=0.45)
            parts.append(spot.turned(np.degrees(t), "y").turned(np.degrees(b)).moved(*out))
    return parts


def hourglass(rng: np.random.Generator) -> list[Part]:
    """Two bulbs (sand in the lower one) between end plates and posts."""
    h, r = rng.uniform(0.42, 0.52), rng.uniform(0.11, 0.14)
    t = 0.03
    mid, top = h / 2, h - t
    upper = smooth_curve([(0.018, mid), (r * 0.72, mid + (top - mid) * 0.5), (r * 0.6, top)], 24)
    lower = smooth_curve([(r * 0.6, t), (r * 0.72, t + (mid - t) * 0.5), (0.018, mid)], 24)
    cut = int(24 * rng.uniform(0.45, 0.7))
    parts = [revolve([*lower[cut:], *upper], "light"), revolve([*lower[: cut + 1]], "accent")]
    posts = int(rng.integers(3, 5))
    for k in range(posts):
        a = 2 * np.pi * k / posts + 0.4
        x, y = r * 0.98 * np.cos(a), r * 0.98 * np.sin(a)
        parts += [rod((x, y, 0.01), (x, y, h - 0.01), 0.013), sphere(0.021, rows=12).moved(x, y, mid)]
    return [*parts, cylinder(r * 1.2, t, bevel=0.01), cylinder(r * 1.2, t, bevel=0.01).moved(z=h - t)]


def traffic_cone(rng: np.random.Generator) -> list[Part]:
    """A striped cone on a square foot."""
    h, r, tip = rng.uniform(0.42, 0.54), rng.uniform(0.11, 0.14), 0.025
    foot = 0.03
    radius = lambda z: r + (tip - r) * (z - foot) / (h - foot)  # noqa: E731
    bands = [(foot, 0.3 * h), (0.3 * h, 0.48 * h), (0.48 * h, 0.64 * h), (0.64 * h, 0.78 * h), (0.78 * h, h)]
    parts = [block(r * 2.6, r * 2.6, foot, "main" if rng.random() < 0.5 else "dark", 0.012)]
    for k, (low, high) in enumerate(bands):
        closing = [(0, h)] if high == h else []
        parts.append(revolve([(radius(low), low), (radius(high), high), *closing], "accent" if k % 2 else "main"))
    return parts


CLASSES: dict[str, Builder] = {
    "ball": ball,
    "bottle": bottle,
    "bowl": bowl,
    "bucket": bucket,
    "chair": chair,
    "dumbbell": dumbbell,
    "hourglass": hourglass,
    "ladder": ladder,
    "lamp": lamp,
    "mug": mug,
    "mushroom": mushroom,
    "table": table,
    "teapot": teapot,
    "traffic cone": traffic_cone,
    "umbrella": umbrella,
    "vase": vase,
}
"""Builders by class name; the order is the class order of the benchmark."""


def settle(parts: list[Part], scale: float, yaw: float) -> tuple[list[Part], float]:
    """Scale an object, rotate it about the vertical, centre it over the origin and place it on z = 0.

    Returns:
        The parts and the footprint radius in metres (of the smallest origin-centred circle around the object).
    """
    parts = [part.stretched(scale, scale, scale).turned(yaw) for part in parts]
    points = np.concatenate([part.vertices for part in parts])
    low, high = points.min(0), points.max(0)
    shift = (-(low[0] + high[0]) / 2, -(low[1] + high[1]) / 2, -low[2])
    return [part.moved(*shift) for part in parts], float(np.linalg.norm(points[:, :2] + shift[:2], axis=1).max())
