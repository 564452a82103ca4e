"""The bundled `scenes` benchmark: rendered still lifes with exact depth, normals, masks and correspondences (CC0).

The format is described in docs/scenes.md; ``benchmarks/scenes/render.py`` makes the archive.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agglo.sources._paths import expanded
from agglo.sources.base import Source
from agglo.types import AssetError, ImageError
from agglo.weights.bundled import verify

SHA256 = "b5f6b83fd686e60adf6169ae3cd30cb16fdab07b6e05eff8922efa1665e20b83"
"""SHA-256 of the bundled archive, checked once per process on first use."""

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "scenes.tar"
SPLITS = ("train", "val", "test")
FORMAT = 1


@dataclass(frozen=True)
class SceneObject:
    """One object of a view.

    Attributes:
        instance: its value in the instance mask, starting at 1.
        category: name of its class.
        identity: individual object of the class; each identity is in exactly one split.
        material: e.g. ``ceramic``.
        colour: colour name, or the material if it implies the colour (metals, wood, marble).
        pixels: number of visible pixels.
        box: ``(x0, y0, x1, y1)`` in pixels around the visible part, or zeros if none is visible.
    """

    instance: int
    category: str
    identity: str
    material: str
    colour: str
    pixels: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneAnnotation:
    """All annotations of one view. Masks and maps are sampled at pixel centres.

    Attributes:
        caption: one sentence about the view; it names only visible objects.
        captions: all captions, ``caption`` first, then ``a photo of a <class>`` of the subject.
        label: index of the subject's class in `Scenes.classes`.
        semantic: ``(H, W)`` uint8, 0 for background, else class index + 1.
        instances: ``(H, W)`` uint8, 0 for background, else `SceneObject.instance`.
        depth: ``(H, W)`` float32, metres along the optical axis (z-depth).
        normals: ``(3, H, W)`` float32 unit vectors in the camera frame, facing the camera.
        K: ``(3, 3)`` float64 intrinsics in pixels; pixel centres lie at +0.5.
        cam_from_world: ``(4, 4)`` float64 rigid transform; cameras are x right, y down, z forward; metres.
        objects: the scene's objects, the subject first.
        scene: e.g. ``s0003``.
        view: 0 or 1.
        split: ``train``, ``val`` or ``test``.
        light: name of the lighting.
        background: name of the background.
    """

    caption: str
    captions: tuple[str, ...]
    label: int
    semantic: np.ndarray
    instances: np.ndarray
    depth: np.ndarray
    normals: np.ndarray
    K: np.ndarray
    cam_from_world: np.ndarray
    objects: tuple[SceneObject, ...]
    scene: str
    view: int
    split: str
    light: str
    background: str


@dataclass(frozen=True)
class ScenePair:
    """Two views of a scene.

    Attributes:
        first: index of view 0 in the source.
        second: index of view 1.
        points: ``(N, 2, 2)`` float32: ``(x, y)`` pixels in view 0 and view 1 of each point visible in both.
    """

    first: int
    second: int
    points: np.ndarray


class Scenes(Source):
    """The bundled rendered benchmark: two views per scene, with all annotations.

    Args:
        split: ``train``, ``val``, ``test`` (disjoint in object identities) or ``all``.
        path: another archive of the same format; None selects the bundled one.

    Raises:
        ValueError: no such split.
        AssetError: the archive is missing, damaged or of another format (on first use).
    """

    def __init__(self, *, split: str = "train", path: str | None = None) -> None:
        if split not in (*SPLITS, "all"):
            raise ValueError(f"source scenes: no split {split!r}; choose from: {', '.join((*SPLITS, 'all'))}")
        self.split = split
        self.path = BUNDLED if path is None else Path(expanded(path))
        self._bundled = path is None
        # Filled on first use. No file is kept open, which makes copies in other processes safe.
        self._members: dict[str, tuple[int, int]] | None = None
        self._meta: dict[str, Any] = {}
        self._views: list[tuple[str, int]] = []
        self._facts: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": None, "_meta": {}, "_views": [], "_facts": {}}

    def _open(self) -> dict[str, tuple[int, int]]:
        """Offset and size of each archive member; read once."""
        if self._members is not None:
            return self._members
        if self._bundled:
            verify(self.path, SHA256, "reinstall agglo: pip install --force-reinstall agglo")
        try:
            with tarfile.open(self.path, "r:") as archive:
                members = {info.name: (info.offset_data, info.size) for info in archive if info.isfile()}
            meta = json.loads(self._bytes("meta.json", members))
        except (OSError, KeyError, ValueError, tarfile.TarError) as error:
            raise AssetError(f"{self.path} is not a scenes archive ({error}); see docs/scenes.md") from error
        if meta.get("format") != FORMAT:
            raise AssetError(
                f"{self.path} has format {meta.get('format')}; this version reads {FORMAT}: render it again"
            )
        names = sorted(name for split in SPLITS if self.split in (split, "all") for name in meta["scenes"][split])
        self._views = [(name, view) for name in names for view in range(meta["views"])]
        self._meta = meta
        self._members = members  # last: its presence signals other threads that all is loaded
        return members

    def _bytes(self, member: str, members: dict[str, tuple[int, int]] | None = None) -> bytes:
        offset, size = (self._open() if members is None else members)[member]
        with self.path.open("rb") as file:  # opened per read, because threads must not share a position
            file.seek(offset)
            return file.read(size)

    def _scene(self, name: str) -> dict[str, Any]:
        if name not in self._facts:
            self._facts[name] = json.loads(self._bytes(f"{name}/scene.json"))
        return self._facts[name]

    def _at(self, index: int) -> tuple[str, int]:
        self._open()
        return self._views[index]

    def _image(self, index: int, kind: str) -> Image.Image:
        scene, view = self._at(index)
        try:
            image = Image.open(io.BytesIO(self._bytes(f"{scene}/v{view}.{kind}")))
            image.load()
        except (OSError, KeyError, SyntaxError) as error:
            raise ImageError(f"{self.name(index)}.{kind}", str(error)) from error
        return image

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; ``classes[i]`` has semantic value ``i + 1``."""
        self._open()
        return tuple(self._meta["classes"])

    @property
    def meta(self) -> dict[str, Any]:
        """``meta.json``: licence, renderer, identities and scenes of each split."""
        self._open()
        return self._meta

    def __len__(self) -> int:
        self._open()
        return len(self._views)

    def name(self, index: int) -> str:
        """E.g. ``scenes/s0003/v1``."""
        scene, view = self._at(index)
        return f"scenes/{scene}/v{view}"

    def read(self, index: int) -> Image.Image:
        """The RGB render.

        Raises:
            ImageError: it cannot be decoded.
        """
        return self._image(index, "webp").convert("RGB")

    def label(self, index: int) -> int:
        """Index into `classes` of the subject, the largest visible object."""
        return self.classes.index(self._scene(self._at(index)[0])["subject"])

    def annotation(self, index: int) -> SceneAnnotation:
        """All annotations of a view.

        Raises:
            ImageError: a mask or map cannot be decoded.
        """
        scene, view = self._at(index)
        facts = self._scene(scene)
        row = facts["views"][view]
        normals = np.asarray(self._image(index, "normal.png"), np.float32).transpose(2, 0, 1) / 127.5 - 1
        normals /= np.linalg.norm(normals, axis=0, keepdims=True)
        objects = [{**item, "category": item["class"], "box": tuple(item["box"])} for item in row["objects"]]
        return SceneAnnotation(
            caption=row["caption"],
            captions=tuple(row["captions"]),
            label=self.label(index),
            semantic=np.array(self._image(index, "sem.png"), np.uint8),
            instances=np.array(self._image(index, "inst.png"), np.uint8),
            depth=np.array(self._image(index, "depth.png"), np.float32) / np.float32(self._meta["depth_scale"]),
            normals=normals,
            K=np.array(row["K"], np.float64),
            cam_from_world=np.array(row["cam_from_world"], np.float64),
            objects=tuple(SceneObject(**{k: v for k, v in item.items() if k != "class"}) for item in objects),
            scene=scene,
            view=view,
            split=facts["split"],
            light=facts["light"],
            background=facts["background"],
        )

    def pairs(self) -> list[ScenePair]:
        """The two views of every scene of the split, with the points visible in both."""
        found = []
        for second in range(1, len(self), 2):
            points = np.load(io.BytesIO(self._bytes(f"{self._at(second)[0]}/corr.npy")))
            found.append(ScenePair(second - 1, second, points))
        return found
