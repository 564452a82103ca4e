"""SPair-71k: matching key points in pairs of images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agglo.sources._dataset import FileSource, Layout
from agglo.types import ConfigError

LAYOUT = Layout(
    "spair",
    "cvlab.postech.ac.kr/research/SPair-71k (SPair-71k.tar.gz, 230 MB)",
    "JPEGImages/<category>/*.jpg, PairAnnotation/{trn,val,test}/*.json",
    ("SPair-71k",),
    ("PairAnnotation",),
)
SPLITS = {"train": "trn", "val": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class KeyPointPair:
    """Two images of one category.

    Attributes:
        first: index of the source image.
        second: index of the target image.
        points: ``(N, 2, 2)`` float32: ``(x, y)`` of each key point in the first and in the second image.
        box: ``xyxy`` of the object in the second image.
        category: its class.
    """

    first: int
    second: int
    points: np.ndarray
    box: tuple[float, float, float, float]
    category: str


class SPair(FileSource):
    """SPair-71k (Min et al. 2019): 12 234 test pairs of 18 categories.

    With ``pairs`` set, the pairs of each category whose file names have the smallest SHA-256 are used, a deterministic
    subset. Published results use random subsets.

    Args:
        path: the folder ``SPair-71k``, or its parent folder.
        split: ``train``, ``val`` or ``test``.
        pairs: number of pairs per category; 0 for all.

    Raises:
        ConfigError: it is absent, or images of its pairs are missing (counted).
    """

    def __init__(self, *, path: str, split: str = "test", pairs: int = 0) -> None:
        if pairs < 0:
            raise ConfigError(f"source spair: pairs: {pairs} is negative; use 0 for all")
        root = LAYOUT.root(path)
        folder = root / "PairAnnotation" / SPLITS[LAYOUT.check_split(split, tuple(SPLITS))]
        found = sorted(folder.glob("*.json")) if folder.is_dir() else []
        if not found:
            raise LAYOUT.no_images(folder)
        chosen = _select(found, pairs)
        self._facts = LAYOUT.valid({str(file): file for file in chosen}, _facts)
        names = sorted({name for facts in self._facts for name in facts[:2]})
        super().__init__("spair", root, names)
        LAYOUT.require_files((self.file(i) for i in range(len(self))), "images")
        self._image_sizes = {name: size for facts in self._facts for name, size in facts[5].items() if size}
        self._index = {name: i for i, name in enumerate(names)}
        self.classes = tuple(sorted({name.split("/")[1] for name in names}))

    def truth_size(self, index: int) -> tuple[int, int] | None:
        """Size that the annotations of its pairs state."""
        return self._image_sizes.get(self._files[index])

    def label(self, index: int) -> int:
        """Index into ``classes``."""
        return self.classes.index(self._files[index].split("/")[1])

    def pairs(self) -> list[KeyPointPair]:
        """The pairs, in the order of their files."""
        return [
            KeyPointPair(self._index[first], self._index[second], points, box, category)
            for first, second, points, box, category, _ in self._facts
        ]


_Facts = tuple[str, str, np.ndarray, tuple[float, float, float, float], str, dict[str, tuple[int, int] | None]]


def _select(files: list[Path], count: int) -> list[Path]:
    """``count`` files per category (0: all); ``000012-2008_01-2008_02:cat.json`` is of the category cat."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        category = file.stem.rpartition(":")[2] if ":" in file.stem else _category(file)
        groups.setdefault(category, []).append(file)

    def digest(file: Path) -> str:
        return hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).hexdigest()

    return sorted(file for group in groups.values() for file in (sorted(group, key=digest)[:count] if count else group))


def _category(file: Path) -> str:
    try:
        return str(_read(file)["category"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # left out and named when the pair is read


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8-sig"))


def _facts(file: Path) -> _Facts:
    entry = _read(file)
    category = str(entry["category"])
    names = [f"JPEGImages/{category}/{entry[key]}" for key in ("src_imname", "trg_imname")]
    points = np.stack([np.asarray(entry[key], np.float32).reshape(-1, 2) for key in ("src_kps", "trg_kps")], 1)
    x0, y0, x1, y1 = (float(value) for value in entry["trg_bndbox"])
    sizes = [(int(entry[key][1]), int(entry[key][0])) if key in entry else None for key in ("src_imsize", "trg_imsize")]
    return names[0], names[1], points, (x0, y0, x1, y1), category, dict(zip(names, sizes, strict=True))
