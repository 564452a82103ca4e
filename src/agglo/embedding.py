"""Embed image collections: summaries and text-aligned embeddings, files of them, and search by text."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from agglo.config import build
from agglo.data.loader import evaluation_batches
from agglo.evals.base import Backbone, device_of
from agglo.extras import require
from agglo.files import replacing
from agglo.model.model import Model
from agglo.preprocess import aspect_size, check_size, fit, image_name, nearest_size, read_image
from agglo.results.identity import model_hash
from agglo.sources.base import Source
from agglo.types import ConfigError, ImageError, StorageError
from agglo.zoo.loading import DEFAULT, load

Progress = Callable[[int, int], None]
"""Called with (images done, total images) after every batch."""

ENDINGS = (".parquet", ".npz")
MIN_SIDE = 512
"""Minimum longer side of :func:`image_features` in pixels: smaller maps of stride 16 are hardly recognisable."""
_ROW_GROUP = 65_536


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
            ConfigError: see :func:`check_output`.
            MissingExtraError: ``.parquet`` without pyarrow installed.
        """
        path = check_output(path, overwrite=overwrite)
        with replacing(path) as partial:
            (_write_parquet if path.suffix == ".parquet" else _write_npz)(self, partial)
        return path

    def columns(self) -> dict[str, np.ndarray]:
        """Arrays by column name, without ``path``."""
        columns = {"summary": self.summary}
        if self.aligned is not None:
            columns["aligned" if self.head in (None, "path", "summary", "metadata") else str(self.head)] = self.aligned
        return columns

    def metadata(self) -> dict[str, str]:
        """Model, size, version and head as strings."""
        import agglo

        facts = {"model": self.model, "size": f"{self.size[0]}x{self.size[1]}", "version": agglo.__version__}
        return {f"agglo.{key}": value for key, value in {**facts, "head": self.head or ""}.items()}


@dataclass(frozen=True, slots=True)
class Hit:
    """An image of a ranking: its name and its cosine similarity with the text."""

    name: str
    score: float


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
        progress: called after every batch.
        journal: a file that receives the rows of each batch as soon as they are computed. A later call with the same
            file, model, size and head reuses the rows of image files that have not changed.

    Raises:
        ConfigError: no readable images, an illegal size or batch, more than fits into memory, or an unknown
            text-aligned head.
        StorageError: the journal cannot be written; the rows in it are kept.
    """
    called = str(model) if isinstance(model, str | Path) else str(model.provenance.get("recipe", "model"))
    model = load(model, heads="text") if isinstance(model, str | Path) else model
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    view, head = legal_size(model, size), _aligned_head(model, head)
    source = _as_source(images_or_dir)
    check_memory(model, view, min(batch, len(source)))
    kept = _Journal(Path(journal), model, view, head) if journal is not None else None
    done = {} if kept is None else kept.read(source)
    skipped: dict[str, str] = {}
    was_training = model.training
    model.eval()
    try:
        rest = _Rest(source, [index for index in range(len(source)) if index not in done])
        for found in evaluation_batches(rest, view, batch) if rest.has_images(skipped, needed=not done) else ():
            skipped |= found.skipped
            rows = encode(model, found.images, head)
            good = np.asarray(np.isfinite(np.concatenate(rows, axis=1)).all(axis=1))
            for at, fine in zip(found.indices, good.tolist(), strict=True):
                if not fine:
                    skipped[rest.name(at)] = "its features are not finite"
            indices = [rest.indices[at] for at, fine in zip(found.indices, good.tolist(), strict=True) if fine]
            summary, vectors = (np.ascontiguousarray(part[good], np.float32) for part in rows)
            if kept is not None:
                kept.append(source, indices, summary, vectors)
            done |= {index: (summary[row], vectors[row]) for row, index in enumerate(indices)}
            if progress is not None:
                progress(len(done) + len(skipped), len(source))
    finally:
        model.train(was_training)
        if kept is not None:
            kept.close()
    if not done:
        raise ConfigError(f"the features of all {len(source)} images are not finite: the weights are damaged")
    if progress is not None:
        progress(len(source), len(source))
    order = sorted(done)
    summary, vectors = (np.stack([done[index][part] for index in order]) for part in (0, 1))
    names = tuple(source.name(index) for index in order)
    return Embeddings(names, summary, vectors if head is not None else None, skipped, called, view, head)


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


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """An image and its spatial features.

    Args:
        name: path of the image.
        image: upright RGB, at its original size.
        spatial: ``(D, H, W)`` float32, on the CPU; the grid has the image's aspect.
    """

    name: str
    image: Image.Image
    spatial: torch.Tensor


def image_features(
    paths: Sequence[str | Path], model: Model, *, size: int | None = None
) -> tuple[list[ImageFeatures], dict[str, str]]:
    """Spatial features of images, each at its own aspect.

    Args:
        paths: images, or folders of them.
        model: a model with spatial features.
        size: longer side in pixels; None for twice the preferred size, at least 512.

    Returns:
        Images with features, and name to reason of the skipped images.

    Raises:
        ConfigError: no spatial features, no such path, an illegal size, or no readable image.
    """
    if model.spec.spatial is None:
        raise ConfigError("this model has no spatial features")
    longest = max(MIN_SIDE, 2 * model.preferred_size) if size is None else legal_size(model, size)[0]
    check_memory(model, (longest, longest), 1)
    found: list[ImageFeatures] = []
    skipped: dict[str, str] = {}
    for source in [as_files(path) for path in paths]:
        for index in range(len(source)):
            try:
                image = source.read(index)
            except ImageError as error:
                skipped[error.name] = error.why
                continue
            view = aspect_size((image.height, image.width), (longest, longest), model.step(), inside=True)
            with torch.inference_mode():
                pixels = fit(image, view, "stretch")
                spatial = model(pixels[None], heads=(), resize=False).spatial
            found.append(ImageFeatures(source.name(index), image, spatial[0].float().cpu()))
    if not found:
        raise ConfigError("none of the images can be read: " + "; ".join(f"{n}: {why}" for n, why in skipped.items()))
    return found, skipped


def legal_size(model: Model, size: int | None) -> tuple[int, int]:
    """``(size, size)``, or for None the legal square nearest to the model's preferred size.

    Raises:
        ConfigError: ``size`` is not legal; names the nearest legal sizes.
    """
    if size is None:
        return nearest_size((model.preferred_size, model.preferred_size), model.step())
    try:
        check_size(size, size, model.step())
    except ValueError as error:
        raise ConfigError(f"size {size}: {error}") from None
    return size, size


def check_memory(model: Backbone, size: tuple[int, int], batch: int) -> None:
    """Refuse inputs that cannot fit into memory.

    The estimate is low: an image, its pixels as float32, and eight maps of the features' width.

    Raises:
        ConfigError: names the memory needed and the largest side that fits.
    """
    height, width = size
    channels = model.spec.spatial or model.spec.summary or 0
    pixel = 24 + 32 * channels / model.spec.stride**2
    needed, limit = batch * height * width * pixel, memory_bytes(device_of(model))
    if needed > limit:
        largest = max(1, int((limit / batch / pixel) ** 0.5))
        raise ConfigError(
            f"size {height}x{width}: a batch of {batch} needs more than {needed / 1e9:.0f} GB of memory, and there are "
            f"{limit / 1e9:.0f} GB: use at most {largest} pixels, or a smaller batch"
        )


def memory_bytes(device: torch.device) -> int:
    """Memory of a device; on the CPU that of the machine, or the limit of the container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [1 << 48]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # "max": no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(each for each in found if each > 0)


def check_output(path: str | Path, *, overwrite: bool, endings: Sequence[str] = ENDINGS) -> Path:
    """Check an output path before the work begins.

    Raises:
        ConfigError: an unknown suffix, a folder, or an existing file without ``overwrite``.
    """
    path = Path(path).expanduser()
    if path.suffix not in endings:
        raise ConfigError(f"{path}: the name must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists: use --overwrite (overwrite=True), or choose another name")
    return path


def as_files(path: str | Path) -> Source:
    """The images in a folder, or one image file, named by their paths.

    Raises:
        ConfigError: no such path, or no image in it.
    """
    folder = build("sources", {"kind": "folder", "path": str(path)})
    return _ImageList([folder.file(index) for index in range(len(folder))])


class _Rest(Source):
    """Some images of a source.

    Args:
        source: the images.
        indices: those to keep.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self._source.name(self.indices[index])

    def read(self, index: int) -> Image.Image:
        return self._source.read(self.indices[index])

    def has_images(self, skipped: dict[str, str], *, needed: bool) -> bool:
        """Whether an image can be read, or ``needed``; adds the unreadable ones before it to ``skipped``."""
        for index in range(0 if needed else len(self)):
            try:
                self.read(index)
            except ImageError as error:
                skipped[error.name] = error.why
            else:
                return True
        return needed


_Rows = dict[int, tuple[np.ndarray, np.ndarray]]
"""Index of an image → its summary and its text-aligned embedding."""


class _Journal:
    """Finished rows in an append-only file: one JSON line of facts per batch, then the rows as float32.

    Args:
        path: of the file; continued if it belongs to the same model, size and head.
        model, view, head: of the rows.
    """

    def __init__(self, path: Path, model: Model, view: tuple[int, int], head: str | None) -> None:
        self.path = path
        self._first = {"format": 1, "model": model_hash(model), "size": list(view), "head": head}
        self._file: Any = None

    def read(self, source: Source) -> _Rows:
        """The rows of images that have not changed since; opens the file for writing."""
        found: _Rows = {}
        end = 0
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError), self.path.open("rb") as file:
            if json.loads(file.readline()) == self._first:
                end, at = file.tell(), {source.name(index): index for index in range(len(source))}
                while line := file.readline():
                    facts = json.loads(line)
                    shapes = [(len(facts["images"]), width) for width in facts["widths"]]
                    body = file.read(sum(rows * width for rows, width in shapes) * 4)
                    if zlib.crc32(body) != facts["crc"]:
                        break  # cut off by a kill or a full disk
                    flat, split = np.frombuffer(body, np.float32), shapes[0][0] * shapes[0][1]
                    parts = flat[:split].reshape(shapes[0]), flat[split:].reshape(shapes[1])
                    for row, (name, stamp) in enumerate(facts["images"]):
                        if name in at and stamp is not None and stamp == _stamp(source, at[name]):
                            found[at[name]] = parts[0][row], parts[1][row]
                    end = file.tell()
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if end else "wb")
            self._file.truncate(end)
            self._file.seek(end)
            if not end:
                self._file.write(json.dumps(self._first).encode() + b"\n")
                self._file.flush()
        return found

    def append(self, source: Source, indices: Sequence[int], *parts: np.ndarray) -> None:
        """Add the rows of a batch."""
        body = b"".join(part.tobytes() for part in parts)
        facts = {
            "images": [(source.name(index), _stamp(source, index)) for index in indices],
            "widths": [part.shape[1] for part in parts],
            "crc": zlib.crc32(body),
        }
        with self._writing():
            self._file.write(json.dumps(facts).encode() + b"\n" + body)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({error.strerror or error}): free some space and run the same command "
                "again; the rows in it are kept"
            ) from error


def _stamp(source: Source, index: int) -> list[int] | None:
    """Size and time of an image's file; None for an image that is not a file."""
    file: Callable[[int], Any] | None = getattr(source, "file", None)
    try:
        facts = os.stat(file(index)) if callable(file) else None
    except (OSError, TypeError):
        return None
    # The time of the last change counts too: a copy may keep size and modification time.
    return None if facts is None else [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


class _ImageList(Source):
    """A source of images passed by the caller; paths are opened when read."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = list(items)

    def __len__(self) -> int:
        return len(self._items)

    def name(self, index: int) -> str:
        return image_name(self._items[index], f"image {index}")

    def file(self, index: int) -> Path:
        """Path of the image; raises TypeError for one that is not a file."""
        return Path(self._items[index]).expanduser()

    def read(self, index: int) -> Image.Image:
        try:
            return read_image(self._items[index], self.name(index))
        except TypeError as error:
            raise ImageError(self.name(index), str(error)) from None


def _as_source(images: str | Path | Source | Iterable[Any]) -> Source:
    if isinstance(images, Source):
        return images
    if isinstance(images, str | Path):
        return as_files(images)
    # An array or tensor is one image or a batch, never a list of rows; bytes are one file.
    file = isinstance(images, Image.Image | bytes | bytearray | memoryview) or hasattr(images, "read")
    single = file or getattr(images, "ndim", 4) in (2, 3)
    items = [images] if single else list(images)
    if not items:
        raise ConfigError("no images were given")
    return _ImageList(items)


def _aligned_head(model: Model, head: str | None, *, needed: bool = False) -> str | None:
    if head is None and not needed and all(config.text is None for config in model.head_configs.values()):
        return None
    try:
        return model.text_head(head)
    except TypeError as error:
        raise ConfigError(str(error)) from None


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


def _write_parquet(embeddings: Embeddings, file: Path) -> None:
    pa, parquet = require("pyarrow", "quickstart"), require("pyarrow.parquet", "quickstart")
    columns = embeddings.columns()
    # Of a fixed size: Lance refuses variable lists for vector search, and they take longer to write.
    types = [pa.list_(pa.float32(), array.shape[1]) for array in columns.values()]
    fields = [pa.field("path", pa.string()), *(pa.field(name, each) for name, each in zip(columns, types, strict=True))]
    schema = pa.schema(fields, metadata=embeddings.metadata())
    with parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(embeddings), _ROW_GROUP):
            rows = slice(start, start + _ROW_GROUP)
            flat = [np.ascontiguousarray(array[rows], np.float32).reshape(-1) for array in columns.values()]
            lists = [pa.FixedSizeListArray.from_arrays(pa.array(x), type=t) for x, t in zip(flat, types, strict=True)]
            names = pa.array(embeddings.names[rows], pa.string())
            writer.write_table(pa.Table.from_arrays([names, *lists], schema=schema))


def _write_npz(embeddings: Embeddings, file: Path) -> None:
    # Strings as a unicode array, not objects: the file must load without pickle.
    with file.open("wb") as stream:
        np.savez(
            stream,
            path=np.array(embeddings.names),
            metadata=np.array(json.dumps(embeddings.metadata())),
            **embeddings.columns(),  # pyright: ignore[reportArgumentType]
        )
