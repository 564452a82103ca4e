"""NYU Depth v2: indoor scenes with depth, in any of its published formats."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from agglo.extras import require
from agglo.preprocess import decode
from agglo.sources._dataset import Layout, list_files, normals_from_depth, read_mask
from agglo.sources._paths import expanded
from agglo.sources.base import Source
from agglo.types import ConfigError, ImageError

LAYOUT = Layout(
    "nyu",
    "cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html (nyu_depth_v2_labeled.mat, 2.8 GB, and splits.mat)",
    "nyu_depth_v2_labeled.mat and splits.mat; or <split>/*_colors.png and <split>/*_depth.png (16 bits, millimetres); "
    "or <split>/*.npz or <split>/*.h5 with image (or rgb) and depth (metres)",
    ("nyu_depth_v2", "nyu"),
    ("nyu_depth_v2_labeled.mat", "test", "train"),
)
FOCAL, CENTRE = (518.85790117450188, 519.46961112127485), (325.58244941119034, 253.73616633400465)
"""Colour camera parameters for 640 x 480 pixels, from the dataset's toolbox."""
FULL = (480, 640)


class _Entry(NamedTuple):
    """An image and its depth, read on demand."""

    name: str
    image: Callable[[], Image.Image]
    depth: Callable[[], np.ndarray]


class Nyu(Source):
    """NYU Depth v2 (Silberman et al. 2012): 795 labelled training and 654 test images.

    ``annotation(index)`` has ``depth`` ``(H, W)`` in metres (0 unknown), ``normals`` ``(3, H, W)`` derived from
    it, and ``K``.

    Args:
        path: the folder, or the labelled ``.mat`` file with ``splits.mat`` in the same folder.
        split: ``train`` or ``test``.

    Raises:
        ConfigError: it is absent, or images have no depth (counted).
        MissingExtraError: ``.mat`` and ``.h5`` files need h5py and scipy.
    """

    def __init__(self, *, path: str, split: str = "test") -> None:
        LAYOUT.check_split(split, ("train", "test"))
        base = Path(expanded(path)).expanduser()
        root = base.parent if base.suffix == ".mat" and base.is_file() else LAYOUT.root(path)
        mat = root / "nyu_depth_v2_labeled.mat"
        self._entries = _labelled(mat, split) if mat.is_file() else _files(root / split)
        if not self._entries:
            raise LAYOUT.no_images(root / split)
        self._split = split

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """E.g. ``nyu/test/00012``."""
        return f"nyu/{self._split}/{self._entries[index].name}"

    def read(self, index: int) -> Image.Image:
        return self._entries[index].image()

    def annotation(self, index: int) -> SimpleNamespace:
        """``depth``, ``normals`` and ``K``."""
        depth = self._entries[index].depth().astype(np.float32)
        K = intrinsics(depth.shape)
        return SimpleNamespace(depth=depth, normals=normals_from_depth(depth, K), K=K)


def intrinsics(shape: tuple[int, ...]) -> np.ndarray:
    """``(3, 3)`` of the colour camera for maps of size ``(H, W)``, pixel centres at +0.5."""
    sx, sy = shape[1] / FULL[1], shape[0] / FULL[0]
    x, y = CENTRE[0] - 0.5, CENTRE[1] - 0.5  # the toolbox numbers pixels from 1, at their centres
    return np.array([[FOCAL[0] * sx, 0, x * sx], [0, FOCAL[1] * sy, y * sy], [0, 0, 1]])


# --- the labelled .mat file -------------------------------------------------------------------------------------------


class _Mat:
    """One image or depth map of the labelled file; MATLAB stores the axes in reverse."""

    def __init__(self, path: Path, row: int, field: str) -> None:
        self.path, self.row, self.field = path, row, field

    def array(self) -> np.ndarray:
        with require("h5py", "eval").File(self.path, "r") as file:
            return np.asarray(file[self.field][self.row])

    def __call__(self) -> Any:
        array = self.array()
        return Image.fromarray(array.transpose(2, 1, 0)) if self.field == "images" else array.T


def _labelled(mat: Path, split: str) -> list[_Entry]:
    splits = mat.with_name("splits.mat")
    LAYOUT.require_files([splits], "lists of splits")
    key = "trainNdxs" if split == "train" else "testNdxs"
    rows = require("scipy.io", "eval").loadmat(splits)[key].reshape(-1).astype(int) - 1
    try:
        with require("h5py", "eval").File(mat, "r") as file:
            count = min(len(file["images"]), len(file["depths"]))
    except (OSError, KeyError) as error:
        raise ConfigError(
            f"source nyu: {mat} is truncated or damaged ({error}). Get it from {LAYOUT.download}"
        ) from error
    missing = int((rows >= count).sum())
    if missing:
        raise ConfigError(
            f"source nyu: {missing} of {len(rows)} images of {split} are not in {mat}. Get it from {LAYOUT.download}"
        )
    return [_Entry(f"{row:05d}", _Mat(mat, row, "images"), _Mat(mat, row, "depths")) for row in rows.tolist()]


# --- one file per image -----------------------------------------------------------------------------------------------


class _Arrays:
    """One array of an ``.npz`` or ``.h5`` file."""

    def __init__(self, path: Path, names: tuple[str, ...], is_image: bool) -> None:
        self.path, self.names, self.is_image = path, names, is_image

    def __call__(self) -> Any:
        try:
            array = self._read()
        except (OSError, KeyError, ValueError) as error:
            raise ImageError(str(self.path), str(error)) from error
        if not self.is_image:
            return array
        return Image.fromarray(array.transpose(1, 2, 0) if array.shape[0] == 3 else array)

    def _read(self) -> np.ndarray:
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as file:
                return np.asarray(file[self._key(file.files)])
        with require("h5py", "eval").File(self.path, "r") as file:
            return np.asarray(file[self._key(list(file.keys()))])

    def _key(self, keys: list[str]) -> str:
        found = next((name for name in self.names if name in keys), None)
        if found is None:
            raise KeyError(f"holds {', '.join(keys)}, but none of {', '.join(self.names)}")
        return found


class _ImageFile:
    """An encoded image."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __call__(self) -> Image.Image:
        return decode(io.BytesIO(self.path.read_bytes()) if self.path.is_file() else self.path, self.name)


class _DepthFile:
    """A 16-bit depth map in millimetres."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> np.ndarray:
        return read_mask(self.path).astype(np.float64) / 1000


def _files(folder: Path) -> list[_Entry]:
    arrays = list_files(folder, ".npz", ".h5")
    if arrays:
        return [
            _Entry(
                Path(name).stem,
                _Arrays(folder / name, ("image", "rgb"), is_image=True),
                _Arrays(folder / name, ("depth",), is_image=False),
            )
            for name in arrays
        ]
    names = [name for name in list_files(folder, ".png", ".jpg") if Path(name).stem.endswith("_colors")]
    stems = [Path(name).stem.removesuffix("_colors") for name in names]
    depths = [folder / f"{stem}_depth.png" for stem in stems]
    LAYOUT.require_files(depths, "depth maps")
    others = [name.removesuffix("_depth.png") for name in list_files(folder, ".png") if name.endswith("_depth.png")]
    known = {stem: folder / name for stem, name in zip(stems, names, strict=True)}
    LAYOUT.require_files([known.get(stem, folder / f"{stem}_colors.png") for stem in others], "images")
    return [
        _Entry(stem, _ImageFile(folder / name, f"nyu/{folder.name}/{stem}"), _DepthFile(depth))
        for stem, name, depth in zip(stems, names, depths, strict=True)
    ]
