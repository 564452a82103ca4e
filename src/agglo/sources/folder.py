"""Images in a folder."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from pathlib import Path

from PIL import Image

from agglo.preprocess import decode
from agglo.sources.base import Source
from agglo.types import ConfigError

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


class Folder(Source):
    """Every image below a folder, in the sorted order of their paths; or the one image a path names.

    Hidden files and folders are left out. Linked folders are followed, each real folder once. Sub-folders can be read
    as classes: see :meth:`label`.

    Args:
        path: a folder, or one image file (of any ending); ``~`` and ``${VARIABLES}`` are expanded.
        recursive: look in sub-folders too.
        extensions: file endings that count as images, in any case, with or without the dot.
        share: keep the images whose names hash into ``[low, high)`` of [0, 1): a split that does not depend on the
            machine, the order or what else is in the folder. ``[0, 0.5]`` and ``[0.5, 1]`` are disjoint and complete.

    Raises:
        ConfigError: the path does not exist or holds no image, or a variable in it is not set.
    """

    def __init__(
        self,
        *,
        path: str,
        recursive: bool = True,
        extensions: tuple[str, ...] = _EXTENSIONS,
        share: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        root = Path(_expanded(path)).expanduser()
        if not 0 <= share[0] < share[1] <= 1:
            raise ConfigError(f"sources.folder: share is a range (low, high) in [0, 1], not {list(share)}")
        if not root.exists():
            raise ConfigError(_missing(path, root))
        self.root = root if root.is_dir() else root.parent
        self._prefix = self.root.resolve().name
        if root.is_file():
            self._relative = (root.name,)
            return
        wanted = {"." + e.lower().removeprefix(".") for e in extensions}
        found, others, folders = _scan(root, recursive, wanted)
        if not found:
            raise ConfigError(_empty(path, recursive, wanted, others, folders))
        self._relative = tuple(name for name in sorted(found) if share[0] <= _hash(name) < share[1])
        if not self._relative:
            raise ConfigError(f"{path}: none of its {len(found)} images falls into share {list(share)}: widen it")

    def __len__(self) -> int:
        return len(self._relative)

    def name(self, index: int) -> str:
        """The folder's own name and the path inside it, with ``/``: the same on every machine."""
        return f"{self._prefix}/{self._relative[index]}"

    def file(self, index: int) -> Path:
        """Where the image is on this machine."""
        return self.root / self._relative[index]

    def read(self, index: int) -> Image.Image:
        return decode(self.file(index), self.name(index))

    def label(self, index: int) -> str | None:
        """The image's class: its parent folder relative to the root, ``"a/b"``; None for an image in the root."""
        return self._relative[index].rpartition("/")[0] or None

    def labels(self) -> list[str] | None:
        """The class of each image, or None unless every image lies in a sub-folder."""
        labels = [label for i in range(len(self)) if (label := self.label(i)) is not None]
        return labels if len(labels) == len(self) else None


def _expanded(path: str) -> str:
    expanded = os.path.expandvars(path)
    if "${" in expanded:
        variable = expanded.partition("${")[2].partition("}")[0]
        raise ConfigError(f"{path}: the environment variable {variable} is not set: export {variable}=/path/to/images")
    return expanded


def _hash(name: str) -> float:
    """A name as a number in [0, 1), the same everywhere and for ever."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _scan(root: Path, recursive: bool, wanted: set[str]) -> tuple[list[str], Counter[str], int]:
    """Images as paths relative to ``root`` with ``/``; other files counted by ending; how many sub-folders."""
    found: list[str] = []
    others: Counter[str] = Counter()
    folders = 0
    seen: set[str] = set()  # links may form loops, or reach one folder twice
    for here, names, files in os.walk(root, followlinks=True):
        names[:] = sorted(n for n in names if not n.startswith("."))
        real = os.path.realpath(here)
        if real in seen:
            names[:] = []
            continue
        seen.add(real)
        folders += len(names)
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if file.startswith("."):
                continue
            if ending in wanted:
                found.append(Path(here, file).relative_to(root).as_posix())
            else:
                others[ending or "no ending"] += 1
        if not recursive:
            break
    return found, others, folders


def _missing(path: str, root: Path) -> str:
    parent = root.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(root.name, names, n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    return f"source folder: there is no folder or image {path!r}{hint}"


def _empty(path: str, recursive: bool, wanted: set[str], others: Counter[str], folders: int) -> str:
    where = "in it and its sub-folders" if recursive else "in it"
    looked = " ".join(f"*{e}" for e in sorted(wanted))
    message = f"source folder: no image in {path!r}; looked {where} for {looked}"
    if others:
        kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        message += f"; saw {others.total()} other files ({kinds}): name their ending in `extensions` if they are images"
    if not recursive and folders:
        message += f"; it has {folders} sub-folders: set `recursive: true` to look in them"
    return message
