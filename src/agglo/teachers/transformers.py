"""Any vision encoder of transformers as a teacher: SigLIP2, DINOv3, SAM 3 and others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from agglo.hub import ModelFiles
from agglo.teachers._families import Family, family_of
from agglo.teachers._processor import IDENTITY, Conditioner, Pixels, read_pixels
from agglo.teachers._published import PUBLISHED, Published, advice, is_repository, is_version
from agglo.teachers.base import Precision, Teacher, autocast, check_blocks, check_images, check_size, halve, scaled_size
from agglo.types import AssetError, ConfigError, Features, FeatureSpec

_WHERE = "teachers.transformers"


class TransformersTeacher(Teacher):
    """A frozen vision encoder of transformers, by its name on the hub or from a local folder.

    SigLIP and SigLIP2 (fixed and NaFlex), CLIP, DINOv2 (with or without registers), DINOv3 (transformer and ConvNeXt),
    SAM, the trunk of SAM 3 and RADIO each have their own reader; every other encoder that AutoModel builds is read by a
    general rule. Prefix tokens are never part of the map; mean, standard deviation and size are those of the
    checkpoint's own processor. Of larger models, only the vision encoder is loaded.

    Args:
        model: ``OWNER/NAME`` on the hub, or a folder with ``config.json``, ``preprocessor_config.json`` and weights.
        revision: branch, tag or commit on the hub; null for the default branch.
        weights: ``pretrained``, or ``random`` (fixed seed; needs the configuration only): for sizes and speed.
        size: side in pixels of its input. null: the size of its processor for a model trained at one size; for every
            other one, the size that gives as many tokens as the student has.
        dtype: ``float32``, or ``bfloat16`` / ``float16``: linear layers in half precision under autocast, norms,
            positions and the residual stream in float32.
        compile: compile the network with torch.compile, at its first batch of each size.
        summary: False for a dense-only teacher; True requires a summary; null uses one if there is one.
        text: the text tower that belongs to the summary (``{kind: siglip2, repo: ...}``), for zero-shot and search.

    Attributes:
        net: transformers' network.
        family: how its configuration and output are read.
        condition: normalises pixels in [0, 1].

    Raises:
        ConfigError: no such repository, folder or revision; not a vision encoder; an illegal size; a required summary
            that the model lacks.
        AssetError: a gated repository, no network, no weights, files that are damaged or do not fit.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        weights: Literal["pretrained", "random"] = "pretrained",
        size: int | None = None,
        dtype: Precision = "float32",
        compile: bool = False,
        summary: bool | None = None,
        text: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        source, published = _located(model, revision)
        content = _config(source, published, random=weights == "random")
        self.family = family_of(content, f"{_WHERE}: {model}")
        pixels = _pixels(self.family, source, published, random=weights == "random")
        self.condition = Conditioner(pixels)
        self.native = _native(self.family, pixels, model)
        self.canvas = _canvas(self.family, self.native, size, model)
        self.size, self.text_options = size, text
        self.dtype: Precision = dtype
        self.patch = self.family.patch if self.family.tokens else None
        stated = _stated(self.family, pixels)
        self.fill, self.processor = stated.mean, stated.processor
        self.licence = _licence(source, published, random=weights == "random")
        self.spec = _spec(self.family, self.canvas, summary, model)
        self.net: Any
        if weights == "random":
            self.net = self.family.random()
        else:
            self.net = self.family.load(source.weights().parent)
        if self.spec.summary is None:
            self.family.without_summary(self.net)
        halve(self.net, dtype)
        self.requires_grad_(False).eval()
        if compile:
            self.net.compile()

    @classmethod
    def spec_of(cls, **keys: Any) -> FeatureSpec:
        """As :meth:`Teacher.spec_of`, from the configuration alone; published models need no network."""
        model = keys["model"]
        source, published = _located(model, keys.get("revision"))
        family = family_of(_config(source, published, random=True), f"{_WHERE}: {model}")
        native = family.native if published is None or published.side is None else published.side
        canvas = _canvas(family, native and native - native % family.step, keys.get("size"), model)
        return _spec(family, canvas, keys.get("summary"), model)

    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1], H and W multiples of ``spec.step``; features are float32."""
        check_images(images, self.spec.step, self.canvas if self.family.rigid else None)
        with autocast(self.dtype, images.device):
            summary, spatial = self.family.read(self.net, self.condition(images))
        kept = summary if self.spec.summary is not None else None
        return Features(None if kept is None else kept.float(), spatial.float().contiguous())

    def intermediates(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """See :meth:`Teacher.intermediates`."""
        lists = [module for module in self.net.modules() if isinstance(module, nn.ModuleList)]
        if not self.family.tokens or not lists:
            return super().intermediates(images, blocks)
        layers = max(lists, key=len)
        check_blocks(blocks, len(layers), "blocks")
        found: dict[int, Tensor] = {}

        def keep(block: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                found[block] = output[0] if isinstance(output, tuple) else output

            return hook

        with contextlib.ExitStack() as stack:
            for block in set(blocks):
                stack.callback(layers[block].register_forward_hook(keep(block)).remove)
            self(images)
        grid = images.shape[-2] // self.spec.stride, images.shape[-1] // self.spec.stride
        return [_to_map(found[block], grid) for block in blocks]

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """Its fixed size; the view scaled to the key ``size``; or the size with equally many tokens."""
        if self.canvas is None and self.size is not None:
            return scaled_size(size, self.size, self.spec.step)
        return super().input_size(size, stride)


def _to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens ``(B, N, C)``, after any prefix tokens, or ``(B, h, w, C)`` as a map ``(B, C, h, w)``."""
    if tokens.ndim == 3:
        tokens = tokens[:, -grid[0] * grid[1] :].unflatten(1, grid)
    return tokens.permute(0, 3, 1, 2).float().contiguous()


def _located(model: str, revision: str | None) -> tuple[ModelFiles, Published | None]:
    gated = [name for name, each in PUBLISHED.items() if each.gated]
    version = model.partition("@")[0]
    if is_version(version) and not Path(model).expanduser().exists():
        raise ConfigError(advice(_WHERE, version))
    source = ModelFiles(model, _WHERE, revision, known=PUBLISHED, gated=gated)
    return source, None if source.local else PUBLISHED.get(source.name)


def _config(source: ModelFiles, published: Published | None, *, random: bool) -> Mapping[str, Any]:
    """The content of config.json; from :data:`PUBLISHED` if no weights are read."""
    if published is not None and random:
        return published.config
    try:
        source.need("config.json")
    except AssetError as error:
        # Without its configuration, only the name identifies a RADIO.
        if source.local or published is not None or not is_repository(source.name):
            raise
        raise ConfigError(advice(_WHERE, source.name)) from error
    content = source.json("config.json")
    if "model_type" not in content and isinstance(content.get("args"), Mapping):
        raise ConfigError(advice(_WHERE, source.label, content, local=source.local))
    return content


def _pixels(family: Family, source: ModelFiles, published: Published | None, *, random: bool) -> Pixels:
    if family.conditions:
        return IDENTITY
    if published is not None and random:
        return Pixels(published.mean, published.std, published.side)
    return read_pixels(source)


def _stated(family: Family, pixels: Pixels) -> Pixels:
    """The normalisation of the processor, or of a network that normalises pixels itself."""
    if not family.conditions:
        return pixels
    config = family.config
    return Pixels(tuple(config.norm_mean), tuple(config.norm_std), pixels.side)


def _native(family: Family, pixels: Pixels, model: str) -> int | None:
    """The side the weights were made for: the processor's, in whole patches, or the only one of a rigid network."""
    native = family.native
    if pixels.side is not None:
        native = max(family.step, pixels.side - pixels.side % family.step)
    if family.rigid and native != family.native:
        raise ConfigError(
            f"{_WHERE}: the processor of {model} makes images of {pixels.side} pixels, but the network runs at "
            f"{family.native} only: they belong to different checkpoints"
        )
    return native


def _canvas(family: Family, native: int | None, size: int | None, model: str) -> int | None:
    """The side of the fixed input, or None for a model that follows the student."""
    if size is not None and family.rigid and size != native:
        raise ConfigError(f"{_WHERE}.size: {model} runs at {native} pixels only, not at {size}")
    check_size(size, family.step, _WHERE, model)
    if not family.fixed:
        return None
    return size or native


def _spec(family: Family, canvas: int | None, summary: bool | None, model: str) -> FeatureSpec:
    if summary and family.summary is None:
        raise ConfigError(
            f"{_WHERE}.summary: {model} has no summary, only a map; set `summary: false` or leave the key out, and "
            "give the teacher `summary_weight: 0`"
        )
    kept = family.summary if summary in (None, True) else None
    step = canvas if family.rigid and canvas is not None else family.step
    slots = family.slots if kept is not None else 1
    return FeatureSpec(summary=kept, spatial=family.spatial, stride=family.patch, step=step, slots=slots)


def _licence(source: ModelFiles, published: Published | None, *, random: bool) -> str:
    if random:
        return "none (random weights)"
    if published is not None:
        return published.licence
    return f"unknown ({source.folder.name})" if source.local else f"unknown (see the card of {source.name})"
