"""What evals share: opening sources, encoding a set of images once, and refusing features that are not numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from agglo.config import build
from agglo.evals._rows import FeatureError, Rows, rounded
from agglo.evals.base import Backbone, Progress
from agglo.model.model import Model
from agglo.preprocess import nearest_size
from agglo.sources.base import Source
from agglo.teachers.base import Teacher
from agglo.types import AggloError, ConfigError, Features, ImageError

BATCH = 32
KEEP_BYTES = 512 * 2**20
"""Spatial maps nobody asked for yet are kept for the next eval of a suite when they take no more than this."""


class Inapplicable(AggloError, TypeError):
    """This model lacks what the eval needs (a text tower, a summary, a spatial map). A suite leaves the eval out."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A set of images, encoded. All tensors are on the CPU; float32, the summary in whatever ``encode`` was asked for.

    Args:
        names: the N images that could be read, in the source's order.
        index: their indices in the source.
        summary: ``(N, D)``; of a model without one (HOG, SAM) the mean-pooled spatial map stands in.
        spatial: ``(N, D', h, w)``, or None (the model has none, or it was not asked for and is large).
        skipped: names of the images that could not be read.
        sizes: full ``(H, W)`` of each of the N images, before it was cropped.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    summary: Tensor | None
    spatial: Tensor | None
    skipped: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class _Shared:
    """What the evals of one suite share. Holds the models too, so that an ``id`` in a key stays theirs."""

    sources: dict[str, Source] = field(default_factory=dict)
    encoded: dict[tuple[Any, ...], Encoded] = field(default_factory=dict)
    models: dict[int, object] = field(default_factory=dict)
    kept: dict[tuple[Any, ...], Any] = field(default_factory=dict)


_shared: ContextVar[_Shared | None] = ContextVar("agglo_evals_shared", default=None)


@contextmanager
def shared_features() -> Iterator[None]:
    """Within this block each image set is encoded once a model and size, whatever number of evals asks for it."""
    token = _shared.set(_Shared())
    try:
        yield
    finally:
        _shared.reset(token)


def kept(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What ``make`` returns; within a suite it is called once for each key."""
    shared = _shared.get()
    if shared is None:
        return make()
    if key not in shared.kept:
        shared.kept[key] = make()
    return shared.kept[key]


def open_source(options: Mapping[str, Any] | Source) -> Source:
    """Build the source a recipe names, or pass one through; one object per recipe within a suite."""
    if isinstance(options, Source):
        return options
    shared, key = _shared.get(), _source_key(options)
    if shared is not None and key in shared.sources:
        return shared.sources[key]
    source = build("sources", dict(options))
    if not isinstance(source, Source):
        raise ConfigError(f"{dict(options)} is no source of images")
    if shared is not None:
        shared.sources[key] = source
    return source


def input_size(model: Backbone, size: int | Sequence[int]) -> tuple[int, int]:
    """``(H, W)`` at which to show a model a view of ``size``: what a teacher asks for, else the nearest legal one."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ConfigError(f"size is one number of pixels or a pair (height, width), at least 1; got {size}")
    if isinstance(model, Teacher):
        return model.input_size((pair[0], pair[1]), model.spec.stride)
    return nearest_size((pair[0], pair[1]), step_of(model))


def step_of(model: Backbone) -> int:
    """Sides that a model is shown are multiples of this many pixels: of a patch, or of a whole window of patches."""
    return model.step() if isinstance(model, Model) else max(1, model.spec.step)


def crop_box(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centred box ``xyxy`` of an image that has the aspect of ``size`` ``(H, W)``, in whole pixels."""
    w = min(width, max(1, round(height * size[1] / size[0])))
    h = min(height, max(1, round(width * size[0] / size[1])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def view_of(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre crop to the aspect of ``size`` ``(H, W)``, then bicubic with antialiasing.

    The same pixels as "shortest side to r, then centre crop" (METHOD 7), but the crop comes first, so that masks can
    be cropped alike and never have to be resampled.
    """
    box = crop_box(image.width, image.height, size)
    if (box[3] - box[1], box[2] - box[0]) == size:
        return image.crop(box)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """:func:`view_of` an image as ``(3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.array(view_of(image, size))).permute(2, 0, 1).float().div_(255)


def crop_truth(truth: Any, size: tuple[int, int]) -> Tensor:
    """A mask or depth map ``(H, W)`` cropped as :func:`to_tensor` crops its image; full resolution is kept."""
    array = np.asarray(truth)
    x0, y0, x1, y1 = crop_box(array.shape[1], array.shape[0], size)
    return torch.from_numpy(np.ascontiguousarray(array[y0:y1, x0:x1]))


@contextmanager
def frozen(*models: object) -> Iterator[None]:
    """Inference mode with every module in eval mode; each module's own mode is restored afterwards."""
    modes = [(m, m.training) for model in models if isinstance(model, nn.Module) for m in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: object) -> torch.device:
    """Where the model's parameters live, or its buffers; the CPU if it has neither."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def read_batches(
    source: Source, skipped: list[str], progress: Progress | None = None
) -> Iterator[tuple[list[int], list[str], list[Image.Image]]]:
    """Batches of readable images in order. Unreadable ones are added to ``skipped`` and never stop the loop."""
    index: list[int] = []
    images: list[Image.Image] = []
    for i in range(len(source)):
        try:
            images.append(source.read(i))
            index.append(i)
        except ImageError as error:
            skipped.append(error.name)
            warnings.warn(f"skipped an image: {error}", stacklevel=2)
        if images and (len(images) == BATCH or i == len(source) - 1):
            if progress is not None:
                progress(f"encoding {i + 1}/{len(source)}")
            yield index, [source.name(j) for j in index], images
            index, images = [], []
    if images:  # the last image of the source was unreadable
        yield index, [source.name(j) for j in index], images


def check(tensor: Tensor | None, what: str, names: Sequence[str], rank: int) -> Tensor | None:
    """Features of a batch as finite float32 on the CPU.

    Raises:
        FeatureError: a wrong shape, NaN or infinity; names the first image concerned.
    """
    if tensor is None:
        return None
    if tensor.ndim != rank or tensor.shape[0] != len(names):
        raise FeatureError(f"{what} of {len(names)} images has shape {tuple(tensor.shape)}; {rank} axes were promised")
    tensor = tensor.detach().to("cpu", torch.float32)
    bad = ~torch.isfinite(tensor.flatten(1)).all(1)
    if bool(bad.any()):
        first = int(bad.int().argmax())
        kind = "NaN" if bool(tensor[first].isnan().any()) else "infinity"
        raise FeatureError(f"the {what} features of {names[first]} hold {kind}: the model cannot be measured")
    return tensor


def encode(
    model: Backbone,
    options: Mapping[str, Any] | Source,
    size: int | Sequence[int],
    *,
    want: str,
    progress: Progress | None = None,
    share: bool = True,
    precision: torch.dtype = torch.float32,
) -> Encoded:
    """Encode every image of a source once, in eval and inference mode; deterministic.

    Args:
        model: encodes images; its step (:func:`step_of`) snaps ``size`` to a legal one.
        options: the source.
        size: side, or ``(H, W)``, in pixels.
        want: ``"summary"``, ``"spatial"``, or ``"text"`` (``encode_image``, unit norm, returned as the summary).
        progress: told of each batch.
        share: keep the features for the other evals of a suite; False for images that no other eval will ask for.
        precision: in which summaries are kept. They are rounded as batches come in and never held twice; what is kept
            in another precision than float32 has no maps.

    Raises:
        FeatureError: NaN or infinity, in ``precision`` too; the image is named.
        ImageError: no image of the source could be read.
    """
    grid = input_size(model, size)

    def make() -> Encoded:
        return _encode(model, open_source(options), grid, want, progress, spare=share, precision=precision)

    return encoded_once(model, options, grid, want, precision, make) if share else make()


def encoded_once(
    model: Backbone,
    options: Mapping[str, Any] | Source,
    size: tuple[Any, ...],
    want: str,
    precision: torch.dtype,
    make: Callable[[], Encoded],
) -> Encoded:
    """What ``make`` returns; within a suite once for each image set, model, size and precision."""
    shared = _shared.get()
    if shared is None:
        return make()
    full = (_source_key(options), size, id(model), want == "text", torch.float32)
    key = (*full[:-1], precision)
    for there in dict.fromkeys((key, full)):
        if there not in shared.encoded:
            continue
        known = shared.encoded[there]
        if there != key and known.summary is not None:  # the same numbers, whichever eval came first
            summary = rounded(known.summary, precision, known.names)
            known = shared.encoded[key] = replace(known, summary=summary, spatial=None)
        if want == "text" or getattr(known, want) is not None:
            return known
    encoded = make()
    shared.models[id(model)] = model
    shared.models[id(options)] = options
    shared.encoded[key] = encoded
    return encoded


def nothing_read(source: Source, skipped: Sequence[str]) -> ImageError:
    """The error of a source none of whose images could be read."""
    why = f"no image of this {type(source).__name__} could be read; {len(skipped)} of {len(source)} skipped"
    return ImageError(skipped[0] if skipped else "empty source", why)


def _encode(
    model: Backbone,
    source: Source,
    size: tuple[int, int],
    want: str,
    progress: Progress | None,
    *,
    spare: bool,
    precision: torch.dtype,
) -> Encoded:
    """Encode; maps that nobody asked for are kept where they are ``spare`` and small."""
    forward = _text_features(model) if want == "text" else model
    device = device_of(model)
    keep = want == "spatial"
    spare = spare and precision == torch.float32
    names: list[str] = []
    index: list[int] = []
    skipped: list[str] = []
    summaries, maps = Rows(len(source)), Rows(len(source))
    sizes: list[tuple[int, int]] = []
    with frozen(model):
        for where, batch_names, images in read_batches(source, skipped, progress):
            out = forward(torch.stack([to_tensor(image, size) for image in images]).to(device))
            summary = check(out.summary, "summary", batch_names, 2)
            spatial = check(out.spatial, "spatial", batch_names, 4)
            names += batch_names
            index += where
            sizes += [(image.height, image.width) for image in images]
            if summary is None and spatial is not None:
                summary = spatial.mean((2, 3))
            if summary is not None:
                summaries.add(rounded(summary, precision, batch_names))
            if spatial is not None and (keep or (spare and spatial[0].numel() * 4 * len(source) <= KEEP_BYTES)):
                maps.add(spatial)
    if not names:
        raise nothing_read(source, skipped)
    return Encoded(
        tuple(names),
        tuple(index),
        summaries.all(),
        maps.all(),
        tuple(skipped),
        tuple(sizes),
    )


def need_spatial(model: Backbone, eval_name: str) -> None:
    """Raise unless the model has spatial features."""
    if model.spec.spatial is None:
        raise Inapplicable(f"{eval_name} probes spatial features and {_called(model)} has none: try knn or zero_shot")


def encode_texts(model: object, texts: Sequence[str], eval_name: str) -> Tensor:
    """Unit-norm float32 ``(N, D)`` embeddings of texts, on the CPU.

    Raises:
        Inapplicable: the model has no text tower; says which models have one.
        FeatureError: an embedding is not finite.
    """
    tower: Callable[[list[str]], Tensor] | None = getattr(model, "encode_text", None)
    hint = "give it a text-aligned teacher (conse, open_clip, ...) at training, or measure it with knn"
    if tower is None:
        raise Inapplicable(f"{eval_name} compares images with text and {_called(model)} has no encode_text: {hint}")
    try:
        with frozen(model):
            chunks = [tower(list(texts[i : i + 256])) for i in range(0, len(texts), 256)]
    except (TypeError, NotImplementedError) as error:
        raise Inapplicable(f"{eval_name} compares images with text: {error}; {hint}") from error
    found = check(torch.cat(chunks), "text", list(texts), 2)
    if found is None:
        raise FeatureError(f"{_called(model)} returned no text embeddings")
    return F.normalize(found, dim=1)


def _text_features(model: Backbone) -> Callable[[Tensor], Features]:
    """Images to unit-norm features that live in the text space: ``encode_image``, else a text-aligned summary."""
    encode_image: Callable[[Tensor], Tensor] | None = getattr(model, "encode_image", None)

    def forward(images: Tensor) -> Features:
        found = encode_image(images) if encode_image is not None else model(images).summary
        if found is None:
            raise Inapplicable(f"{_called(model)} has a text tower, but neither encode_image nor a summary to match")
        return Features(F.normalize(found.float(), dim=1), None)

    return forward


def _called(model: object) -> str:
    return f"this {type(model).__name__}"


def _source_key(options: Mapping[str, Any] | Source) -> str:
    return f"object {id(options)}" if isinstance(options, Source) else json.dumps(dict(options), sort_keys=True)
