"""Images in a folder."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agglo.decoding import read_regular
from agglo.files import printable
from agglo.sources._encoded import EncodedSource
from agglo.sources._index import ProgressCounter, Table, TableWriter, index_path, read
from agglo.sources._paths import EXTENSIONS, expanded, left_out, not_found
from agglo.types import ConfigError

_log = logging.getLogger(__name__)

_CACHED_FROM = 50_000
"""Listings of at least this many images are cached on disk; shorter ones are fast enough to repeat."""
_COARSE = 2_000_000_000
"""Nanoseconds within which two changes may have the same modification time on the coarsest file systems."""


class Folder(EncodedSource):
    """All images below a folder, sorted by path; or the single image file that ``path`` names.

    Hidden files and folders are skipped. Symbolic links to folders are followed, each real folder once. Sub-folders
    serve as class labels (:meth:`label`).

    The listing of a large folder is cached (``$AGGLO_CACHE``) and memory-mapped. It is repeated when the modification
    time of any folder below differs, that is, when a file or folder was added, removed or renamed; the contents of
    files do not count.

    Args:
        path: a folder, or one image file (any extension); ``~`` and ``${VARIABLES}`` are expanded.
        recursive: include sub-folders.
        extensions: extensions of image files, case-insensitive, with or without the dot; null for all that Pillow
            commonly reads. Other files, except text and tables, are then counted and named in a warning.
        share: keep the images whose names hash into ``[low, high)`` of [0, 1): a split that is independent of the
            machine, the order and the other files. ``[0, 0.5]`` and ``[0.5, 1]`` are disjoint and complete.
        min_side: exclude images whose shorter side is smaller (pixels); 0 disables. Counted when they are read.
        min_pixels: exclude images with fewer pixels (height times width); 0 disables.
        max_aspect: exclude images whose longer side exceeds this multiple of the shorter; 0 disables.
        skip_uniform: exclude single-colour images.

    Raises:
        ConfigError: the path does not exist or holds no image, or a variable in it is not set.
    """

    def __init__(
        self,
        *,
        path: str,
        recursive: bool = True,
        extensions: tuple[str, ...] | None = None,
        share: tuple[float, float] = (0.0, 1.0),
        min_side: int = 0,
        min_pixels: int = 0,
        max_aspect: float = 0.0,
        skip_uniform: bool = False,
    ) -> None:
        super().__init__(min_side, skip_uniform, min_pixels, max_aspect)
        root = Path(expanded(path))
        if not 0 <= share[0] < share[1] <= 1:
            raise ConfigError(f"sources.folder.share: {list(share)} is not a range (low, high) in [0, 1]")
        if not root.exists():
            raise ConfigError(f"source folder: {not_found(path, root)}")
        if not root.is_dir() and not root.is_file():
            raise ConfigError(f"source folder: {path} is a pipe or a device; name a folder or an image file")
        self.root = root if root.is_dir() else root.parent
        self._prefix = self.root.resolve().name
        if root.is_file():
            with TableWriter() as writer:
                if _is_in(root.name, share):
                    writer.add(root.name)
                self._table = writer.finish({"images": 1}, None)
        else:
            suffixes = {"." + e.lower().removeprefix(".") for e in (EXTENSIONS if extensions is None else extensions)}
            self._table, walk = _listing(root, recursive, suffixes, share)
            if walk is not None and not walk.images:
                raise ConfigError(_empty(path, recursive, walk))
            lost = left_out(Counter(self._table.facts["others"]), "files", str(root)) if extensions is None else ""
            if lost:
                _log.warning("%s", lost)
        if not len(self._table):
            total = self._table.facts["images"]
            raise ConfigError(f"{path}: share {list(share)} selects none of its {total} images; widen it")

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        """The folder's name and the path inside it, with ``/``: equal on every machine."""
        return printable(f"{self._prefix}/{self._table.name(index)}")

    def file(self, index: int) -> Path:
        """Local path of an image."""
        return self.root / self._table.name(index)

    def encoded(self, index: int) -> bytes:
        return read_regular(os.path.join(self.root, self._table.name(index)), self.name(index))

    def label(self, index: int) -> str | None:
        """Class of an image: its parent folder relative to the root, ``"a/b"``; None for an image in the root."""
        return printable(self._table.name(index).rpartition("/")[0]) or None

    def empty_folders(self) -> list[str]:
        """Outermost sub-folders without images of this source in or below them: classes without examples."""
        held: set[str] = set()
        for index in range(len(self)):
            parent = self.label(index) or ""
            while parent and parent not in held:
                held.add(parent)
                parent = parent.rpartition("/")[0]
        walked = (printable(str(name)).rstrip("/") for name, _ in self._table.facts.get("stamps", ()))
        return sorted(name for name in walked if name not in {*held, ""} and name.rpartition("/")[0] in {*held, ""})

    def labels(self) -> list[str] | None:
        """The class of each image, or None unless every image lies in a sub-folder."""
        labels = [label for i in range(len(self)) if (label := self.label(i)) is not None]
        return labels if len(labels) == len(self) else None


@dataclass
class _Walk:
    """One pass over a folder tree.

    Names are yielded in the sorted order of their paths, so that only one folder's names are held at a time: within a
    folder, files sort by name and sub-folders by name followed by ``/``.

    Args:
        root: the folder.
        recursive: whether to enter sub-folders.
        suffixes: suffixes of image files, lower case, with the dot.
        images: number of images found.
        others: number of other files by suffix without the dot, or by a phrase.
        folders: number of sub-folders.
        stamps: each folder, with its modification time before it was listed.
    """

    root: Path
    recursive: bool
    suffixes: set[str]
    images: int = 0
    others: Counter[str] = field(default_factory=Counter)
    folders: int = 0
    stamps: list[tuple[str, int]] = field(default_factory=list)

    def names(self) -> Iterator[str]:
        """Paths of the images relative to the root, with ``/``, sorted."""
        visited: set[tuple[int, int]] = set()  # links may form loops, or lead to one folder twice
        stack: list[tuple[str, Iterator[str]]] = [("", iter(self._entries("", visited)))]
        while stack:
            prefix, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
            elif entry.endswith("/"):
                if self.recursive:
                    stack.append((prefix + entry, iter(self._entries(prefix + entry, visited))))
            else:
                self.images += 1
                yield prefix + entry

    def _entries(self, prefix: str, visited: set[tuple[int, int]]) -> list[str]:
        """A folder's images, and its sub-folders with a trailing ``/``, sorted so that whole paths are sorted."""
        folder = os.path.join(self.root, prefix)
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in visited:
                return []
            visited.add((facts.st_dev, facts.st_ino))
            self.stamps.append((prefix, facts.st_mtime_ns))
            names: list[str] = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    suffix = os.path.splitext(entry.name)[1].lower()
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        self.folders += 1
                        names.append(entry.name + "/")
                    elif suffix in self.suffixes and _is_file(entry):
                        names.append(entry.name)
                    elif suffix in self.suffixes:
                        self.others["pipes or devices"] += 1
                    else:
                        self.others[suffix.removeprefix(".") or "no ending"] += 1
        except OSError as error:
            _log.warning("skipped %s: it cannot be listed (%s)", folder, error.strerror or error)
            return []
        return sorted(names)


def _listing(root: Path, recursive: bool, suffixes: set[str], share: tuple[float, float]) -> tuple[Table, _Walk | None]:
    """A folder's image names, from the cache if still valid; and the walk, or None if none was needed."""
    cached = index_path("files", os.path.realpath(root), recursive, sorted(suffixes), list(share))
    table = read(cached)
    if table is not None and _is_unchanged(root, table):
        return table, None
    began = time.time_ns()
    walk, progress = _Walk(root, recursive, suffixes), ProgressCounter(f"listing {root}", "images")
    with TableWriter() as writer:
        for name in walk.names():
            progress.add()
            if _is_in(name, share):
                writer.add(name)
        progress.done()
        facts = {"images": walk.images, "others": dict(walk.others), "began": began, "stamps": walk.stamps}
        return writer.finish(facts, cached if walk.images >= _CACHED_FROM else None), walk


def _is_unchanged(root: Path, table: Table) -> bool:
    """Whether each folder has the modification time of its listing, and that time was not too recent to be unique."""
    newest = table.facts["began"] - _COARSE
    for name, stamp in table.facts["stamps"]:
        try:
            if stamp > newest or os.stat(os.path.join(root, name)).st_mtime_ns != stamp:
                return False
        except OSError:
            return False
    return True


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file, or a broken link, which is named when it is read."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _is_in(name: str, share: tuple[float, float]) -> bool:
    return share == (0.0, 1.0) or share[0] <= _hash(name) < share[1]


def _hash(name: str) -> float:
    """Machine-independent hash of a name, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def _empty(path: str, recursive: bool, walk: _Walk) -> str:
    where = "in it and its sub-folders" if recursive else "in it"
    searched = " ".join(f"*{e}" for e in sorted(walk.suffixes))
    message = f"source folder: no image in {path!r}; searched {where} for {searched}"
    if walk.others:
        kinds = ", ".join(
            f"{count} {suffix if ' ' in suffix else '.' + suffix}" for suffix, count in walk.others.most_common(5)
        )
        message += f"; found {walk.others.total()} other files ({kinds}): add their ending to `extensions` if images"
    if not recursive and walk.folders:
        message += f"; it has {walk.folders} sub-folders: set `recursive: true` to include them"
    return message
