"""NAVI: multi-view images of objects, with depth and cameras."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from agglo.sources._dataset import FileSource, Layout, map_size, normals_from_depth, read_depth, read_mask
from agglo.types import ConfigError

LAYOUT = Layout(
    "navi",
    "navidataset.github.io (navi_v1.0.tar.gz, 16 GB, or a later version)",
    "<object>/<scene>/{annotations.json, images/*.jpg, depth/*.png, masks/*.png} with scenes multiview-* and wild_set",
    ("navi_v1.5", "navi_v1.0", "navi_v1"),
    ("custom_splits", "*/*/annotations.json"),
)
DISPARITY = 65535 * 10
"""A stored value v is the depth ``DISPARITY / v`` in millimetres; 0 is unknown."""
MILLIMETRE = 0.001
TURN = np.diag([1.0, -1.0, -1.0, 1.0])
"""From cameras that look along -z with y up to cameras that look along +z with y down."""


@dataclass(frozen=True, slots=True)
class ViewPair:
    """Two views of one object: indices of the first and the second image."""

    first: int
    second: int


class Navi(FileSource):
    """NAVI (Jampani et al. 2023): photographs aligned with 3D scans of 36 objects.

    ``annotation(index)`` has ``depth`` ``(H, W)`` in metres (0 unknown), ``normals`` ``(3, H, W)`` derived from it,
    ``instances`` (1 on the object), ``K`` and ``cam_from_world``, where the world is the object frame. Cameras that
    look along -z are converted to look along +z.

    ``pairs()`` pairs each image of a multi-view scene with the one ``apart`` positions later in the split.

    Args:
        path: folder of the objects, or its parent folder.
        split: ``train``, ``val`` or ``all``, as listed in ``annotations.json``.
        scenes: ``multiview``, ``wild_set``, ``video`` or ``all``.
        apart: distance between the images of a pair.

    Raises:
        ConfigError: it is absent, or images, depths or masks are missing (counted).
    """

    upright = True  # depth, masks and cameras are of the upright photographs

    def __init__(self, *, path: str, split: str = "val", scenes: str = "multiview", apart: int = 1) -> None:
        if apart < 1:
            raise ConfigError(f"source navi: apart: {apart} is below 1")
        LAYOUT.check_split(split, ("train", "val", "all"))
        if scenes not in ("multiview", "wild_set", "video", "all"):
            raise ConfigError(f"source navi: no scenes {scenes!r}; choose from: multiview, wild_set, video, all")
        root = LAYOUT.root(path)
        prefix = "" if scenes == "all" else scenes
        self._entries = [
            (folder, entry)
            for file in sorted(root.glob(f"*/{prefix}*/annotations.json"))
            for folder, entry in _entries(file, root)
            if split in ("all", entry.get("split"))
        ]
        if not self._entries:
            raise LAYOUT.no_images(root)
        super().__init__("navi", root, [f"{folder}/images/{entry['filename']}" for folder, entry in self._entries])
        LAYOUT.require_files((self.file(i) for i in range(len(self))), "images")
        LAYOUT.require_files((self._png(i, "depth") for i in range(len(self))), "depth maps")
        LAYOUT.require_files((self._png(i, "masks") for i in range(len(self))), "masks")
        self.classes = tuple(sorted({folder.split("/")[0] for folder, _ in self._entries}))
        self._apart = apart

    def _png(self, index: int, what: str) -> Path:
        folder, entry = self._entries[index]
        return self.root / folder / what / f"{Path(entry['filename']).stem}.png"

    def label(self, index: int) -> int:
        """Index of the object in ``classes``."""
        return self.classes.index(self._entries[index][0].split("/")[0])

    def truth_size(self, index: int) -> tuple[int, int] | None:
        """Size of the depth map."""
        return map_size(self._png(index, "depth"))

    def annotation_files(self, index: int) -> tuple[Path, ...]:
        """Paths of depth, mask and cameras."""
        cameras = self.root / self._entries[index][0] / "annotations.json"
        return (self._png(index, "depth"), self._png(index, "masks"), cameras)

    def annotation(self, index: int) -> SimpleNamespace:
        """Depth, normals, mask and camera of a view."""
        entry = self._entries[index][1]
        stored = read_depth(self._png(index, "depth"))
        with np.errstate(divide="ignore"):
            depth = np.where(stored > 0, DISPARITY * MILLIMETRE / stored, 0.0).astype(np.float32)
        height, width = (int(value) for value in entry["image_size"])
        focal = float(entry["camera"]["focal_length"])
        K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
        K[:2] *= [[depth.shape[1] / width], [depth.shape[0] / height]]  # maps may be smaller than the annotated size
        return SimpleNamespace(
            depth=depth,
            normals=normals_from_depth(depth, K),
            instances=(read_mask(self._png(index, "masks")) > 0).astype(np.uint8),
            K=K,
            cam_from_world=_pose(entry["camera"]),
        )

    def pairs(self) -> list[ViewPair]:
        """Pairs of views of every scene."""
        groups: dict[str, list[int]] = {}
        for index, (folder, _) in enumerate(self._entries):
            groups.setdefault(folder, []).append(index)
        return [
            ViewPair(first, second)
            for group in groups.values()
            for first, second in zip(group, group[self._apart :], strict=False)
        ]


def _entries(file: Path, root: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(entries, list):
            raise ValueError("it holds no list")
    except (OSError, ValueError) as error:
        raise ConfigError(f"source navi: {file} is damaged ({error}). Get it from {LAYOUT.download}") from error
    folder = file.parent.relative_to(root).as_posix()
    valid = LAYOUT.valid(dict(zip((f"{file}, entry {i}" for i in range(len(entries))), entries, strict=True)), _check)
    return [(folder, entry) for entry in valid]


def _check(entry: dict[str, Any]) -> dict[str, Any]:
    camera = entry["camera"]
    _ = str(entry["filename"]), float(camera["focal_length"])
    if (len(camera["q"]), len(camera["t"]), len(entry["image_size"])) != (4, 3, 2):
        raise ValueError("a camera has q of 4 numbers and t of 3, an image_size 2")
    return entry


def _pose(camera: dict[str, Any]) -> np.ndarray:
    """``(4, 4)`` transform from object to camera frame, metres."""
    w, x, y, z = np.asarray(camera["q"], np.float64) / np.linalg.norm(camera["q"])
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = np.asarray(camera["t"], np.float64) * MILLIMETRE
    return TURN @ pose if pose[2, 3] < 0 else pose  # the object lies in front of the camera
