"""Images in WebDataset shards."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from agglo.files import printable
from agglo.sources._encoded import EncodedSource
from agglo.sources._index import ProgressCounter, Table, open_table
from agglo.sources._paths import EXTENSIONS, left_out
from agglo.sources._shards import Shard, ShardError, locate
from agglo.sources.base import SourceError
from agglo.types import ConfigError, ImageError

_log = logging.getLogger(__name__)
_THREADS = 8
_NAMED = 5
"""Number of items named in a message before the rest is only counted."""
_cached_table = lru_cache(maxsize=4096)(open_table)


class WebDataset(EncodedSource):
    """All images in WebDataset shards, in the order of the shards and of the members in each.

    The ``webdataset`` package streams shards, so what a step sees depends on workers and history. Here a step's images
    depend on the step alone, so that a run resumes exactly; that needs random access. Each shard is therefore scanned
    once for an index of its members, cached (``$AGGLO_CACHE``) by the shard's path, size and modification time. After
    that an image is one read at a known offset: a seek in a local file, a range request elsewhere. Range requests need
    no disk space, and workers hide their latency. Copying shards only pays off if nearly all of them fit, because
    images are drawn from all of them in random order: ``keep_gb`` copies the first ones that fit, never evicting any.

    A file that is not a tar archive, or a compressed one, is skipped; of a truncated or damaged shard the complete
    members are used. Both are named and counted, in the log and in :attr:`damaged`. Joined archives are read to the
    end; links have the bytes of their targets.

    Args:
        shards: paths, globs (``*``), brace ranges (``{0000..0127}``), folders (every ``*.tar`` in them), ``http(s)://``
            URLs, and URLs of object stores supported by fsspec (``s3://``, ``gs://``, ``hf://``, ...); ``${VARIABLES}``
            are expanded.
        extensions: extensions of image members, case-insensitive; null for all that Pillow commonly reads. As in
            WebDataset, a member's extension is all that follows the *first* dot of its file name: ``0001.seg.png`` has
            extension ``seg.png``, not ``png``. Other members, except text and tables, are counted and named in a
            warning.
        keep_gb: copy up to this many GB of remote shards into the cache folder.
        min_side: exclude images whose shorter side is smaller (pixels); 0 disables. Counted when they are read.
        min_pixels: exclude images with fewer pixels (height times width); 0 disables.
        max_aspect: exclude images whose longer side exceeds this multiple of the shorter; 0 disables.
        skip_uniform: exclude single-colour images.

    Attributes:
        damaged: what is wrong with each damaged shard, by path.

    Raises:
        ConfigError: a shard does not exist, or no shard holds an image.
        SourceError: a shard cannot be reached.
        MissingExtraError: the package for a protocol is not installed.
    """

    def __init__(
        self,
        *,
        shards: str | list[str],
        extensions: tuple[str, ...] | None = None,
        keep_gb: float = 0.0,
        min_side: int = 0,
        min_pixels: int = 0,
        max_aspect: float = 0.0,
        skip_uniform: bool = False,
    ) -> None:
        super().__init__(min_side, skip_uniform, min_pixels, max_aspect)
        found = locate([shards] if isinstance(shards, str) else shards)
        self._extensions = frozenset(
            e.lower().removeprefix(".") for e in (EXTENSIONS if extensions is None else extensions)
        )
        self.damaged: dict[str, str] = {}
        tables = self._open(found, keep_gb * 1e9)
        used = [(shard, table) for shard, table in zip(found, tables, strict=True) if table is not None and len(table)]
        self._warn(found, tables)
        if not used:
            raise ConfigError(_empty(found, tables, self._extensions, self.damaged))
        others = _others(tables)
        if extensions is not None:  # chosen on purpose, but for a dot in a name and a broken link
            others = Counter(
                {k: n for k, n in others.items() if " " in k or ("." in k and k.rpartition(".")[2] in self._extensions)}
            )
        if lost := left_out(others, "members", f"{len(found)} shards"):
            _log.warning("%s", lost)
        self.shards = [shard for shard, _ in used]
        self._labels = _labels([shard.path for shard in self.shards])
        self._ends = np.cumsum([len(table) for _, table in used])
        # Tables on disk are mapped on demand: a process cannot hold a hundred thousand maps.
        self._tables = [table if table.path is None else table.path for _, table in used]

    def _open(self, found: list[Shard], space: float) -> list[Table | None]:
        progress = ProgressCounter("indexing shards", "shards", len(found))
        try:
            with ThreadPoolExecutor(min(_THREADS, len(found)), thread_name_prefix="agglo-shards") as pool:
                missing = [path for path in pool.map(_missing, found) if path is not None]
                if missing:
                    names = ", ".join(missing[:_NAMED])
                    raise ConfigError(f"source webdataset: {len(missing)} of {len(found)} shards do not exist: {names}")
                kept = []
                for shard in found:
                    if shard.remote and shard.size <= space:
                        space -= shard.size
                        kept.append(shard)
                list(pool.map(Shard.keep, kept))
                tables = []
                for table in pool.map(self._table, found):
                    tables.append(table)
                    progress.add()
        finally:
            progress.done()
        return tables

    def _table(self, shard: Shard) -> Table | None:
        try:
            table = shard.table(self._extensions)
        except ShardError as error:
            self.damaged[shard.path] = str(error)
            return None
        if table.facts["damage"]:
            self.damaged[shard.path] = table.facts["damage"]
        return table

    def _warn(self, found: list[Shard], tables: Sequence[Table | None]) -> None:
        skipped = [shard.path for shard, table in zip(found, tables, strict=True) if table is None]
        for paths, what in (
            (skipped, "skipped"),
            ([path for path in self.damaged if path not in set(skipped)], "used in part"),
        ):
            if paths:
                each = "; ".join(f"{path} {self.damaged[path]}" for path in paths[:_NAMED])
                more = f"; and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
                _log.warning("%d of %d shards %s: %s%s", len(paths), len(found), what, each, more)

    def data_files(self) -> list[Path]:
        """Local files that hold the images or annotations, for hashes."""
        return [Path(shard.local) for shard in self.shards if shard.local]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, index: int) -> tuple[int, Table, int]:
        """``(shard number, table, row)`` of an image."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[number - 1]) if number else 0)
        table = self._tables[number]
        return number, _cached_table(table) if isinstance(table, Path) else table, row

    def name(self, index: int) -> str:
        """Shard and member name: ``shard-000012/0001234.jpg``."""
        number, table, row = self._at(index)
        return printable(f"{self._labels[number]}/{table.name(row)}")

    def encoded(self, index: int) -> bytes:
        number, table, row = self._at(index)
        offset, size = int(table.columns["offset"][row]), int(table.columns["size"][row])
        data = self.shards[number].read(offset, size)
        if len(data) != size:
            raise ImageError(self.name(index), f"truncated after {len(data)} of {size} bytes")
        return data


def _missing(shard: Shard) -> str | None:
    try:
        shard.stat()
    except FileNotFoundError:
        return shard.path
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise ConfigError(f"source webdataset: {shard.path} cannot be opened ({error.strerror or error})") from error
    return None


def _labels(paths: Sequence[str]) -> list[str]:
    """Short unique names of shards: file names, with as many parent folders as needed."""
    stems = [path.partition("?")[0].removesuffix(".tar").split("/") for path in paths]
    for depth in range(1, max(map(len, stems)) + 1):
        labels = ["/".join(stem[-depth:]) for stem in stems]
        if len(set(labels)) == len(labels):
            return labels
    return list(paths)


def _others(tables: Sequence[Table | None]) -> Counter[str]:
    """Number of members that are not images, by extension or by a phrase."""
    others: Counter[str] = Counter()
    for table in tables:
        others.update(table.facts["others"] if table is not None else {})
    return others


def _empty(
    found: list[Shard], tables: Sequence[Table | None], extensions: frozenset[str], damaged: dict[str, str]
) -> str:
    searched = " ".join(f".{e}" for e in sorted(extensions))
    message = f"source webdataset: no image in {len(found)} shards; searched for {searched}"
    others = _others(tables)
    if others:
        seen = ", ".join(f"{n} {name if ' ' in name else '.' + name}" for name, n in others.most_common(_NAMED))
        message += f"; found {seen}: add the extension, all that follows the first dot, to `extensions`"
    if damaged:
        path, why = next(iter(damaged.items()))
        message += f"; {os.path.basename(path)} {why}"
    return message
