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

from agglo.sources._encoded import EncodedSource
from agglo.sources._index import Table, read
from agglo.sources._paths import EXTENSIONS
from agglo.sources._progress import Tally
from agglo.sources._shards import Shard, locate
from agglo.sources._tar import ShardError
from agglo.sources.base import SourceError
from agglo.types import ConfigError, ImageError

_log = logging.getLogger(__name__)
_THREADS = 8
_NAMED = 5
"""How many of something are named before the rest is only counted."""


class WebDataset(EncodedSource):
    """Every image in WebDataset shards, in the order of the shards and of the members in each.

    The ``webdataset`` package streams shards: what a step sees depends on workers and history. Here a step's images
    depend on the step alone, so that a run resumes exactly; that needs an image by its number. So each shard is gone
    through once, for an index of its members, which is kept in the cache folder (``$AGGLO_CACHE``) under the shard's
    path, size and modification time; from then on an image is one read at a known place, by seeking in a local file and
    by a range request elsewhere. Range requests need neither disk nor order, and workers hide their latency. Keeping
    whole shards only pays where nearly all of them fit, since images come in random order from all of them: ``keep_gb``
    copies as many as it allows, the first ones, once, and never evicts.

    A shard that is no tar file, or a compressed one, is left out as a whole; of a truncated or damaged one the whole
    members are used. Both are named and counted, in the log and in :attr:`damaged`.

    Args:
        shards: paths, globs (``*``), brace ranges (``{0000..0127}``), folders (every ``*.tar`` in them), ``http(s)://``,
            and the URLs of object stores that fsspec knows (``s3://``, ``gs://``, ``hf://``, ...); ``${VARIABLES}``
            are expanded.
        extensions: endings of the members that are images, in any case. A member's ending is what follows the *first*
            dot of its file name, as WebDataset has it: ``0001.seg.png`` is no ``png``.
        keep_gb: keep copies of so many GB of remote shards in the cache folder.
        min_side: leave out images whose shorter side has fewer pixels; 0 for none. They are counted when they are met.
        min_pixels: leave out images of fewer pixels, height times width; 0 for none.
        max_aspect: leave out images whose longer side is more than so many times the shorter; 0 for none.
        skip_uniform: leave out images of one colour.

    Attributes:
        damaged: shard to what is wrong with it.

    Raises:
        ConfigError: a shard that does not exist, or no image in any of them.
        SourceError: a shard that cannot be reached.
        MissingExtraError: a protocol whose package is not installed.
    """

    def __init__(
        self,
        *,
        shards: str | list[str],
        extensions: tuple[str, ...] = EXTENSIONS,
        keep_gb: float = 0.0,
        min_side: int = 0,
        min_pixels: int = 0,
        max_aspect: float = 0.0,
        skip_uniform: bool = False,
    ) -> None:
        super().__init__(min_side, skip_uniform, min_pixels, max_aspect)
        found = locate([shards] if isinstance(shards, str) else shards)
        self._wanted = frozenset(e.lower().removeprefix(".") for e in extensions)
        self.damaged: dict[str, str] = {}
        tables = self._open(found, keep_gb * 1e9)
        whole = [(shard, table) for shard, table in zip(found, tables, strict=True) if table is not None and len(table)]
        self._tell(found, tables)
        if not whole:
            raise ConfigError(_empty(found, tables, self._wanted, self.damaged))
        self.shards = [shard for shard, _ in whole]
        self._labels = _labels([shard.path for shard in self.shards])
        self._ends = np.cumsum([len(table) for _, table in whole])
        # Tables on disk are opened when they are needed: a hundred thousand maps are more than a process may have.
        self._tables = [table if table.path is None else table.path for _, table in whole]

    def _open(self, found: list[Shard], room: float) -> list[Table | None]:
        tally = Tally("indexing shards", "shards", len(found))
        try:
            with ThreadPoolExecutor(min(_THREADS, len(found)), thread_name_prefix="agglo-shards") as pool:
                missing = [path for path in pool.map(_missing, found) if path is not None]
                if missing:
                    names = ", ".join(missing[:_NAMED])
                    raise ConfigError(f"source webdataset: {len(missing)} of {len(found)} shards do not exist: {names}")
                kept = []
                for shard in found:
                    if shard.remote and shard.size <= room:
                        room -= shard.size
                        kept.append(shard)
                list(pool.map(Shard.keep, kept))
                tables = []
                for table in pool.map(self._table, found):
                    tables.append(table)
                    tally.add()
        finally:
            tally.done()
        return tables

    def _table(self, shard: Shard) -> Table | None:
        try:
            table = shard.table(self._wanted)
        except ShardError as error:
            self.damaged[shard.path] = str(error)
            return None
        if table.facts["damage"]:
            self.damaged[shard.path] = table.facts["damage"]
        return table

    def _tell(self, found: list[Shard], tables: Sequence[Table | None]) -> None:
        lost = [shard.path for shard, table in zip(found, tables, strict=True) if table is None]
        for paths, what in (
            (lost, "left out as a whole"),
            ([path for path in self.damaged if path not in set(lost)], "used as far as they are whole"),
        ):
            if paths:
                each = "; ".join(f"{path} {self.damaged[path]}" for path in paths[:_NAMED])
                more = f"; and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
                _log.warning("%d of %d shards %s: %s%s", len(paths), len(found), what, each, more)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, index: int) -> tuple[int, Table, int]:
        """``(shard's number, its table, row)`` of an image."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"no image {index} in a source of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[number - 1]) if number else 0)
        table = self._tables[number]
        return number, _table(table) if isinstance(table, Path) else table, row

    def name(self, index: int) -> str:
        """The shard's name and the member's: ``shard-000012/0001234.jpg``."""
        number, table, row = self._at(index)
        return f"{self._labels[number]}/{table.name(row)}"

    def encoded(self, index: int) -> bytes:
        number, table, row = self._at(index)
        offset, size = int(table.columns["offset"][row]), int(table.columns["size"][row])
        data = self.shards[number].read(offset, size)
        if len(data) != size:
            raise ImageError(self.name(index), f"truncated after {len(data)} of {size} bytes")
        return data


@lru_cache(maxsize=4096)
def _table(path: Path) -> Table:
    table = read(path)
    if table is None:
        raise SourceError(f"{path}: this index is gone or damaged; start again, which builds it anew")
    return table


def _missing(shard: Shard) -> str | None:
    try:
        shard.look()
    except FileNotFoundError:
        return shard.path
    except OSError as error:
        if isinstance(error, SourceError):
            raise
        raise ConfigError(f"source webdataset: {shard.path} cannot be opened ({error.strerror or error})") from error
    return None


def _labels(paths: Sequence[str]) -> list[str]:
    """Short names of shards that are all different: file names, or as much more of the path as that takes."""
    stems = [path.partition("?")[0].removesuffix(".tar").split("/") for path in paths]
    for depth in range(1, max(map(len, stems)) + 1):
        labels = ["/".join(stem[-depth:]) for stem in stems]
        if len(set(labels)) == len(labels):
            return labels
    return list(paths)


def _empty(found: list[Shard], tables: Sequence[Table | None], wanted: frozenset[str], damaged: dict[str, str]) -> str:
    looked = " ".join(f".{e}" for e in sorted(wanted))
    message = f"source webdataset: no image in {len(found)} shards; looked for {looked}"
    others: Counter[str] = Counter()
    for table in tables:
        others.update(table.facts["others"] if table is not None else {})
    if others:
        seen = ", ".join(f"{count} .{name}" for name, count in others.most_common(_NAMED))
        message += f"; saw {seen}: name their ending, which is all that follows the first dot, in `extensions`"
    if damaged:
        path, why = next(iter(damaged.items()))
        message += f"; {os.path.basename(path)} {why}"
    return message
