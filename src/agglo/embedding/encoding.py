"""Images to vectors, in memory or into a file as they are computed, and search by text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from agglo.data.loader import evaluation_batches
from agglo.embedding.images import Rest, as_source
from agglo.embedding.journal import Journal, Rows, storing
from agglo.embedding.limits import check_memory, check_output, legal_size
from agglo.embedding.tables import ROW_GROUP, Embeddings, EmbeddingsFile, aligned_column, metadata, write_parquet
from agglo.extras import require
from agglo.files import replacing
from agglo.model.model import Model
from agglo.results.identity import model_hash
from agglo.sources.base import Source
from agglo.types import ConfigError
from agglo.zoo.loading import DEFAULT, load

Progress = Callable[[int, int], None]
"""Called with (images done, total images) at the start and after every batch."""

READERS = min(4, os.cpu_count() or 1)
"""Threads that decode and resize while the model computes."""


@dataclass(frozen=True, slots=True)
class Hit:
    """An image of a ranking: its name and its cosine similarity with the text."""

    name: str
    score: float


@dataclass(frozen=True, slots=True)
class _Job:
    """The images and the settings that rows depend on.

    Args:
        source: the images.
        model: the loaded model.
        name: of the model.
        view: ``(H, W)`` of its input.
        head: the text-aligned head, or None.
        batch: images per batch.
    """

    source: Source
    model: Model
    name: str
    view: tuple[int, int]
    head: str | None
    batch: int

    def facts(self) -> dict[str, Any]:
        return {"model": model_hash(self.model), "size": list(self.view), "head": self.head}

    def parts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Summaries, and text-aligned embeddings if there is a head."""
        width = self.model.spec.summary or 0
        return rows[:, :width], None if self.head is None else rows[:, width:]


def embed(
    images_or_dir: str | Path | Source | Iterable[Any],
    model: str | Path | Model = DEFAULT,
    *,
    size: int | None = None,
    batch: int = 32,
    head: str | None = None,
    progress: Progress | None = None,
    journal: str | Path | None = None,
) -> Embeddings:
    """Encode a folder, a source, or any images.

    The input is the centre square of each image, resized by :func:`agglo.preprocess.fit` as in the evals. Unreadable
    images and those with non-finite features are skipped and listed in ``skipped``.

    Args:
        images_or_dir: a folder (searched recursively) or image file; a source; or an iterable of paths, PIL images,
            arrays and tensors.
        model: a model, a released name, or a folder.
        size: side of the square in pixels; None for the model's preferred size.
        batch: images per batch.
        head: the text-aligned head for ``aligned``; None for the first.
        progress: called at the start and after every batch.
        journal: a file that receives the rows of each batch as soon as they are computed. A later call with the same
            file, model, size and head reuses the rows of image files that have not changed.

    Raises:
        ConfigError: no readable images, an illegal size or batch, more than fits into memory, an unknown text-aligned
            head, or a journal of another model, size or head.
        StorageError: the journal cannot be written; the rows in it are kept.
    """
    job = _prepare(images_or_dir, model, size, batch, head)
    kept = Rows(job.source) if journal is None else Journal(job.source, Path(journal), job.facts())
    try:
        skipped = _encode_rest(job, kept, progress)
        order = kept.indices()
        summary, vectors = job.parts(kept.read(order))
    finally:
        kept.close()
    names = tuple(job.source.name(index) for index in order)
    return Embeddings(names, summary, vectors, skipped, job.name, job.view, job.head)


def embed_file(
    images_or_dir: str | Path | Source | Iterable[Any],
    path: str | Path,
    model: str | Path | Model = DEFAULT,
    *,
    size: int | None = None,
    batch: int = 32,
    head: str | None = None,
    progress: Progress | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> EmbeddingsFile:
    """Encode images into a file, in memory that does not grow with their number.

    Rows are kept in ``<path>.partial`` as soon as they are computed; the same call continues from there after a kill,
    Ctrl-C or a full disk. When all rows are there, a Parquet file is written one row group at a time, in the order of
    the images, and ``<path>.partial`` is removed. An ``.npz`` file is written from memory.

    Args:
        images_or_dir: as in :func:`embed`.
        path: of a ``.parquet`` or ``.npz`` file.
        model, size, batch, head, progress: as in :func:`embed`.
        name: of the model in the file's metadata.
        overwrite: replace the file, and discard rows of another model, size or head.

    Raises:
        ConfigError: as :func:`embed`; an output path that cannot be used; or unfinished rows of another model, size or
            head, with what differs.
        MissingExtraError: ``.parquet`` without pyarrow installed.
        StorageError: the disk is full; finished rows are kept.
    """
    target = check_output(path, overwrite=overwrite)
    if target.suffix == ".parquet":
        require("pyarrow.parquet", "quickstart")  # before encoding, not after it
    job = _prepare(images_or_dir, model, size, batch, head)
    kept = Journal(job.source, unfinished(target), job.facts(), overwrite=overwrite)
    called = name or job.name
    try:
        skipped = _encode_rest(job, kept, progress)
        order, (first, aligned) = kept.indices(), job.parts(kept.read(kept.indices()[:1]))
        widths = {"summary": first.shape[1]}
        if aligned is not None:
            widths[aligned_column(job.head)] = aligned.shape[1]
        with storing(target):
            if target.suffix == ".parquet":
                with replacing(target) as partial:
                    write_parquet(partial, widths, metadata(called, job.view, job.head), _groups(job, kept, order))
            else:
                names = tuple(job.source.name(index) for index in order)
                whole = job.parts(kept.read(order))
                Embeddings(names, *whole, skipped, called, job.view, job.head).save(target, overwrite=overwrite)
    finally:
        kept.close()
    unfinished(target).unlink(missing_ok=True)
    return EmbeddingsFile(target, len(order), widths, skipped)


def unfinished(path: Path) -> Path:
    """The file that holds the rows of an output file that is not finished."""
    return path.with_name(f"{path.name}.partial")


def search(embeddings: Embeddings, model: str | Path | Model, text: str, k: int = 5) -> list[Hit]:
    """The k images most similar to a text, best first; ties keep the order of the images.

    Args:
        embeddings: from :func:`embed` with the same model.
        model: that model.
        text: free text.
        k: number of images; clamped to the number of embeddings.

    Raises:
        ConfigError: an empty text, ``k`` below 1, or a model without a text tower.
    """
    if not text.strip():
        raise ConfigError("the text to search for is empty")
    if k < 1:
        raise ConfigError(f"k must be at least 1, got {k}")
    model = load(model, heads="text") if isinstance(model, str | Path) else model
    if embeddings.aligned is None:
        _aligned_head(model, embeddings.head, needed=True)
        raise ConfigError("the embeddings have no text-aligned part: embed the images again with this model")
    with torch.inference_mode():
        query = model.encode_text([text], embeddings.head).float().cpu().numpy()[0]
    scores = embeddings.aligned @ query
    return [Hit(embeddings.names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:k]]


def encode(model: Model, images: torch.Tensor, head: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Summaries and text-aligned embeddings of a batch, as :func:`embed` computes them.

    Args:
        model: in eval mode.
        images: RGB ``(B, 3, H, W)`` in [0, 1], of a legal size.
        head: the text-aligned head, or None.

    Returns:
        ``(B, D)`` float32, and ``(B, E)`` float32 of unit norm; E is 0 without a head.

    Raises:
        ConfigError: the model has no summary.
    """
    with torch.inference_mode():
        out = model(images, heads=[] if head is None else [head], resize=False)
    if out.summary is None:
        raise ConfigError("this model has no summary to embed")
    vectors = None if head is None else out.heads[head].summary
    if vectors is None:
        return out.summary.float().cpu().numpy(), np.zeros((len(images), 0), np.float32)
    return out.summary.float().cpu().numpy(), F.normalize(vectors.float(), dim=-1).cpu().numpy()


def _prepare(images: Any, model: str | Path | Model, size: int | None, batch: int, head: str | None) -> _Job:
    called = str(model) if isinstance(model, str | Path) else str(model.provenance.get("recipe", "model"))
    model = load(model, heads="text") if isinstance(model, str | Path) else model
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    view, head = legal_size(model, size), _aligned_head(model, head)
    source = as_source(images)
    check_memory(model, view, min(batch, len(source)))
    return _Job(source, model, called, view, head, batch)


def _encode_rest(job: _Job, kept: Rows, progress: Progress | None) -> dict[str, str]:
    """Encode the images that have no row yet; returns the reasons of the skipped ones."""
    source, skipped = job.source, {}
    report = progress or (lambda done, total: None)
    rest = Rest(source, [index for index in range(len(source)) if index not in kept])
    done = len(kept)
    report(done, len(source))
    was_training = job.model.training
    job.model.eval()
    try:
        readable = rest.has_images(skipped, needed=not done)
        for found in evaluation_batches(rest, job.view, job.batch, workers=READERS) if readable else ():
            skipped |= found.skipped
            rows = np.concatenate(encode(job.model, found.images, job.head), axis=1)
            good = np.asarray(np.isfinite(rows).all(axis=1))
            for at, fine in zip(found.indices, good.tolist(), strict=True):
                if not fine:
                    skipped[rest.name(at)] = "its features are not finite"
            indices = [rest.indices[at] for at, fine in zip(found.indices, good.tolist(), strict=True) if fine]
            if indices:
                kept.append(indices, np.ascontiguousarray(rows[good], np.float32))
            done += len(indices)
            report(done + len(skipped), len(source))
    finally:
        job.model.train(was_training)
    if not done:
        raise ConfigError(f"the features of all {len(source)} images are not finite: the weights are damaged")
    report(len(source), len(source))
    return skipped


def _groups(job: _Job, kept: Rows, order: Sequence[int]) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    for start in range(0, len(order), ROW_GROUP):
        some = order[start : start + ROW_GROUP]
        arrays = [part for part in job.parts(kept.read(some)) if part is not None]
        yield [job.source.name(index) for index in some], arrays


def _aligned_head(model: Model, head: str | None, *, needed: bool = False) -> str | None:
    if head is None and not needed and all(config.text is None for config in model.head_configs.values()):
        return None
    try:
        return model.text_head(head)
    except TypeError as error:
        raise ConfigError(str(error)) from None
