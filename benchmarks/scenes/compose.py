"""Composition of a scene: identities, positions of the objects, and cameras.

World frame: metres, z up, the floor at z = 0, the cameras on the -y side looking towards +y. Camera frames follow
OpenCV: x right, y down, z forward along the optical axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from materials import ALLOWED, COLOURS, METALS, PHRASES
from meshes import Part
from objects import CLASSES, settle

SPLITS = {"train": range(6), "val": range(6, 8), "test": range(8, 11)}
"""Identity numbers of every class in each split, disjoint."""

SPLIT_CYCLE = ("train", "test", "train", "val", "train", "test", "train", "test", "train", "val")
BACKGROUNDS = ("studio", "room", "brick", "checks", "rug", "tiles")
LIGHTS = ("softbox", "sunset", "window", "spot", "sky")
CLASS_NAMES = tuple(CLASSES)


@dataclass
class Identity:
    """One individual of a class: fixed proportions, materials and colours."""

    name: str
    category: str
    material: str
    colour: str
    parts: list[Part]
    slots: dict[str, tuple[str, tuple[float, float, float]]]
    seed: list[int]

    @property
    def phrase(self) -> str:
        """Its phrase in captions, e.g. ``red ceramic mug``."""
        return f"{PHRASES[self.material].format(colour=self.colour)} {self.category}"


@dataclass
class Placed:
    """An identity placed in a scene."""

    identity: Identity
    parts: list[Part]
    centre: np.ndarray
    radius: float


@dataclass
class Camera:
    """A pinhole view: horizontal field of view in degrees and the rigid ``cam_from_world`` (4, 4)."""

    fov: float
    eye: np.ndarray
    target: np.ndarray

    @property
    def cam_from_world(self) -> np.ndarray:
        forward = self.target - self.eye
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward])
        pose[:3, 3] = -pose[:3, :3] @ self.eye
        return pose

    def intrinsics(self, size: int) -> np.ndarray:
        """``(3, 3)`` K in pixels for a square image; pixel centres lie at +0.5."""
        focal = size / 2 / np.tan(np.radians(self.fov) / 2)
        return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])


@dataclass
class Layout:
    """All random choices of one scene except the texture of its materials."""

    index: int
    split: str
    objects: list[Placed]
    cameras: list[Camera]
    background: str
    light: str
    seed: list[int]


def _tones(material: str, colour: str) -> tuple[float, float, float]:
    return (0.8, 0.8, 0.8) if material in METALS else COLOURS[colour]


def make_identity(category: str, number: int, seed: int) -> Identity:
    """Draw identity ``number`` of a class, deterministically."""
    kind = CLASS_NAMES.index(category)
    rng = np.random.default_rng([seed, 1, kind, number])
    palette = list(COLOURS)
    if category == "traffic cone":
        palette = ["orange", "red", "yellow", "green", "blue", "pink"]
    elif category == "mushroom":
        palette = ["red", "brown", "orange", "purple", "yellow", "pink", "blue"]
    elif category == "dumbbell":
        palette = [c for c in palette if c not in ("white", "brown")]
    elif category == "umbrella":
        palette = [c for c in palette if c not in ("gray", "brown")]
    shuffled = np.random.default_rng([seed, 2, kind]).permutation(palette)
    colour = str(shuffled[number % len(shuffled)])
    material = ALLOWED[category][int(rng.integers(len(ALLOWED[category])))]
    others = [c for c in ("white", "yellow", "red", "teal", "blue", "brown", "black", "pink") if c != colour]
    second = "white" if category in ("traffic cone", "mushroom") else str(rng.choice(others))
    accent = ("painted", COLOURS[second])
    if material in ("wood", "marble") and category in ("chair", "table", "ladder", "bucket"):
        accent = (material, COLOURS[second]) if rng.random() < 0.7 else accent
    elif category == "table" and material == "painted" and rng.random() < 0.5:
        accent = ("wood", COLOURS[second])
    elif category in ("bowl", "vase", "teapot", "bottle") and rng.random() < 0.5:
        accent = (material, _tones(material, colour))
    if category == "hourglass":
        accent = ("rubber", (0.88, 0.66, 0.36))
    slots = {
        "main": (material, _tones(material, colour)),
        "accent": accent,
        "dark": ("rubber", (0.16, 0.11, 0.09)),
        "light": ("painted", (0.93, 0.89, 0.80)),
        "metal": ("aluminium", (0.8, 0.8, 0.8)),
    }
    named = material if material in METALS or material in ("wood", "marble") else colour
    parts = CLASSES[category](rng)
    return Identity(
        f"{category.replace(' ', '_')}-{number:02d}", category, material, named, parts, slots, [seed, 3, kind, number]
    )


def plan(count: int) -> list[tuple[str, str, int]]:
    """Split, subject class and subject identity of every scene: half train, a fifth val, the rest test, balanced."""
    seen = dict.fromkeys(SPLITS, 0)
    rows = []
    for index in range(count):
        split = SPLIT_CYCLE[index % len(SPLIT_CYCLE)]
        k = seen[split]
        seen[split] += 1
        ids = SPLITS[split]
        rows.append((split, CLASS_NAMES[k % len(CLASS_NAMES)], ids[(k // len(CLASS_NAMES)) % len(ids)]))
    return rows


def _stand(identity: Identity, size: float, yaw: float, at: np.ndarray) -> Placed:
    points = np.concatenate([part.vertices for part in identity.parts])
    scale = size / float(np.ptp(points, axis=0).max())
    parts, radius = settle(identity.parts, scale, yaw)
    parts = [part.moved(at[0], at[1]) for part in parts]
    height = max(float(part.vertices[:, 2].max()) for part in parts)
    return Placed(identity, parts, np.array([at[0], at[1], height / 2]), radius)


def _arrange(identities: list[Identity], shrink: float, rng: np.random.Generator) -> list[Placed]:
    """Place the subject near the origin and the others around it, footprints apart."""
    placed = [_stand(identities[0], rng.uniform(0.54, 0.6), rng.uniform(0, 360), rng.uniform(-0.08, 0.08, 2))]
    for identity in identities[1:]:
        size, yaw = rng.uniform(0.36, 0.46) * shrink, rng.uniform(0, 360)
        radius = _stand(identity, size, yaw, np.zeros(2)).radius
        options = []
        for _ in range(60):
            angle = rng.uniform(-0.15, 1.15) * np.pi if rng.random() < 0.65 else rng.uniform(0, 2 * np.pi)
            reach = placed[0].radius + radius + rng.uniform(0.02, 0.2)
            at = placed[0].centre[:2] + reach * np.array([np.cos(angle), 0.9 * np.sin(angle)])
            if all(np.linalg.norm(at - p.centre[:2]) > p.radius + radius + 0.015 for p in placed):
                options.append(at)
        if options:  # the nearest of a few keeps the group together without making it regular
            nearest = min(options[:5], key=lambda at: float(np.linalg.norm(at)))
            placed.append(_stand(identity, size, yaw, nearest))
    return placed


def _frame(objects: list[Placed], azimuth: float, elevation: float, fov: float, margin: float, shift: float) -> Camera:
    """The nearest camera at the given angles (degrees) that keeps every object within ``margin`` of the half frame."""
    points = np.concatenate([part.vertices[::3] for item in objects for part in item.parts])
    target = (points.min(0) + points.max(0)) / 2 + np.array([0, 0, shift])
    a, e = np.radians(azimuth), np.radians(elevation)
    ray = np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])
    slope = np.tan(np.radians(fov) / 2) * margin
    distance = 0.8
    while True:
        camera = Camera(fov, target + distance * ray, target)
        local = points @ camera.cam_from_world[:3, :3].T + camera.cam_from_world[:3, 3]
        if (local[:, 2] > 0.2).all() and (np.abs(local[:, :2]) < slope * local[:, 2:]).all():
            return camera
        distance *= 1.03


def compose(index: int, split: str, subject: str, number: int, seed: int, attempt: int) -> Layout:
    """Draw one candidate of a scene; later attempts shrink the other objects so that the subject dominates.

    Args:
        index: scene number.
        split: ``train``, ``val`` or ``test``.
        subject: class of the main object, always ``objects[0]``.
        number: identity number of the subject within its class.
        seed: seed of the benchmark.
        attempt: index of the candidate.
    """
    rng = np.random.default_rng([seed, 4, index, attempt])
    others = [name for name in CLASS_NAMES if name != subject]
    count = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15]))
    chosen = rng.permutation(others)[: count if attempt < 15 else min(count, 2)]
    identities = [make_identity(subject, number, seed)]
    identities += [make_identity(str(name), int(rng.choice(list(SPLITS[split]))), seed) for name in chosen]
    objects = _arrange(identities, max(0.55, 1 - 0.04 * attempt), rng)
    steps = np.random.default_rng([seed, 5]).permutation(len(BACKGROUNDS) * len(LIGHTS))
    combination = int(steps[index % len(steps)])  # every pair of background and light occurs equally often
    middle, gap = rng.uniform(-12, 12), rng.uniform(10, 45) * rng.choice([-1, 1])
    elevation, fov = rng.uniform(9, 38), rng.uniform(24, 46)
    margin, shift = rng.uniform(0.82, 0.95), rng.uniform(-0.03, 0.04)
    cameras = [
        _frame(
            objects,
            middle + side * gap / 2,
            elevation + side * rng.uniform(-4, 4),
            fov + side * rng.uniform(-3, 3),
            margin,
            shift,
        )
        for side in (-1, 1)
    ]
    return Layout(
        index,
        split,
        objects,
        cameras,
        BACKGROUNDS[combination % len(BACKGROUNDS)],
        LIGHTS[combination // len(BACKGROUNDS)],
        [seed, 6, index, attempt],
    )
