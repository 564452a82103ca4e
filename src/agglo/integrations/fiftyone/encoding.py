"""Fields of a FiftyOne collection, computed where they are missing: embeddings, heatmaps, vectors of boxes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from agglo.extras import require
from agglo.integrations.fiftyone.model import AggloModel
from agglo.integrations.fiftyone.reading import Read, read
from agglo.integrations.fiftyone.records import DEPENDS, ERROR_FIELD, Failures, field_record, record_field
from agglo.types import ConfigError

_SELECTED = 100_000
"""Number of samples of one call of FiftyOne."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a call did.

    Args:
        computed: number of samples whose values were computed.
        reused: number of samples that had them.
        skipped: path to reason of the samples that could not be read; the samples' field ``agglo_error`` has it too.
    """

    computed: int
    reused: int
    skipped: dict[str, str]


def compute_embeddings(
    samples: Any, model: AggloModel, embeddings_field: str, *, overwrite: bool = False, **options: Any
) -> Report:
    """Embed the samples that have no embedding yet. A stopped call continues where it stopped.

    The values are those of ``samples.compute_embeddings(model, embeddings_field=...)``. Model, size, dtype and head are
    recorded in the ``info`` of the field, and embeddings of another model are not mixed with them.

    Args:
        samples: dataset or view of images or videos.
        model: from :func:`agglo.integrations.fiftyone.load_model`.
        embeddings_field: name of the field; of frames for videos.
        overwrite: compute all anew.
        options: of ``samples.compute_embeddings``: ``batch_size``, ``num_workers``, ``progress``, ... With
            ``skip_failures=False``, the first unreadable image raises; by default it is skipped. Other errors, for
            example a lack of memory, are always raised (FiftyOne would log them and leave the samples empty).

    Raises:
        ConfigError: no samples, samples of several media types, no readable image, or a field of another model.
        ImageError: an unreadable image, with ``skip_failures=False``.
    """

    def work(view: Any) -> None:
        with _strict(model, view, options) as settings:
            view.compute_embeddings(model, embeddings_field=embeddings_field, **settings)

    return _run(samples, model, [embeddings_field], [], overwrite, work)


def apply_model(
    samples: Any, model: AggloModel, label_field: str, *, overwrite: bool = False, **options: Any
) -> Report:
    """Draw heatmaps (and, with ``output_type="all"``, embed) for the samples that have none yet.

    As :func:`compute_embeddings`, for ``samples.apply_model(model, label_field)``; a model with several results fills
    the fields ``<label_field>_<name>``.

    Args:
        samples, model, overwrite: as for :func:`compute_embeddings`.
        label_field: name of the field, or beginning of the names of several.
        options: of ``samples.apply_model``: ``batch_size``, ``num_workers``, ``progress``, ``output_dir``, ...

    Raises:
        ConfigError, ImageError: as :func:`compute_embeddings`.
    """

    def work(view: Any) -> None:
        with _strict(model, view, options) as settings:
            view.apply_model(model, label_field, **settings)

    keys = model.result_keys()
    if keys is None:
        only_vector = model.config.output_type == "summary"
        return _run(samples, model, [label_field] * only_vector, [label_field] * (not only_vector), overwrite, work)
    vectors = [f"{label_field}_{key}" for key in keys if key.endswith("summary")]
    heatmaps = [f"{label_field}_{key}" for key in keys if not key.endswith("summary")]
    return _run(samples, model, vectors, heatmaps, overwrite, work)


def compute_patch_embeddings(
    samples: Any,
    model: AggloModel,
    patches_field: str,
    embeddings_field: str | None = None,
    *,
    workers: int = 2,
) -> dict[str, np.ndarray | None] | None:
    """Vectors of boxes, averaged from the spatial features of the whole image: one pass per image for all its boxes.

    FiftyOne's function of this name encodes every box by a pass of its own, as an image without its surroundings, and
    does not apply the EXIF orientation. Each cell counts by the share of it that the box covers. With a model of
    ``text=True`` the vectors are comparable with text.

    Args:
        samples: dataset or view of images.
        model: from :func:`agglo.integrations.fiftyone.load_model`.
        patches_field: field of detections or polylines.
        embeddings_field: attribute of each label for its vector; None to return the vectors.
        workers: threads that read images.

    Returns:
        Without ``embeddings_field``: sample id to ``(boxes, D)`` float32, None for a sample without boxes or that
        cannot be read. Otherwise None.

    Raises:
        ConfigError: no samples, not images, or no such field.
    """
    _check_samples(samples)
    if samples.media_type != "image":
        raise ConfigError(f"boxes of {samples.media_type} samples: use samples.to_frames() for videos")
    if not samples.has_sample_field(patches_field):
        raise ConfigError(f"patches_field: no field {patches_field!r} in dataset {samples._dataset.name!r}")
    patches: Any = require("fiftyone.utils.patches", "fiftyone")
    if embeddings_field is not None:
        _add_vector_field(samples, patches_field, embeddings_field)
    found: dict[str, np.ndarray | None] = {}
    failures, dataset = Failures(), str(samples._dataset._doc.id)
    view = samples.select_fields(patches_field)
    with view.save_context() as saving:
        for batch in _batches(view.iter_samples(), model, dataset, workers):
            boxes = {}
            for sample, item in batch:
                parsed = patches.parse_patches(sample, patches_field, handle_missing="skip")
                if parsed is not None and item.pixels is not None:
                    boxes[sample.id] = np.array([each.bounding_box for each in parsed.detections], np.float32)
            ready = [(sample, item) for sample, item in batch if sample.id in boxes]
            maps = model.spatial([item for _, item in ready])
            vectors = {s.id: pool(maps[i], boxes[s.id]) for i, (s, _) in enumerate(ready)}
            if model.config.text is True:
                vectors = {k: v / np.linalg.norm(v, axis=1, keepdims=True).clip(1e-12) for k, v in vectors.items()}
            for sample, _ in batch:
                found[sample.id] = vectors.get(sample.id)
                if embeddings_field is not None and sample.id in vectors:
                    for label, vector in zip(_labels(sample[patches_field]), vectors[sample.id], strict=True):
                        label[embeddings_field] = vector
                    saving.save(sample)
            failures.add([item for _, item in batch])
    failures.write()
    return found if embeddings_field is None else None


def pool(spatial: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Averages of a map ``(D, H, W)`` over boxes ``(N, 4)`` ``[x, y, width, height]`` in [0, 1], ``(N, D)``.

    A cell counts by the share of it that the box covers; a box without area takes the cell that it lies in.
    """
    height, width = spatial.shape[1:]
    columns = _covered(boxes[:, 0], boxes[:, 2], width)
    rows = _covered(boxes[:, 1], boxes[:, 3], height)
    return np.einsum("dhw,nh,nw->nd", spatial, rows, columns, optimize=True).astype(np.float32)


def _covered(start: np.ndarray, length: np.ndarray, cells: int) -> np.ndarray:
    """Weights ``(N, cells)`` of an interval in [0, 1] that sum to one."""
    low, high = (start * cells).clip(0, cells), ((start + length) * cells).clip(0, cells)
    edges = np.arange(cells)
    weights = (np.minimum(high[:, None], edges + 1) - np.maximum(low[:, None], edges)).clip(0)
    empty = weights.sum(1) <= 1e-9
    weights[empty, np.minimum(low[empty].astype(int), cells - 1)] = 1
    return weights / weights.sum(1, keepdims=True)


def _batches(samples: Iterable[Any], model: AggloModel, dataset: str, workers: int) -> Iterator[list[tuple[Any, Read]]]:
    """Samples with their images, read ahead by threads (Pillow decodes without Python's lock)."""
    size, count = model.whole_size, min(model.config.batch_size, 16)
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="agglo-read") as threads:
        pending: list[tuple[Any, Any]] = []
        for sample in samples:
            pending.append((sample, threads.submit(read, sample.filepath, size, sample.id, dataset)))
            if len(pending) == 2 * count:
                yield [(each, task.result()) for each, task in pending[:count]]
                del pending[:count]
        while pending:
            yield [(each, task.result()) for each, task in pending[:count]]
            del pending[:count]


def _labels(label: Any) -> Sequence[Any]:
    for attribute in ("detections", "polylines"):
        if (found := getattr(label, attribute, None)) is not None:
            return found
    return [label]


def _add_vector_field(samples: Any, patches_field: str, attribute: str) -> None:
    if "." in attribute:
        raise ConfigError(f"embeddings_field: {attribute!r} is the name of a label's attribute, without dots")
    fields: Any = require("fiftyone.core.fields", "fiftyone")
    dataset = samples._dataset
    _, path = dataset._get_label_field_path(patches_field, attribute)
    if not dataset.has_sample_field(path):
        dataset.add_sample_field(path, fields.VectorField)


# --- what is missing --------------------------------------------------------------------------------------------------


def _check_samples(samples: Any) -> None:
    if not len(samples):
        raise ConfigError(
            f"dataset {samples._dataset.name!r}: no samples; add some with dataset.add_images_dir(folder)"
        )
    media = samples.media_type
    if media == "group":
        raise ConfigError(
            "the samples are of several media types: choose one slice, dataset.select_group_slices('name')"
        )
    if media not in ("image", "video"):
        raise ConfigError(f"the samples are of type {media}: agglo encodes images and the frames of videos")
    if media == "video" and not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        raise ConfigError("frames of videos need ffmpeg and ffprobe on the PATH (Debian: apt install ffmpeg)")


@contextlib.contextmanager
def _strict(model: AggloModel, samples: Any, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Options with which FiftyOne raises every error, while the model skips unreadable images if it may."""
    if samples.media_type == "video":  # videos are decoded by FiftyOne: a bad one must not end the call
        yield options
        return
    model.always_skip = bool(options.get("skip_failures", True))
    try:
        yield {**options, "skip_failures": False}
    finally:
        model.always_skip = False


def _run(
    samples: Any,
    model: AggloModel,
    vectors: Sequence[str],
    heatmaps: Sequence[str],
    overwrite: bool,
    work: Callable[[Any], None],
) -> Report:
    """Apply ``work`` to the samples without a value.

    Args:
        samples, model, overwrite: as for :func:`compute_embeddings`.
        vectors, heatmaps: names of the fields that are filled together.
        work: computes the values of a view.
    """
    _check_samples(samples)
    if samples._dataset._is_patches:
        raise ConfigError(
            "a view of patches: FiftyOne cannot save vectors in it; use compute_patch_embeddings(dataset, model, field)"
        )
    names, record = [*vectors, *heatmaps], model.record()
    for name in names:
        if not overwrite:
            _check_record(samples._dataset, name, record)
    _declare(samples, vectors, heatmaps)
    for name in names:
        record_field(samples._dataset, name, record)
    ids = samples.values("id")
    todo = ids if overwrite else _missing(samples, names[-1])
    # Fixed ids: a view of what is missing would change while it is filled. A selection must fit into 16 MB.
    for start in range(0, len(todo), _SELECTED):
        work(samples.select(todo[start : start + _SELECTED]))
    skipped = _skipped(samples, todo) if samples.media_type == "image" else []
    if todo and len(skipped) == len(ids):
        path, why = skipped[0]
        raise ConfigError(
            f"none of the {len(ids)} images can be read; {path}: {why}. If the files moved, set their new paths: "
            "dataset.set_values('filepath', paths)"
        )
    return Report(len(todo) - len(skipped), len(ids) - len(todo), dict(skipped))


def _declare(samples: Any, vectors: Sequence[str], heatmaps: Sequence[str]) -> None:
    """Add the fields that do not exist."""
    fields: Any = require("fiftyone.core.fields", "fiftyone")
    labels: Any = require("fiftyone.core.labels", "fiftyone")
    dataset = samples._dataset
    is_video = samples.media_type == "video"
    has, add = (
        (dataset.has_frame_field, dataset.add_frame_field)
        if is_video
        else (dataset.has_sample_field, dataset.add_sample_field)
    )
    for name in vectors:
        if not has(name):
            add(name, fields.VectorField)
    for name in heatmaps:
        if not has(name):
            add(name, fields.EmbeddedDocumentField, embedded_doc_type=labels.Heatmap)


def _check_record(dataset: Any, field: str, record: dict[str, Any]) -> None:
    before = field_record(dataset, field)
    changed = [key for key in DEPENDS if before is not None and before.get(key) != record.get(key)]
    if before is not None and changed:
        what = ", ".join(f"{key} {before.get(key)} (now {record.get(key)})" for key in changed)
        raise ConfigError(
            f"field {field!r} was computed by {before['model']} with another {what}: use another field, or "
            "overwrite=True"
        )


def _missing(samples: Any, field: str) -> list[str]:
    """Ids of the samples without a value; of videos, with a frame without one."""
    dataset = samples._dataset
    view: Any = require("fiftyone", "fiftyone").ViewField
    if samples.media_type == "image":
        return samples.exists(field, False).values("id") if dataset.has_sample_field(field) else samples.values("id")
    if not dataset.has_frame_field(field):
        return samples.values("id")
    samples.compute_metadata()
    done = view("frames").filter(view(field) != None).length()  # noqa: E711
    return samples.match(done < view("metadata.total_frame_count")).values("id")


def _skipped(samples: Any, ids: Sequence[str]) -> list[tuple[str, str]]:
    """Path and reason of the samples among ``ids`` that could not be read."""
    if not samples._dataset.has_sample_field(ERROR_FIELD):
        return []
    bad = samples.exists(ERROR_FIELD)
    tried = set(ids)
    found = zip(*bad.values(["id", "filepath", ERROR_FIELD]), strict=True)
    return [(path, why) for each, path, why in found if each in tried]
