"""An agglo model as a FiftyOne model: embeddings, heatmaps and text prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.embedding import MIN_SIDE, encode, legal_size
from agglo.evals.base import device_of
from agglo.extras import require
from agglo.integrations.fiftyone.calls import Call, current_call
from agglo.integrations.fiftyone.maps import (
    Layers,
    Scale,
    cell_at,
    draw,
    fit_scales,
    heatmap,
    layer_names,
    layers,
    map_keys,
)
from agglo.integrations.fiftyone.options import Options, field_name
from agglo.integrations.fiftyone.reading import (
    FitPatch,
    InputSize,
    Read,
    ReadSample,
    base,
    collate,
    read,
    spread_frames,
)
from agglo.integrations.fiftyone.records import ERROR_FIELD, Failures, Scales, record_fields
from agglo.model.cells import text_cells
from agglo.model.model import Model
from agglo.preprocess import check_size, nearest_size, to_batch
from agglo.results.identity import model_hash
from agglo.types import ConfigError, ImageError, Output

_log = logging.getLogger(__name__)
_CPU_PIXELS = 2**20
"""Number of pixels of a batch of whole images on the CPU."""
SCALE_IMAGES = 32
"""Number of images, spread over a dataset, that its scales are fitted on."""

_CONTRACTS = ("EmbeddingsMixin", "PromptMixin", "SamplesMixin", "SupportsGetItem", "TorchModelMixin", "Model")
_Base: Any = base(*(f"fiftyone.core.models:{name}" for name in _CONTRACTS))


class AggloModel(_Base):
    """A FiftyOne model.

    ``dataset.compute_embeddings(model)`` stores one vector per sample, ``dataset.apply_model(model)`` what the option
    ``output_type`` selects. An unreadable image costs its own sample, whose field ``agglo_error`` has the reason; with
    FiftyOne's ``skip_failures=False`` it is raised. Without a field, where FiftyOne stacks all embeddings, every image
    must be readable. Fields record how they were computed (:meth:`record`).

    Args:
        model: in eval mode, on its device.
        name: of the model, for records.
        options: checked by :func:`agglo.integrations.fiftyone.options.parse`.

    Attributes:
        size: at which images are read.
        always_skip: skip unreadable images with ``skip_failures=False``, too, so that only other errors are raised.

    Raises:
        ConfigError: the model lacks what an option needs, or a size is not legal.
    """

    collate_fn = staticmethod(collate)
    has_collate_fn = True
    has_embeddings = True
    has_logits = False
    media_type = "image"
    ragged_batches = False  # `collate` accepts images of several sizes in a batch

    def __init__(self, model: Model, name: str, options: Options) -> None:
        self.model, self.name, self.config = model, name, options
        self.size = _input_size(model, options)
        self._embedding_head = _check(model, options)
        self._text = model.encode_text(list(options.prompts)) if options.prompts else None
        self._patch = self._patch_of(options)
        self._preprocess, self._fields = True, {}
        self._scales, self._failures = Scales(), Failures()
        self._ahead: dict[str, tuple[dict[str, np.ndarray], Layers]] = {}
        self._hash: str | None = None
        self._defaults: tuple[Any, Any] | None = None
        self._call: Call | None = None
        self.always_skip = False
        self._last: np.ndarray | None = None

    # --- what FiftyOne asks ---

    @property
    def can_embed_prompts(self) -> bool:
        """Whether the embeddings are comparable with text: ``text=True``."""
        return self.config.text is True

    @property
    def transforms(self) -> FitPatch:
        """Prepares the boxes of FiftyOne's ``compute_patch_embeddings``, each for a pass of its own."""
        square = InputSize(self.size.side, self.size.step, square=True)
        return FitPatch(square)

    @property
    def preprocess(self) -> bool:
        """Set by FiftyOne; inputs are recognised by their type, so it changes nothing."""
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: bool) -> None:
        self._preprocess = value

    @property
    def needs_fields(self) -> dict[str, str]:
        """No fields of the samples are needed; the samples themselves lead to their dataset."""
        return self._fields

    @needs_fields.setter
    def needs_fields(self, fields: dict[str, str]) -> None:
        if fields:
            raise ConfigError(
                f"unknown keyword {next(iter(fields))!r} of apply_model: options of the model belong to load_model; "
                'another field for the path is field_mapping={"filepath": "field"}'
            )
        self._fields = {}

    @property
    def _using_gpu(self) -> bool:
        return device_of(self.model).type == "cuda"

    def build_get_item(self, field_mapping: dict[str, str] | None = None) -> ReadSample:
        """What reads a sample in a worker of the data loader."""
        return ReadSample(self.size, field_mapping)

    def __enter__(self) -> AggloModel:
        # FiftyOne reads its configuration after this call, and its own default is one image per batch.
        settings: Any = require("fiftyone", "fiftyone").config
        self._call = current_call()
        self._defaults = settings.default_batch_size, settings.default_process_pool_workers
        if settings.default_batch_size is None:
            settings.default_batch_size = self.config.batch_size
        if self.config.num_workers is not None:
            settings.default_process_pool_workers = self.config.num_workers
        return self

    def __exit__(self, *error: object) -> None:
        if self._defaults is not None:
            settings: Any = require("fiftyone", "fiftyone").config
            settings.default_batch_size, settings.default_process_pool_workers = self._defaults
            self._defaults = None
        self._ahead = {}
        call, self._call = self._call, None
        if call is not None:
            record_fields(call.samples, call.fields(self.result_keys()), self.record())
        bad = self._failures.write()
        if bad and error and error[0] is ValueError and "same shape" in str(error[1]):
            path = f"the first is sample {bad[0][0]}: {bad[0][1]}"
            raise ConfigError(
                f"{len(bad)} images cannot be read ({path}), and FiftyOne can return embeddings only for all: give "
                f"embeddings_field, or leave them out: dataset.exists({ERROR_FIELD!r}, False).compute_embeddings(model)"
            ) from None

    # --- embeddings ---

    def embed(self, arg: Any) -> np.ndarray | None:
        """The embedding ``(D,)`` float32 of one image; None if it cannot be read."""
        return self.embed_all([arg])[0]

    def embed_all(self, args: Iterable[Any]) -> list[np.ndarray | None]:
        """The embeddings of images of any kind and size, in order; None for those that cannot be read."""
        found: list[np.ndarray | None] = [None] * len(items := self._items(args))
        for indices, images in self._groups(items):
            vectors = self._vectors(images)
            fine = np.asarray(np.isfinite(vectors).all(axis=1))
            for row, index in enumerate(indices):
                if fine[row]:
                    found[index] = vectors[row]
                else:
                    items[index] = Read(None, "its features are not finite", items[index].sample, items[index].dataset)
        self._note(items)
        good = [each for each in found if each is not None]
        self._last = np.stack(good) if good else None
        return found

    def get_embeddings(self) -> np.ndarray | None:
        """The embeddings ``(B, D)`` of the last call."""
        return self._last

    def embed_prompt(self, arg: str) -> np.ndarray:
        """The unit-norm vector ``(D,)`` of a text, comparable with the embeddings.

        Raises:
            ConfigError: the model was not loaded with ``text=True``.
        """
        return self.embed_prompts([arg])[0]

    def embed_prompts(self, args: Iterable[str]) -> np.ndarray:
        """The unit-norm vectors ``(N, D)`` of texts; errors as :meth:`embed_prompt`."""
        if not self.can_embed_prompts:
            raise ConfigError(f"{self.name} was loaded without text=True: its embeddings are not comparable with text")
        return self.model.encode_text(list(args), self._embedding_head).float().cpu().numpy()

    def _vectors(self, images: Tensor) -> np.ndarray:
        text = self._embedding_head if self.config.text is True else None
        if self.config.window is None and (text is not None or not self.config.heads):
            summary, aligned = encode(self.model, images, text)
            return summary if text is None else aligned
        with torch.inference_mode():
            out = self.model(images, heads=self._heads(), resize=False, window=self.config.window)
        return self._embedding(out)

    def _embedding(self, out: Output) -> np.ndarray:
        head = self._embedding_head
        vectors = out.summary if head is None else out.heads[head].summary
        if vectors is None:
            raise ConfigError(f"{self.name} has no summary{'' if head is None else f' of {head}'} to embed")
        vectors = vectors.float()
        return (F.normalize(vectors, dim=-1) if self.config.text is True else vectors).cpu().numpy()

    def _heads(self) -> list[str]:
        found = list(self.config.heads)
        return found if self._embedding_head in (None, *found) else [*found, str(self._embedding_head)]

    # --- heatmaps ---

    def predict(self, arg: Any, sample: Any = None) -> Any:
        """The result of :meth:`predict_all` for one image."""
        return self.predict_all([arg], None if sample is None else [sample])[0]

    def predict_all(self, args: Iterable[Any], samples: Iterable[Any] | None = None) -> list[Any]:
        """What ``output_type`` selects, for images of any kind and size.

        Args:
            args: paths, PIL images, arrays ``(H, W, 3)``, tensors ``(3, H, W)``, or what :class:`ReadSample` returned.
            samples: their samples or frames, whose dataset keeps the scales of the heatmaps.

        Returns:
            Per image: ``summary``: the embedding. ``spatial``: a heatmap, or a dictionary of several. ``all``: a
            dictionary. None for an image that cannot be read.
        """
        if self.config.output_type == "summary":
            return self.embed_all(args)
        items, dataset = self._items(args), self._scales.dataset(list(samples or ()))
        results: list[Any] = [None] * len(items)
        if dataset is not None and not self._scales.has(dataset, self._key(), self._layer_names()):
            self._encode_ahead(dataset)
        known = {index: item.sample for index, item in enumerate(items) if item.sample in self._ahead}
        passed: list[tuple[int, dict[str, np.ndarray], Layers]] = [
            (index, *self._ahead[sample]) for index, sample in known.items() if sample is not None
        ]
        rest = [Read(None) if index in known else item for index, item in enumerate(items)]
        for indices, images in self._groups(rest):
            passed += zip(indices, *self._pass(images), strict=True)
        scales = self._scales_of(dataset, [image for _, _, image in passed]) if passed else {}
        if dataset is not None and dataset.media_type == "video":
            self._ahead = {}
        for sample in filter(None, known.values()):
            self._ahead.pop(sample, None)
        for index, vectors, image in passed:
            arrays = [*vectors.values(), *image.values()]
            if not all(np.isfinite(each).all() for each in arrays):
                items[index] = Read(None, "its features are not finite", items[index].sample, items[index].dataset)
                continue
            drawn = {each.key: heatmap(each) for each in draw(self.config, image, scales)}
            several = self.config.output_type == "all" or len(drawn) > 1
            results[index] = {**vectors, **drawn} if several else next(iter(drawn.values()))
        self._note(items)
        return results

    def features(self, args: Iterable[Any]) -> list[dict[str, np.ndarray]]:
        """Summary and spatial features of images, float32, in the layout of ``feature_format``.

        Returns:
            Per image: ``summary`` ``(D,)`` and ``spatial`` ``(D', H, W)`` (NCHW) or ``(H*W, D')`` (NLC); an empty
            dictionary for an image that cannot be read.
        """
        items = self._items(args)
        found: list[dict[str, np.ndarray]] = [{} for _ in items]
        for indices, images in self._groups(items):
            with torch.inference_mode():
                out = self.model(images, heads=(), resize=False, window=self.config.window)
            spatial = None if out.spatial is None else out.spatial
            if spatial is not None and self.config.feature_format == "NLC":
                spatial = out.tokens()
            parts = {"summary": out.summary, "spatial": spatial}
            arrays = {name: each.float().cpu().numpy() for name, each in parts.items() if each is not None}
            for row, index in enumerate(indices):
                found[index] = {name: array[row] for name, array in arrays.items()}
        return found

    @property
    def whole_size(self) -> InputSize:
        """The size at which whole images are read, for boxes."""
        if not self.size.square:
            return self.size
        return _input_size(self.model, replace(self.config, output_type="spatial"))

    def spatial(self, items: Sequence[Read]) -> list[np.ndarray]:
        """Spatial features of read images, ``(D, H, W)`` float32 each; text-aligned with ``text=True``."""
        found: dict[int, np.ndarray] = {}
        for indices, images in self._groups(items):
            with torch.inference_mode():
                if self.config.text is True:
                    maps = text_cells(self.model, images, self._embedding_head, window=self.config.window)[1]
                else:
                    maps = self.model(images, heads=(), resize=False, window=self.config.window).spatial
            if maps is None:
                raise ConfigError(f"{self.name} has no spatial features")
            found |= dict(zip(indices, maps.float().cpu().numpy(), strict=True))
        return [found[index] for index in range(len(items))]

    def result_keys(self) -> list[str] | None:
        """Names of the results of :meth:`predict` in the order of its dictionary; None for a single result."""
        options = self.config
        if options.output_type == "summary":
            return None
        found = map_keys(options, self._dense_heads())
        if options.output_type == "spatial":
            return found if len(found) > 1 else None
        named = [n for n in options.heads if self.model.head_configs[n].summary is not None]
        return ["summary", *(f"{field_name(n)}_summary" for n in named), *found]

    def _groups(self, items: Sequence[Read]) -> Iterable[tuple[list[int], Tensor]]:
        """Batches ``(indices, images)`` of equal size, images as floats ``(B, 3, H, W)`` in [0, 1] on the device."""
        device = device_of(self.model)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, item in enumerate(items):
            if item.pixels is not None:
                groups.setdefault(tuple(item.pixels.shape), []).append(index)
        for (_, height, width), indices in groups.items():
            # On the CPU, large batches of large images are slower (caches) and take more memory.
            most = max(1, _CPU_PIXELS // (height * width)) if device.type == "cpu" and not self.size.square else 1 << 20
            for start in range(0, len(indices), most):
                part = indices[start : start + most]
                stacked = torch.stack([pixels for i in part if (pixels := items[i].pixels) is not None])
                yield part, to_batch(stacked.to(device)).contiguous()

    def _pass(self, images: Tensor) -> tuple[list[dict[str, np.ndarray]], list[Layers]]:
        """Vectors and layers of a batch, from one forward pass."""
        options, heads = self.config, self._heads()
        text = None
        with torch.inference_mode():
            if self._text is None:
                out = self.model(images, heads=heads, resize=False, window=options.window)
            else:
                out, cells = text_cells(self.model, images, heads=heads, window=options.window)
                text = torch.einsum("bdhw,nd->bnhw", cells, self._text.to(cells))
        if out.spatial is None:
            raise ConfigError(f"{self.name} has no spatial features to draw; use output_type='summary'")
        dense = {name: each.spatial for name in options.heads if (each := out.heads[name]).spatial is not None}
        vectors: list[dict[str, np.ndarray]] = [{} for _ in range(len(images))]
        if options.output_type == "all":
            columns = {"summary": self._embedding(out)}
            for name in options.heads:
                if (summary := out.heads[name].summary) is not None:
                    columns[f"{field_name(name)}_summary"] = summary.float().cpu().numpy()
            vectors = [{name: column[row] for name, column in columns.items()} for row in range(len(images))]
        return vectors, list(layers(options, out.spatial, dense, text, self._patch))

    def _patch_of(self, options: Options) -> Tensor | None:
        """The features of the cell at ``patch`` in ``patch_image``."""
        if options.patch_image is None or options.patch is None:
            return None
        item = read(options.patch_image, self.size)
        if item.pixels is None:
            raise ConfigError(f"patch_image: {options.patch_image}: {item.why}")
        return cell_at(torch.from_numpy(self.spatial([item])[0])[None], options.patch)[0]

    def _scales_of(self, dataset: Any, batch: Sequence[Layers]) -> dict[str, Scale]:
        """The scales of a dataset; fitted on the images encoded ahead, without any on the batch."""

        def fit() -> dict[str, Scale]:
            images = [image for _, image in self._ahead.values()] or batch
            finite = [one for one in images if all(np.isfinite(each).all() for each in one.values())]
            if not finite:
                raise ConfigError(f"the features of {self.name} are not finite: the weights are damaged")
            return fit_scales(finite)

        return self._scales.get(dataset, self._key(), self._layer_names(), fit)

    def _encode_ahead(self, dataset: Any) -> None:
        """Encode images spread over a dataset, for its scales; their results are kept until their turn comes.

        The frames of videos are needed for the scales alone: they are decoded again when their turn comes.
        """
        self._ahead = {}
        ids, paths = dataset.values(["id", "filepath"])
        if dataset.media_type == "video":
            items = [read(each, self.size, f"frame {n}") for n, each in enumerate(spread_frames(paths, SCALE_IMAGES))]
        else:
            chosen = dict.fromkeys(i * len(ids) // SCALE_IMAGES for i in range(SCALE_IMAGES))
            items = [read(paths[i], self.size, ids[i]) for i in chosen]
        for indices, images in self._groups(items):
            for index, vectors, image in zip(indices, *self._pass(images), strict=True):
                self._ahead[str(items[index].sample)] = vectors, image

    def _layer_names(self) -> list[str]:
        return layer_names(self.config, self._dense_heads())

    def _dense_heads(self) -> list[str]:
        return [name for name in self.config.heads if self.model.head_configs[name].spatial is not None]

    def _key(self) -> str:
        options = self.config
        return f"{self.hash} {self.size} window {options.window} patch {options.patch} {options.patch_image or ''}"

    @property
    def hash(self) -> str:
        """Hash of the weights behind the embedding: of the student, and of the embedding's head."""
        if self._hash is None:
            head = None if self._embedding_head is None else self.model.heads[self._embedding_head]
            self._hash = model_hash(self.model.student, None if head is None else model_hash(head))
        return self._hash

    def _items(self, args: Iterable[Any]) -> list[Read]:
        if isinstance(args, Tensor):  # boxes that `transforms` prepared
            return [Read(pixels) for pixels in args]
        return [each if isinstance(each, Read) else read(each, self.size) for each in args]

    def _note(self, items: Sequence[Read]) -> None:
        """Note which samples of a batch were skipped, and raise the first reason where FiftyOne must not skip any."""
        self._failures.add(items)
        if self._call is None or self._call.skip_failures or self.always_skip:
            return
        for item in items:
            if item.why is not None and item.sample is not None:
                raise ImageError(str(self._call.samples[item.sample].filepath), item.why)

    def record(self) -> dict[str, Any]:
        """What the outputs depend on, as JSON data: model, hash of its weights, input size, dtype, head, version."""
        import agglo

        head, options = self._embedding_head, self.config
        return {
            "model": self.name,
            "hash": self.hash,
            "size": str(self.size),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "head": head,
            "text": options.text is True,
            "window": options.window,
            "agglo": agglo.__version__,
        }


def _input_size(model: Model, options: Options) -> InputSize:
    step = model.step(options.window)
    if options.is_square:
        return InputSize(_square(model, options, step), step, square=True)
    if options.use_external_preprocessor:
        side = options.max_size or model.preferred_size
        return InputSize(side, step, square=False, shorter=True)
    return InputSize(options.max_size or max(MIN_SIDE, model.preferred_size), step, square=False)


def _square(model: Model, options: Options, step: int) -> int:
    if options.window is None:
        return legal_size(model, options.max_size)[0]
    side = options.max_size or nearest_size((model.preferred_size, model.preferred_size), step)[0]
    try:
        check_size(side, side, step)
    except ValueError as error:
        raise ConfigError(f"max_size {side} with window {options.window}: {error}") from None
    return side


def _check(model: Model, options: Options) -> str | None:
    """The head of the embedding, or None for the backbone's summary."""
    try:
        head = model.text_head() if options.text else None
    except TypeError as error:
        raise ConfigError(f"text: {error}") from None
    if options.output_type != "summary" and model.spec.spatial is None:
        raise ConfigError(f"output_type={options.output_type!r}: this model has no spatial features; use 'summary'")
    if "heads" in options.maps and options.output_type != "summary":
        dense = [name for name in options.heads if model.head_configs[name].spatial is not None]
        if not dense:
            has = [name for name, config in model.head_configs.items() if config.spatial is not None]
            raise ConfigError(f"maps: 'heads' needs heads with spatial features; this model has {', '.join(has) or 0}")
    if options.text is True:
        return head
    return options.heads[0] if options.output_type == "summary" and options.heads else None
