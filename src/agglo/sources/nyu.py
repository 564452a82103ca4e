"""NYU Depth v2: indoor scenes with depth, in any of its published formats."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from agglo.decoding import decode
from agglo.extras import require
from agglo.files import printable
from agglo.preprocess import read_image
from agglo.sources._dataset import Layout, list_files, map_size, normals_from_depth, read_depth
from agglo.sources._paths import expanded
from agglo.sources.base import Source
from agglo.types import ConfigError, ImageError

_log = logging.getLogger(__name__)

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
        base = Path(expanded(path))
        given = base.suffix == ".mat" and base.is_file()
        root = base.parent if given else LAYOUT.root(path)
        mat = base if given else root / "nyu_depth_v2_labeled.mat"
        self._entries = _labelled(mat, split) if mat.is_file() else _files(root / split)
        self._files = [mat] if mat.is_file() else sorted(file for file in (root / split).iterdir() if file.is_file())
        if not self._entries:
            raise LAYOUT.no_images(root / split)
        self._split = split

    def data_files(self) -> list[Path]:
        """Local files that hold the images or annotations, for hashes."""
        return self._files

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """E.g. ``nyu/test/00012``."""
        return printable(f"nyu/{self._split}/{self._entries[index].name}")

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


def _read_mat(path: Path, row: int, field: str) -> Any:
    """One image or depth map of the labelled file; MATLAB stores the axes in reverse."""
    with require("h5py", "eval").File(path, "r") as file:
        array = np.asarray(file[field][row])
    return Image.fromarray(array.transpose(2, 1, 0)) if field == "images" else array.T


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
    return [
        _Entry(f"{row:05d}", partial(_read_mat, mat, row, "images"), partial(_read_mat, mat, row, "depths"))
        for row in rows.tolist()
    ]


# --- one file per image -----------------------------------------------------------------------------------------------


def _read_arrays(path: Path, names: tuple[str, ...]) -> np.ndarray:
    """The first of the named arrays in an ``.npz`` or ``.h5`` file."""
    try:
        with np.load(path, allow_pickle=False) if path.suffix == ".npz" else require("h5py", "eval").File(path) as file:
            found = next((name for name in names if name in file), None)
            if found is None:
                raise KeyError(f"holds {', '.join(file)}, but none of {', '.join(names)}")
            return np.asarray(file[found])
    except (OSError, KeyError, ValueError) as error:
        raise ImageError(str(path), str(error)) from error


def _read_image_array(path: Path) -> Image.Image:
    array = _read_arrays(path, ("image", "rgb"))
    return read_image(array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] == 3 else array, str(path))


def _read_depth_array(path: Path) -> np.ndarray:
    array = _read_arrays(path, ("depth",))
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ImageError(str(path), f"depth is {array.dtype} {array.shape}; expected floats (H, W) in metres")
    return array


def _read_image(path: Path, depth: Path, name: str) -> Image.Image:
    return decode(path, name, upright=False, size=map_size(depth))


def _read_millimetres(path: Path) -> np.ndarray:
    return read_depth(path) / 1000


def _files(folder: Path) -> list[_Entry]:
    arrays = list_files(folder, ".npz", ".h5")
    pairs = [name for name in list_files(folder, ".png", ".jpg") if Path(name).stem.endswith("_colors")]
    if arrays:
        if pairs:
            _log.warning("%s: left out %d pairs of images beside %d arrays", folder, len(pairs), len(arrays))
        return [
            _Entry(
                Path(name).stem,
                partial(_read_image_array, folder / name),
                partial(_read_depth_array, folder / name),
            )
            for name in arrays
        ]
    stems = [Path(name).stem.removesuffix("_colors") for name in pairs]
    depths = [folder / f"{stem}_depth.png" for stem in stems]
    LAYOUT.require_files(depths, "depth maps")
    others = [name.removesuffix("_depth.png") for name in list_files(folder, ".png") if name.endswith("_depth.png")]
    known = {stem: folder / name for stem, name in zip(stems, pairs, strict=True)}
    LAYOUT.require_files([known.get(stem, folder / f"{stem}_colors.png") for stem in others], "images")
    return [
        _Entry(
            stem,
            partial(_read_image, folder / name, depth, printable(f"nyu/{folder.name}/{stem}")),
            partial(_read_millimetres, depth),
        )
        for stem, name, depth in zip(stems, pairs, depths, strict=True)
    ]
