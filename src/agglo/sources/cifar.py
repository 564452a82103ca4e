"""CIFAR-10 and CIFAR-100, in any of their published formats."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agglo.files import printable
from agglo.sources._dataset import Layout, read_text
from agglo.sources._paths import expanded
from agglo.sources.base import Source
from agglo.types import ConfigError

LAYOUT = Layout(
    "cifar",
    "cs.toronto.edu/~kriz/cifar.html (the Python or the binary version)",
    "cifar-10-batches-py, cifar-10-batches-bin, cifar-100-python or cifar-100-binary as unpacked; or an .npz file with "
    "x_train, y_train, x_test, y_test and names",
    ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"),
    ("batches.meta", "batches.meta.txt", "fine_label_names.txt", "meta"),
)
SIDE = 32
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


class Cifar(Source):
    """CIFAR (Krizhevsky 2009): 32 x 32 pixels, 10 or 100 (fine) classes, 50 000 training and 10 000 test images.

    Args:
        path: an unpacked folder, its parent folder, or an ``.npz`` file.
        split: ``train`` or ``test``.

    Raises:
        ConfigError: it is absent; batches are missing (counted) or truncated.
    """

    def __init__(self, *, path: str, split: str = "test") -> None:
        LAYOUT.check_split(split, ("train", "test"))
        base = Path(expanded(path))
        if base.suffix == ".npz":
            images, labels, names = _npz(base, split)
            self._files = [base]
        else:
            root = LAYOUT.root(path)
            images, labels, names = (_binary if list(root.glob("*.txt")) else _python)(root, split)
            self._files = sorted(file for file in root.iterdir() if file.is_file())
        if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
            wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
            raise ConfigError(f"source cifar: {path} holds label {wrong} but only {len(names)} class names")
        self._images, self._labels, self._split = images, labels, split
        self.classes = names

    def data_files(self) -> list[Path]:
        """Local files that hold the images or annotations, for hashes."""
        return self._files

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """E.g. ``cifar10/test/00012``."""
        return f"cifar{len(self.classes)}/{self._split}/{index % len(self):05d}"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def label(self, index: int) -> int:
        """Index into ``classes``."""
        return int(self._labels[index])


_Parts = tuple[np.ndarray, np.ndarray, tuple[str, ...]]


def _npz(path: Path, split: str) -> _Parts:
    if not path.is_file():
        raise ConfigError(f"source cifar: {path} does not exist. Get it from {LAYOUT.download}: {LAYOUT.structure}")
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels, names = file[f"x_{split}"], file[f"y_{split}"].reshape(-1), file["names"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"source cifar: {path} cannot be read ({error}); expected: {LAYOUT.structure}") from error
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(labels):
        raise ConfigError(
            f"source cifar: x_{split} of {path} is {images.dtype} {images.shape}; expected uint8 (N, H, W, 3)"
        )
    return images, labels, tuple(str(name) for name in names)


def _planes(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _binary(root: Path, split: str) -> _Parts:
    ten = (root / "batches.meta.txt").is_file()
    names = printable(read_text(root / ("batches.meta.txt" if ten else "fine_label_names.txt"))).split()
    if ten:
        files = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    else:
        files = [f"{split}.bin"]
    LAYOUT.require_files([root / name for name in files], "batches")
    width = 1 + 3 * SIDE**2 + (not ten)
    rows = []
    for name in files:
        data = np.fromfile(root / name, np.uint8)
        if not data.size or data.size % width:
            raise ConfigError(
                f"source cifar: {root / name} is truncated at {data.size} bytes. Get it from {LAYOUT.download}"
            )
        rows.append(data.reshape(-1, width))
    table = np.concatenate(rows)
    return _planes(table[:, -3 * SIDE**2 :]), table[:, 0 if ten else 1].astype(np.int64), tuple(names)


def _python(root: Path, split: str) -> _Parts:
    ten = (root / "batches.meta").is_file()
    if ten:
        files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    else:
        files = [split]
    LAYOUT.require_files([root / name for name in files], "batches")
    batches = [_load(root / name) for name in files]
    names = _load(root / ("batches.meta" if ten else "meta"))[b"label_names" if ten else b"fine_label_names"]
    labels = np.concatenate([np.array(batch[b"labels" if ten else b"fine_labels"], np.int64) for batch in batches])
    images = _planes(np.concatenate([np.asarray(batch[b"data"], np.uint8) for batch in batches]))
    return images, labels, tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, lists and strings; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _load(path: Path) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"source cifar: {path} is damaged ({error}). Get it from {LAYOUT.download}") from error
