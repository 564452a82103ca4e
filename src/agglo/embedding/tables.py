"""Embeddings in memory and in files: Parquet in row groups, or NumPy's .npz."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from agglo.embedding.limits import check_output
from agglo.extras import require
from agglo.files import replacing

ROW_GROUP = 8192
"""Rows per row group: 8192 rows of 1280 + 384 numbers take 55 MB of memory."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Embeddings of a set of images.

    Args:
        names: path or name of each of the N images, in input order.
        summary: ``(N, D)`` float32, the backbone's summary.
        aligned: ``(N, E)`` float32 of unit norm, in the text tower's space; None for a model without one.
        skipped: name to reason of the skipped images.
        model: name of the model.
        size: ``(H, W)`` of the model's input in pixels (centre crop).
        head: the head of ``aligned``.
    """

    names: tuple[str, ...]
    summary: np.ndarray
    aligned: np.ndarray | None
    skipped: dict[str, str] = field(default_factory=dict)
    model: str = ""
    size: tuple[int, int] = (0, 0)
    head: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``.parquet`` or ``.npz`` atomically.

        Columns (arrays): ``path``, ``summary``, and the text-aligned embedding under its head's name (``aligned`` if
        that is reserved). Model, size, head and agglo version are in the schema's metadata (JSON array ``metadata``).

        Raises:
            ConfigError: see :func:`agglo.embedding.check_output`.
            MissingExtraError: ``.parquet`` without pyarrow installed.
        """
        path = check_output(path, overwrite=overwrite)
        with replacing(path) as partial:
            if path.suffix == ".parquet":
                widths = {name: array.shape[1] for name, array in self.columns().items()}
                write_parquet(partial, widths, self.metadata(), self._groups())
            else:
                _write_npz(self, partial)
        return path

    def columns(self) -> dict[str, np.ndarray]:
        """Arrays by column name, without ``path``."""
        columns = {"summary": self.summary}
        if self.aligned is not None:
            columns[aligned_column(self.head)] = self.aligned
        return columns

    def metadata(self) -> dict[str, str]:
        """Model, size, version and head as strings."""
        return metadata(self.model, self.size, self.head)

    def _groups(self) -> Iterator[tuple[Sequence[str], list[np.ndarray]]]:
        for start in range(0, len(self), ROW_GROUP):
            rows = slice(start, start + ROW_GROUP)
            yield self.names[rows], [array[rows] for array in self.columns().values()]


@dataclass(frozen=True, slots=True)
class EmbeddingsFile:
    """A written file of embeddings.

    Args:
        path: of the file.
        images: number of rows.
        widths: column to length of its vectors.
        skipped: name to reason of the skipped images.
    """

    path: Path
    images: int
    widths: dict[str, int]
    skipped: dict[str, str]


def aligned_column(head: str | None) -> str:
    """Column of a head's text-aligned embedding."""
    return "aligned" if head in (None, "path", "summary", "metadata") else str(head)


def metadata(model: str, size: tuple[int, int], head: str | None) -> dict[str, str]:
    """Model, size, version and head as strings."""
    import agglo

    facts = {"model": model, "size": f"{size[0]}x{size[1]}", "version": agglo.__version__}
    return {f"agglo.{key}": value for key, value in {**facts, "head": head or ""}.items()}


def write_parquet(
    file: Path,
    widths: dict[str, int],
    metadata: dict[str, str],
    groups: Iterator[tuple[Sequence[str], list[np.ndarray]]],
) -> None:
    """Write a Parquet file one row group at a time.

    Args:
        file: to write.
        widths: column to length of its vectors, without ``path``.
        metadata: of the schema.
        groups: names and one ``(N, width)`` array per column, for each row group.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pa, parquet = require("pyarrow", "quickstart"), require("pyarrow.parquet", "quickstart")
    # Of a fixed size: Lance refuses variable lists for vector search, and they take longer to write.
    types = [pa.list_(pa.float32(), width) for width in widths.values()]
    fields = [pa.field("path", pa.string()), *(pa.field(name, each) for name, each in zip(widths, types, strict=True))]
    schema = pa.schema(fields, metadata=metadata)
    with parquet.ParquetWriter(file, schema) as writer:
        for names, arrays in groups:
            flat = [np.ascontiguousarray(array, np.float32).reshape(-1) for array in arrays]
            lists = [pa.FixedSizeListArray.from_arrays(pa.array(x), type=t) for x, t in zip(flat, types, strict=True)]
            writer.write_table(pa.Table.from_arrays([pa.array(names, pa.string()), *lists], schema=schema))


def _write_npz(embeddings: Embeddings, file: Path) -> None:
    # Strings as a unicode array, not objects: the file must load without pickle.
    with file.open("wb") as stream:
        np.savez(
            stream,
            path=np.array(embeddings.names),
            metadata=np.array(json.dumps(embeddings.metadata())),
            **embeddings.columns(),  # pyright: ignore[reportArgumentType]
        )
