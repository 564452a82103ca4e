"""Encoding image sets: views, batches, text embeddings, and checks that features are finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from agglo.evals._cache import Encoded, FeatureKey, source_key
from agglo.evals.base import (
    Backbone,
    EvalContext,
    FeatureError,
    Inapplicable,
    device_of,
    frozen,
    input_size,
    step_of,
)
from agglo.preprocess import aspect_size, fit
from agglo.sources.base import Source
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec, ImageError

BATCH = 32
KEEP_BYTES = 512 * 2**20
"""Spatial maps that were not requested are kept for the next eval of a suite when they take no more than this."""


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode(
    model: Backbone,
    options: Mapping[str, Any] | Source,
    size: int | Sequence[int],
    context: EvalContext,
    *,
    want: Literal["summary", "spatial", "text"],
    aspect: str = "crop",
    share: bool = True,
    precision: torch.dtype = torch.float32,
) -> Encoded:
    """Encode every image of a source once, in eval and inference mode; deterministic.

    Args:
        model: encodes images.
        options: the source.
        size: side, or ``(H, W)``, in pixels; snapped to what the model can take.
        context: caches the features and receives progress.
        want: ``"summary"``, ``"spatial"``, or ``"text"`` (``encode_image``, unit norm, returned as the summary).
        aspect: ``crop``: the centre of each image at the aspect of ``size``. ``keep``, for summaries: the whole image,
            scaled to cover ``size``, each side to the nearest multiple of the model's step
            (:func:`agglo.preprocess.aspect_size`). A teacher with a fixed input size gets crops, and a warning.
        share: keep the features for the other evals of a suite; False for images that no other eval uses.
        precision: of the summaries. They are rounded batch by batch and never held twice; in another precision than
            float32 no maps are kept.

    Raises:
        FeatureError: NaN or infinity, in ``precision`` too; names the image.
        ImageError: no image of the source could be read.
    """
    view = input_size(model, size)
    fixed: int | None = getattr(model, "canvas", None)
    whole = aspect == "keep" and fixed is None
    if aspect == "keep" and fixed is not None:
        warnings.warn(
            f"aspect: keep had no effect: {type(model).__name__} takes {fixed}x{fixed} pixels only and encoded the "
            "centre of each image, not the whole",
            stacklevel=2,
        )
    if whole:
        target = (size, size) if isinstance(size, int) else (size[0], size[1])
        key_size = ("keep", *target)
    else:
        target = key_size = view

    def compute() -> Encoded:
        return _encode(model, context.sources.open(options), target, want, context, whole, share, precision)

    if not share:
        return compute()
    full = FeatureKey(source_key(options), key_size, _identity(model), want == "text", torch.float32)
    key = full._replace(precision=precision)
    for known in dict.fromkeys((key, full)):
        found = context.features.get(known)
        if found is None:
            continue
        if known != key and found.summary is not None:  # the same numbers, whichever eval came first
            found = replace(found, summary=rounded(found.summary, precision, found.names), spatial=None)
            context.features.put(key, found)
        if want == "text" or getattr(found, want) is not None:
            return found
    found = compute()
    context.features.put(key, found, model, options)
    return found


def _encode(
    model: Backbone,
    source: Source,
    target: tuple[int, int],
    want: str,
    context: EvalContext,
    whole: bool,
    share: bool,
    precision: torch.dtype,
) -> Encoded:
    """Encode without the cache. Maps that were not requested are kept if others may use them and they are small."""
    forward = _text_features(model) if want == "text" else model
    device = device_of(model)
    spare = share and not whole and precision == torch.float32
    names: list[str] = []
    index: list[int] = []
    skipped: list[str] = []
    sizes: list[tuple[int, int]] = []
    summaries, maps = Rows(len(source)), Rows(len(source))
    with frozen(model):
        for where, batch_names, images in read_batches(source, skipped, context):
            views = [whole_view(model, image, target) if whole else target for image in images]
            found: dict[int, Tensor] = {}
            for view in dict.fromkeys(views):  # images of one shape are one batch
                at = [i for i, own in enumerate(views) if own == view]
                out = forward(
                    torch.stack([fit(images[i], view, "stretch" if whole else "crop") for i in at]).to(device)
                )
                own_names = [batch_names[i] for i in at]
                summary = check(out.summary, "summary", own_names, 2)
                spatial = check(out.spatial, "spatial", own_names, 4) if summary is None or not whole else None
                if summary is None and spatial is not None:
                    summary = spatial.mean((2, 3))
                if summary is not None:
                    found |= dict(zip(at, rounded(summary, precision, own_names), strict=True))
                small = spatial is not None and spatial[0].numel() * 4 * len(source) <= KEEP_BYTES
                if spatial is not None and not whole and (want == "spatial" or (spare and small)):
                    maps.add(spatial)
            if found:
                summaries.add(torch.stack([found[i] for i in range(len(images))]))
            names += batch_names
            index += where
            sizes += [(image.height, image.width) for image in images]
    if not names:
        why = f"no image of this {type(source).__name__} could be read; {len(skipped)} of {len(source)} skipped"
        raise ImageError(skipped[0] if skipped else "empty source", why)
    return Encoded(tuple(names), tuple(index), summaries.all(), maps.all(), tuple(skipped), tuple(sizes))


def check_aspect(kind: str, aspect: str) -> str:
    """The value of an eval's ``aspect``.

    Raises:
        ConfigError: neither ``crop`` nor ``keep``.
    """
    if aspect not in ("crop", "keep"):
        raise ConfigError(f"evals.{kind}: aspect must be crop or keep, not {aspect!r}")
    return aspect


def whole_view(model: Backbone, image: Image.Image, target: tuple[int, int]) -> tuple[int, int]:
    """``(H, W)`` of the model's input for a whole image that is scaled to cover ``target``."""
    full = image.height, image.width
    if isinstance(model, Teacher):
        return model.input_size(aspect_size(full, target, 1), model.spec.stride)
    return aspect_size(full, target, step_of(model))


def report_unusable(errors: Sequence[ImageError], used: int, what: str = "images") -> None:
    """Warn of the items that were skipped for their ground truth, if any.

    Raises:
        ConfigError: no item is left.
    """
    if not errors:
        return
    if not used:
        raise ConfigError(f"none of {len(errors)} {what} has usable ground truth; the first: {errors[0]}") from errors[
            0
        ]
    each = list(dict.fromkeys(map(str, errors)))  # windows of one image share an error
    shown = "; ".join(each[:3]) + ("; ..." if len(each) > 3 else "")
    warnings.warn(
        f"skipped {len(errors)} of {used + len(errors)} {what}, whose ground truth cannot be used: {shown}",
        stacklevel=3,
    )


def read_batches(
    source: Source, skipped: list[str], context: EvalContext
) -> Iterator[tuple[list[int], list[str], list[Image.Image]]]:
    """Batches of readable images in order: indices, names, images. Unreadable ones are added to ``skipped``."""
    index: list[int] = []
    images: list[Image.Image] = []
    read = context.sources.reader(source)
    for i in range(len(source)):
        try:
            images.append(read(i))
            index.append(i)
        except ImageError as error:
            skipped.append(error.name)
            warnings.warn(f"skipped an image: {error}", stacklevel=2)
        if images and (len(images) == BATCH or i == len(source) - 1):
            context.report(f"encoding {i + 1}/{len(source)}")
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
        raise FeatureError(f"{what} of {len(names)} images has shape {tuple(tensor.shape)}; expected {rank} axes")
    tensor = tensor.detach().to("cpu", torch.float32)
    bad = ~torch.isfinite(tensor.flatten(1)).all(1)
    if bool(bad.any()):
        first = int(bad.int().argmax())
        kind = "NaN" if bool(tensor[first].isnan().any()) else "infinity"
        raise FeatureError(f"the {what} features of {names[first]} contain {kind}: the model cannot be measured")
    return tensor


def required(tensor: Tensor | None, model: Backbone) -> Tensor:
    """The spatial features; raise FeatureError if the model returned none although its spec has them."""
    if tensor is None:
        raise FeatureError(f"{type(model).__name__} has spatial features in its spec but returned none")
    return tensor


def need_spatial(model: Backbone, eval_name: str) -> None:
    """Raise unless the model has spatial features."""
    if model.spec.spatial is None:
        raise Inapplicable(f"{eval_name} needs spatial features and {_called(model)} has none: try knn or zero_shot")


def summary_of(model: Backbone, found: Encoded) -> Tensor:
    """``(N, D)`` summaries of an image set.

    Raises:
        FeatureError: the model returned neither summary nor map.
    """
    if found.summary is None:
        raise FeatureError(f"{type(model).__name__} returned neither a summary nor a spatial map")
    return found.summary


class Rows:
    """Rows appended batch by batch into memory allocated once; a list would be held twice when concatenated.

    All rows have one layout, the one read back from disk: layouts differ in the last bits of sums over them.

    Args:
        most: maximum number of rows; memory beyond those added is never touched.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._filled = 0
        self._memory: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Append rows."""
        if self._memory is None:
            self._memory = torch.empty(self.most, *rows.shape[1:], dtype=rows.dtype)
        self._memory[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def all(self) -> Tensor | None:
        """All rows so far; None before the first."""
        return None if self._memory is None else self._memory[: self._filled]


def rounded(summary: Tensor, precision: torch.dtype, names: Sequence[str]) -> Tensor:
    """Finite float32 features ``(N, D)`` in another precision.

    Raises:
        FeatureError: a value out of range; names the first image concerned.
    """
    if precision == summary.dtype:
        return summary
    found = summary.to(precision)
    bad = ~torch.isfinite(found).all(1)
    if bool(bad.any()):
        raise FeatureError(
            f"the summary features of {names[int(bad.int().argmax())]} exceed {torch.finfo(precision).max:g}, the "
            "maximum of half precision: measure with `precision: float32`"
        )
    return found


# --- text -------------------------------------------------------------------------------------------------------------


def encode_texts(model: object, texts: Sequence[str], eval_name: str) -> Tensor:
    """Unit-norm float32 ``(N, D)`` embeddings of texts, on the CPU.

    Raises:
        Inapplicable: the model has no text tower.
        FeatureError: an embedding is not finite.
    """
    tower: Callable[[list[str]], Tensor] | None = getattr(model, "encode_text", None)
    if tower is None:
        raise Inapplicable(
            f"{eval_name} compares images with text and {_called(model)} has no encode_text: train it with a "
            "text-aligned teacher (conse, open_clip, ...), or measure it with knn"
        )
    try:
        with frozen(model):
            chunks = [tower(list(texts[i : i + 256])) for i in range(0, len(texts), 256)]
    except (TypeError, NotImplementedError) as error:
        raise Inapplicable(f"{eval_name} compares images with text: {error}; or measure it with knn") from error
    found = check(torch.cat(chunks), "text", list(texts), 2)
    if found is None:
        raise FeatureError(f"{_called(model)} returned no text embeddings")
    return F.normalize(found, dim=1)


def _text_features(model: Backbone) -> Callable[[Tensor], Features]:
    """Images to unit-norm features in the text tower's space: ``encode_image``, else a text-aligned summary."""
    encode_image: Callable[[Tensor], Tensor] | None = getattr(model, "encode_image", None)

    def forward(images: Tensor) -> Features:
        found = encode_image(images) if encode_image is not None else model(images).summary
        if found is None:
            raise Inapplicable(f"{_called(model)} has a text tower, but neither encode_image nor a summary to match")
        return Features(F.normalize(found.float(), dim=1), None)

    return forward


def _called(model: object) -> str:
    return f"this {type(model).__name__}"


# --- intermediate blocks ----------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Spatial maps of several blocks of a model, the final norm applied, concatenated along the channels.

    Args:
        model: has ``intermediates`` and a student of ``depth`` blocks.
        count: number n of the L blocks: ``L/n - 1, 2L/n - 1, ..., L - 1`` (Probe3d, arXiv:2404.08636, reads 4).
    """

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        self.model = model
        depth = int(model.student.depth)
        self.blocks = sorted({max(0, (i + 1) * depth // count - 1) for i in range(count)})
        spec: FeatureSpec = model.spec
        self.spec = FeatureSpec(None, len(self.blocks) * (spec.spatial or 0), spec.stride, step_of(model))

    def forward(self, images: Tensor) -> Features:
        """``(B, 3, H, W)`` to a map ``(B, n * D, h, w)`` and no summary."""
        maps = [found.spatial for found in self.model.intermediates(images, self.blocks, norm=True)]
        return Features(None, torch.cat([each for each in maps if each is not None], 1))


def layered(model: Backbone, count: int) -> tuple[Backbone, int]:
    """The model read at ``count`` of its blocks, and their number: 1 for a model without accessible blocks."""
    depth = getattr(getattr(model, "student", None), "depth", 0)
    if count == 1 or not depth or not hasattr(model, "intermediates"):
        return model, 1
    layers = Layers(model, count)
    return layers, len(layers.blocks)


def _identity(model: Backbone) -> tuple[int, tuple[int, ...]]:
    return (id(model.model), tuple(model.blocks)) if isinstance(model, Layers) else (id(model), ())
