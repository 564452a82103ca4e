"""Images in a folder."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from pathlib import Path

from agglo.preprocess import decode
from agglo.sources._encoded import EncodedSource
from agglo.sources._index import Writer
from agglo.sources._paths import EXTENSIONS, expanded
from agglo.sources._walk import listing
from agglo.types import ConfigError


class Folder(EncodedSource):
    """Every image below a folder, in the sorted order of their paths; or the one image a path names.

    Hidden files and folders are left out. Linked folders are followed, each real folder once. Sub-folders can be read
    as classes: see :meth:`label`.

    A folder of many images is listed once: its names are kept in the cache folder (``$AGGLO_CACHE``) and read through
    a memory map. They are listed again when the modification time of any folder below differs from what it was, which
    is whenever a file or folder was added, removed or renamed; what stands in the files is not part of it.

    Args:
        path: a folder, or one image file (of any ending); ``~`` and ``${VARIABLES}`` are expanded.
        recursive: look in sub-folders too.
        extensions: file endings that count as images, in any case, with or without the dot.
        share: keep the images whose names hash into ``[low, high)`` of [0, 1): a split that does not depend on the
            machine, the order or what else is in the folder. ``[0, 0.5]`` and ``[0.5, 1]`` are disjoint and complete.
        min_side: leave out images whose shorter side has fewer pixels; 0 for none. They are counted when they are met.
        min_pixels: leave out images of fewer pixels, height times width; 0 for none.
        max_aspect: leave out images whose longer side is more than so many times the shorter; 0 for none.
        skip_uniform: leave out images of one colour.

    Raises:
        ConfigError: the path does not exist or holds no image, or a variable in it is not set.
    """

    def __init__(
        self,
        *,
        path: str,
        recursive: bool = True,
        extensions: tuple[str, ...] = EXTENSIONS,
        share: tuple[float, float] = (0.0, 1.0),
        min_side: int = 0,
        min_pixels: int = 0,
        max_aspect: float = 0.0,
        skip_uniform: bool = False,
    ) -> None:
        super().__init__(min_side, skip_uniform, min_pixels, max_aspect)
        root = Path(expanded(path)).expanduser()
        if not 0 <= share[0] < share[1] <= 1:
            raise ConfigError(f"sources.folder: share is a range (low, high) in [0, 1], not {list(share)}")
        if not root.exists():
            raise ConfigError(_missing(path, root))
        self.root = root if root.is_dir() else root.parent
        self._prefix = self.root.resolve().name
        if root.is_file():
            with Writer() as writer:
                writer.add(root.name)
                self._table = writer.finish({}, None)
            return
        wanted = {"." + e.lower().removeprefix(".") for e in extensions}
        self._table, seen = listing(root, recursive, wanted, share)
        if seen is not None and not seen.images:
            raise ConfigError(_empty(path, recursive, wanted, seen.others, seen.folders))
        if not len(self._table):
            total = self._table.facts["images"]
            raise ConfigError(f"{path}: none of its {total} images falls into share {list(share)}: widen it")

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        """The folder's own name and the path inside it, with ``/``: the same on every machine."""
        return f"{self._prefix}/{self._table.name(index)}"

    def file(self, index: int) -> Path:
        """Where the image is on this machine."""
        return self.root / self._table.name(index)

    def encoded(self, index: int) -> bytes:
        path = os.path.join(self.root, self._table.name(index))
        try:
            with open(path, "rb", buffering=0) as file:
                return file.readall()
        except OSError:
            decode(path, self.name(index))  # knows what to call it
            raise

    def label(self, index: int) -> str | None:
        """The image's class: its parent folder relative to the root, ``"a/b"``; None for an image in the root."""
        return self._table.name(index).rpartition("/")[0] or None

    def empty_folders(self) -> list[str]:
        """Sub-folders without an image of this source in them or below: classes that there are none of."""
        held: set[str] = set()
        for index in range(len(self)):
            parent = self.label(index) or ""
            while parent and parent not in held:
                held.add(parent)
                parent = parent.rpartition("/")[0]
        walked = (str(name).rstrip("/") for name, _ in self._table.facts.get("stamps", ()))
        # Of folders in folders the outer one says it all.
        return sorted(name for name in walked if name not in {*held, ""} and name.rpartition("/")[0] in {*held, ""})

    def labels(self) -> list[str] | None:
        """The class of each image, or None unless every image lies in a sub-folder."""
        labels = [label for i in range(len(self)) if (label := self.label(i)) is not None]
        return labels if len(labels) == len(self) else None


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
