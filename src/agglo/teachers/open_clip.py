"""The vision half of an OpenCLIP model as a teacher."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agglo.config import nearest
from agglo.extras import require
from agglo.hub import ModelFiles
from agglo.teachers._processor import Conditioner, Pixels
from agglo.teachers._published import OPEN_CLIP
from agglo.teachers.base import Precision, Teacher, autocast, check_images, halve
from agglo.types import AssetError, ConfigError, Features, FeatureSpec

_WHERE = "teachers.open_clip"
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_CONFIG = "open_clip_config.json"
_GIVE = "Set both, as its training had them: `mean: [0.5, 0.5, 0.5]` and `std: [0.5, 0.5, 0.5]` for SigLIP, for example"
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 64, "heads": 1, "layers": 1}
"""A minimal text tower for a constructor that requires one; it is discarded at once."""


class OpenCLIPTeacher(Teacher):
    """The vision tower of an OpenCLIP model: the text-comparable embedding, and the map of its last block.

    ``summary`` is the image embedding before normalisation; ``spatial`` the patch tokens after the tower's final norm
    (the last stage of a convolutional tower). Mean and standard deviation are those of the checkpoint: of a file, those
    of the tag with this file name, or of all tags of the architecture if they agree. The text tower is not built.

    Args:
        model: OpenCLIP's name of an architecture; ``hf-hub:OWNER/NAME``; or a folder with ``open_clip_config.json`` and
            the weights.
        pretrained: OpenCLIP's tag of the weights, or the path of a checkpoint (safetensors, or a pickle of tensors
            only). Not used for a folder or a repository, which has its own weights.
        mean, std: three numbers for pixels in [0, 1], for a checkpoint that does not determine them.
        weights: ``pretrained``, or ``random`` (fixed seed): for sizes and speed.
        dtype: as of the ``transformers`` kind.
        compile: compile the tower with torch.compile, at its first batch.
        summary: False for a dense-only teacher; null or True for both.
        text: the text tower that belongs to the summary (``{kind: open_clip, model: ...}``), for zero-shot and search.

    Attributes:
        net: OpenCLIP's vision tower.

    Raises:
        ConfigError: unknown architecture, tag, repository or folder; a tag trained with the other GELU; mean and
            standard deviation that are neither known nor given.
        AssetError: gated, no network, no weights, or weights that do not fit.
        MissingExtraError: open_clip is not installed.
    """

    def __init__(
        self,
        *,
        model: str = "ViT-H-14-378-quickgelu",
        pretrained: str = "dfn5b",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        weights: Literal["pretrained", "random"] = "pretrained",
        dtype: Precision = "float32",
        compile: bool = False,
        summary: bool | None = None,
        text: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        given = _given(mean, std)
        found = _find(model, pretrained, given, random=weights == "random")
        self.dtype: Precision = dtype
        self.text_options = text
        self.net: Any = _tower(found.config, model)
        if weights == "pretrained":
            _assign(self.net, _read(found.file()))
        self.licence = found.licence if weights == "pretrained" else "none (random weights)"
        self.condition = Conditioner(found.pixels)
        self.fill, self.processor = found.pixels.mean, found.pixels.processor
        self.normalises = getattr(self.net, "attn_pool", None) is None
        self.unseen = 0
        self.spec, self.patch, self.unseen = _measure(self, summary is not False, model)
        self.canvas = self.native = self.spec.step
        halve(self.net, dtype)
        self.requires_grad_(False).eval()
        self._reader = torch.compile(self.read) if compile else self.read

    @classmethod
    def spec_of(cls, **keys: Any) -> FeatureSpec:
        """As :meth:`Teacher.spec_of`, on the meta device."""
        with torch.device("meta"):
            return cls(**{**keys, "weights": "random", "compile": False, "dtype": "float32"}).spec

    def read(self, pixels: Tensor, summary: bool) -> tuple[Tensor | None, Tensor]:
        """Summary and map of normalised pixels, in one pass."""
        if self.unseen:  # some towers require their nominal side, though no patch covers its last pixels
            pixels = F.pad(pixels, (0, self.unseen, 0, self.unseen))
        out = self.net.forward_intermediates(
            pixels, indices=1, normalize_intermediates=self.normalises, intermediates_only=not summary
        )
        return out.get("image_features"), out["image_intermediates"][-1]

    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, side, side)`` in [0, 1] at the tower's own side; features are float32."""
        check_images(images, self.spec.step, self.canvas)
        with autocast(self.dtype, images.device):
            summary, spatial = self._reader(self.condition(images), self.spec.summary is not None)
        return Features(None if summary is None else summary.float(), spatial.float().contiguous())


# --- location ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Location:
    """Architecture, pixel normalisation and location of the weights."""

    config: Mapping[str, Any]
    pixels: Pixels
    licence: str
    source: ModelFiles | None = None
    tag: Mapping[str, Any] | None = None
    path: Path | None = None

    def file(self) -> Path:
        """The checkpoint's path, downloaded if needed."""
        if self.path is not None:
            return self.path
        if self.source is not None:
            return self.source.weights(_FILES)
        tag = dict(self.tag or {})
        try:
            return Path(require("open_clip", "teachers").download_pretrained(tag))
        except Exception as error:  # each kind of address raises its own errors
            raise AssetError(
                f"{_WHERE}: the weights at {tag.get('url')} cannot be downloaded ({error}). Download that file on a "
                "machine with a network, then use `pretrained: PATH`"
            ) from error


def _find(model: str, pretrained: str, given: Pixels | None, *, random: bool) -> _Location:
    open_clip = require("open_clip", "teachers")
    folder = Path(model).expanduser()
    if model.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or folder.exists():
        return _stored(ModelFiles(model, _WHERE, known=OPEN_CLIP), given, random=random)
    config = open_clip.get_model_config(model) if "/" not in model else None
    if config is None:
        if model in OPEN_CLIP:
            raise ConfigError(f"{_WHERE}: for a repository, use `model: hf-hub:{model}`")
        close = difflib.get_close_matches(model, open_clip.list_models(), n=6, cutoff=0.3)
        raise ConfigError(f"{_WHERE}: open_clip has no model {model!r}{nearest(model, close)}")
    file = Path(pretrained).expanduser()
    if file.is_file():
        tag = _tag_of(file, model)
        if tag is not None:
            _check_gelu(tag, config, model, file.name)
        pixels = given or _pixels_of(model) if tag is None else given or _pixels(tag)
        return _Location(config, pixels, f"unknown ({file.name})", path=file)
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if random:  # the tag only matters for weights
        return _Location(config, given or _pixels(tag or {}), "")
    if not tag:
        known = open_clip.list_pretrained_tags_by_model(model)
        raise ConfigError(
            f"{_WHERE}: {pretrained!r} is neither a file nor a tag of {model} in open_clip{nearest(pretrained, known)}"
        )
    _check_gelu(tag, config, model, pretrained)
    where = str(tag.get("hf_hub") or tag.get("url")).rstrip("/")
    repo = OPEN_CLIP.get(where)
    source = ModelFiles(where, _WHERE, known=OPEN_CLIP) if tag.get("hf_hub") else None
    licence = repo.licence if repo else f"unknown ({where})"
    return _Location(config, given or _pixels(tag), licence, source=source, tag=tag)


def _check_gelu(tag: Mapping[str, Any], config: Mapping[str, Any], model: str, name: str) -> None:
    if bool(tag.get("quick_gelu", False)) != bool(config.get("quick_gelu", False)):
        other = model.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{model}-quickgelu"
        raise ConfigError(
            f"{_WHERE}: {name!r} and {model} have different GELUs, which gives wrong features; use `model: {other}`"
        )


def _tag_of(file: Path, model: str) -> Mapping[str, Any] | None:
    """The tag whose download has this file name, which must be distinctive."""
    open_clip = require("open_clip", "teachers")
    tags = (open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model))
    named = [tag for tag in tags if str(tag.get("url") or "").rpartition("/")[2] == file.name]
    return named[0] if len(named) == 1 else None


def _pixels_of(model: str) -> Pixels:
    """Mean and standard deviation of all tags of an architecture."""
    open_clip = require("open_clip", "teachers")
    tags = open_clip.list_pretrained_tags_by_model(model)
    found = {_pixels(open_clip.get_pretrained_cfg(model, tag)) for tag in tags}
    if len(found) != 1:
        why = f"the tags of {model} have different ones" if found else f"open_clip has no tag of {model}"
        raise ConfigError(f"{_WHERE}: mean and std of the file are unknown, because {why}. {_GIVE}")
    return found.pop()


def _given(mean: list[float] | None, std: list[float] | None) -> Pixels | None:
    """The keys ``mean`` and ``std``, if given."""
    if mean is None and std is None:
        return None
    for key, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != 3 or not all(0 <= value < 100 for value in values):
            raise ConfigError(f"{_WHERE}.{key}: {values} is not three numbers for pixels in [0, 1]. {_GIVE}")
    if 0 in (std or ()):
        raise ConfigError(f"{_WHERE}.std: {std} contains 0")
    first, second = ((float(v[0]), float(v[1]), float(v[2])) for v in (mean or [], std or []))
    return Pixels(first, second)


def _stored(source: ModelFiles, given: Pixels | None, *, random: bool) -> _Location:
    """A model of a folder or of the hub, with its own architecture and pixel normalisation."""
    known = None if source.local else OPEN_CLIP.get(source.name)
    if known is not None and random:
        config = require("open_clip", "teachers").get_model_config(known.architecture)
        return _Location(config, given or Pixels(known.mean, known.std), known.licence)
    source.need(_CONFIG)
    content = source.json(_CONFIG)
    config = content.get("model_cfg", content)
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg"} <= config.keys():
        raise AssetError(f"{_WHERE}: {_CONFIG} of {source.label} lacks embed_dim or vision_cfg")
    licence = f"unknown ({source.folder.name})" if source.local else f"unknown (see the card of {source.name})"
    stated = content.get("preprocess_cfg") or {}
    if given is None and not random and not {"mean", "std"} <= stated.keys():
        raise ConfigError(f"{_WHERE}: {_CONFIG} of {source.label} has no mean and std in `preprocess_cfg`. {_GIVE}")
    return _Location(config, given or _pixels(stated), known.licence if known else licence, source)


def _pixels(stated: Mapping[str, Any]) -> Pixels:
    """Mean and standard deviation of a checkpoint; OpenCLIP's defaults if it states none."""
    constants = require("open_clip.constants", "teachers")
    mean = stated.get("mean") or constants.OPENAI_DATASET_MEAN
    std = stated.get("std") or constants.OPENAI_DATASET_STD
    return Pixels((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


# --- the tower --------------------------------------------------------------------------------------------------------


def _tower(config: Mapping[str, Any], model: str) -> nn.Module:
    """The vision tower with random weights, the same in every process."""
    open_clip = require("open_clip", "teachers")
    options = {key: value for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    vision = {**options["vision_cfg"], "timm_model_pretrained": False}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return open_clip.CustomTextCLIP(**{**options, "vision_cfg": vision, "text_cfg": _NO_TEXT}).visual
    except Exception as error:  # each architecture raises its own errors
        raise ConfigError(f"{_WHERE}: {model} cannot be built: {error}") from error


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that belong to its vision tower, float32, by their names inside it."""
    try:
        if file.suffix == ".safetensors":
            with require("safetensors", "teachers").safe_open(file, framework="pt") as tensors:
                return {_inner(key): tensors.get_tensor(key).float() for key in tensors.keys() if _inner(key)}  # noqa: SIM118
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        state = state.get("state_dict", state)
        return {_inner(key): value.float() for key, value in state.items() if _inner(key)}
    except Exception as error:  # truncated, a pickle with foreign objects, TorchScript, another kind of file
        raise AssetError(
            f"{file}: cannot be read as weights ({error}). Fetch it again; pickles with other objects are never read: "
            "save its state_dict() as safetensors where you trust it"
        ) from error


def _inner(key: str) -> str:
    key = key.removeprefix("module.")
    return key.removeprefix("visual.") if key.startswith("visual.") else ""


def _assign(net: nn.Module, state: dict[str, Tensor]) -> None:
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise AssetError(f"{_WHERE}: the weights are of another size: {error}") from error
    if missing or unexpected:
        raise AssetError(
            f"{_WHERE}: the weights do not fit this vision tower (missing {missing[:5]}, left over {unexpected[:5]})"
        )


@torch.no_grad()
def _measure(teacher: OpenCLIPTeacher, summary: bool, model: str) -> tuple[FeatureSpec, int | None, int]:
    """What the tower returns, the side of its tokens and the pixels it never reads, measured on one black image."""
    net = teacher.net.eval()
    size = net.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ConfigError(f"{_WHERE}: {model} takes images of {height}x{width}, not squares: it cannot be a teacher")
    pooled, spatial = teacher.read(torch.zeros(1, 3, height, height), summary)
    cells = spatial.shape[-1]
    embed = getattr(getattr(net, "trunk", None), "patch_embed", None)
    stated = getattr(net, "patch_size", None) or getattr(embed, "patch_size", None)
    patch = None if stated is None else stated if isinstance(stated, int) else max(stated)
    if patch is not None and height // patch != cells:
        patch = None  # a pyramid whose first patches are merged later on
    stride = patch or height // cells
    canvas = stride * cells  # 378 of 384 pixels at patch 14: every cell is at its true position
    spec = FeatureSpec(None if pooled is None else pooled.shape[1], spatial.shape[1], stride=stride, step=canvas)
    return spec, patch, height - canvas
