"""Families of vision encoders in transformers: how each is built, and what its output means."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agglo.config import nearest
from agglo.extras import require
from agglo.types import AssetError, ConfigError


class Family(ABC):
    """One model of a family, described by its configuration alone: no weights are read to know what it returns.

    The constructor reads the configuration, :meth:`read` reads the output; :data:`FAMILIES` lists the classes.

    Args:
        config: transformers' configuration of the vision encoder, or of a larger model that contains it.

    Attributes:
        config: of the vision encoder.
        network: transformers' class of the vision encoder.
        summary: width of the summary, or None if the model has none.
        slots: number of class tokens concatenated in the summary.
        spatial: channels of the map.
        patch: side of a token in pixels.
        step: image sides must be multiples of this.
        tokens: all tokens have side ``patch``; False for pyramids.
        native: side in pixels of the square images the configuration was made for, or None.
        fixed: trained at one size, and uses it for every view unless the recipe sets another.
        rigid: runs at :attr:`native` only.
        conditions: the network normalises pixels in [0, 1] itself.
    """

    network: str
    tokens: bool = True
    fixed: bool = False
    rigid: bool = False
    conditions: bool = False
    keys: ClassVar[Mapping[str, str] | None] = None
    """Patterns → replacements for parameter names of larger models that contain the encoder."""

    def __init__(self, config: Any) -> None:
        self.config = getattr(config, "vision_config", config)
        self.patch = side(getattr(self.config, "patch_size", 1), "patch")
        self.step = self.patch
        self.spatial = int(getattr(self.config, "hidden_size", 0))
        self.summary: int | None = self.spatial
        self.slots = 1
        size = getattr(self.config, "image_size", None)
        self.native: int | None = None if size is None else side(size, "image")

    @abstractmethod
    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Summary ``(B, D)`` or None, and map ``(B, C, H, W)``, of normalised pixels ``(B, 3, h, w)``."""

    def without_summary(self, net: Any) -> None:
        """Remove the layers that only the summary needs; none by default."""
        del net

    # --- building -----------------------------------------------------------------------------------------------------

    def random(self) -> nn.Module:
        """The network with random weights, the same in every process, on the default device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._network()(self.config)

    def load(self, folder: Path) -> nn.Module:
        """The network with the weights of a local folder, float32.

        Raises:
            AssetError: the weights are damaged, or do not fit this configuration.
        """
        options: dict[str, Any] = {} if self.keys is None else {"key_mapping": dict(self.keys)}
        try:
            with _quiet():
                net, report = self._network().from_pretrained(
                    folder,
                    config=self.config,
                    dtype=torch.float32,
                    local_files_only=True,
                    output_loading_info=True,
                    **options,
                )
        except Exception as error:  # a truncated file, other sizes, a pickle with foreign objects
            raise AssetError(f"{folder}: the weights cannot be read as {self.network} ({error})") from error
        missing = sorted(key for key in report["missing_keys"] if not self.is_optional(net, key))
        if missing:
            raise AssetError(
                f"{folder}: the weights do not fit its config.json: {len(missing)} tensors of {self.network} are "
                f"missing ({', '.join(missing[:5])}); download the checkpoint again"
            )
        unused = _unused(net, report["unexpected_keys"])
        if unused:
            raise AssetError(
                f"{folder}: config.json does not describe all of its weights: {len(unused)} tensors have no place in "
                f"{self.network} ({', '.join(unused[:5])}); without them the features are wrong"
            )
        return net

    def is_optional(self, net: Any, key: str) -> bool:
        """Whether a checkpoint may lack the parameter ``key``, which is then not used."""
        del net
        return key.endswith("mask_token")  # only masked training reads it

    def _network(self) -> Any:
        return getattr(transformers(), self.network)


def transformers() -> Any:
    """The package transformers."""
    return require("transformers", "teachers")


def side(value: Any, what: str) -> int:
    """One side of a square given as a number, a pair or ``{height, width}``.

    Raises:
        ConfigError: not a square.
    """
    if isinstance(value, Mapping):
        value = tuple(value.values())
    sides = {int(each) for each in value} if isinstance(value, list | tuple) else {int(value)}
    if len(sides) != 1:
        raise ConfigError(f"the {what} of this model is {value}, not a square: it cannot be a teacher")
    return sides.pop()


def grid(tokens: Tensor, pixels: Tensor, patch: int, prefix: int = 0) -> Tensor:
    """Row-major tokens ``(B, prefix + h*w, C)`` of images ``(B, 3, H, W)`` as a map ``(B, C, h, w)``.

    Raises:
        ConfigError: another number of tokens; a wrong prefix would shift every cell.
    """
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    if tokens.shape[1] != prefix + height * width:
        raise ConfigError(
            f"{tokens.shape[1]} tokens are not {prefix} before a grid of {height}x{width}: the configuration does not "
            "describe these weights"
        )
    return tokens[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _unused(net: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """The unread tensors that belong inside the network: not those of a text tower, a decoder or a classifier.

    Constants that the network computes itself (position ids, rotary frequencies) may be stored as well.
    """
    base = str(getattr(net, "base_model_prefix", ""))
    parts = [module for module in (net, getattr(net, base, None) if base else None) if isinstance(module, nn.Module)]
    children = {name for module in parts for name, _ in module.named_children()}
    computed = {name.rpartition(".")[2] for name, _ in net.named_buffers()} | set(_CONSTANTS)
    inner = {key: key.removeprefix(f"{base}.") for key in unexpected}
    return sorted(
        key
        for key, name in inner.items()
        if name.partition(".")[0] in children and name.rpartition(".")[2] not in computed and name not in _NOT_IMAGES
    )


_CONSTANTS = ("position_ids", "inv_freq", "periods", "relative_position_index", "mask_token", "num_batches_tracked")
_NOT_IMAGES = ("embeddings.video_patch_projection.weight",)
"""RADIO's projection of stacked video frames."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report of unread tensors: only the vision encoder is loaded, on purpose."""
    verbosity = transformers().logging
    before = verbosity.get_verbosity()
    bars = verbosity.is_progress_bar_enabled()
    verbosity.set_verbosity(logging.CRITICAL)
    verbosity.disable_progress_bar()
    try:
        yield
    finally:
        verbosity.set_verbosity(before)
        if bars:
            verbosity.enable_progress_bar()


# --- trained with a text tower ----------------------------------------------------------------------------------------


class SigLIP(Family):
    """SigLIP, and SigLIP2 of a fixed resolution: attention-pooled summary, map after the final norm, no prefix.

    Sides are cut to whole patches: a network with patch 14 never reads the last 6 of 384 pixels, and a view of 378
    gives the same tokens with every cell at its true position.
    """

    network = "SiglipVisionModel"
    fixed = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.native is not None:
            self.native -= self.native % self.patch
        if not getattr(self.config, "vision_use_head", True):
            self.summary = None

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels, interpolate_pos_encoding=True)
        return out.pooler_output, grid(out.last_hidden_state, pixels, self.patch)

    def without_summary(self, net: Any) -> None:
        net.use_head, net.head = False, None


class SigLIP2NaFlex(SigLIP):
    """SigLIP2 of flexible resolution: takes patches and the shape of their grid, and follows the student's size."""

    network = "Siglip2VisionModel"
    fixed = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.native = self.patch * round(int(self.config.num_patches) ** 0.5)

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        # All images of a batch have one size, so nothing is padded and no mask is needed. The network reads a mask and
        # the shapes on the host: on the device, both would force a sync.
        height, width = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        count = len(pixels)
        patches = F.pixel_unshuffle(pixels, self.patch).unflatten(1, (3, self.patch, self.patch))
        patches = patches.permute(0, 4, 5, 2, 3, 1).reshape(count, height * width, -1)  # row, column, channel last
        out = net(
            pixel_values=patches,
            pixel_attention_mask=None,
            spatial_shapes=torch.tensor([[height, width]] * count, device="cpu"),
        )
        return out.pooler_output, grid(out.last_hidden_state, pixels, self.patch)


class CLIP(Family):
    """CLIP: class token first, map before the final norm.

    The summary is the projected class token, which is comparable with text, if the checkpoint has the projection; else
    the class token after the final norm.
    """

    fixed = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.native is not None:
            self.native -= self.native % self.patch
        whole = config is not self.config
        self.projects = whole or any("WithProjection" in name for name in config.architectures or ())
        if whole:  # the vision part of a whole model may still state its default
            self.config.projection_dim = config.projection_dim
        self.network = "CLIPVisionModelWithProjection" if self.projects else "CLIPVisionModel"
        self.summary = int(self.config.projection_dim) if self.projects else self.spatial

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels, interpolate_pos_encoding=True)
        summary = out.image_embeds if self.projects else out.pooler_output
        return summary, grid(out.last_hidden_state, pixels, self.patch, prefix=1)


# --- self-supervised --------------------------------------------------------------------------------------------------


class DINO(Family):
    """DINOv2, with or without registers, and DINOv3: class token, registers, patches; all after the final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.network = {
            "dinov2": "Dinov2Model",
            "dinov2_with_registers": "Dinov2WithRegistersModel",
            "dinov3_vit": "DINOv3ViTModel",
        }[self.config.model_type]
        self.prefix = 1 + int(getattr(self.config, "num_register_tokens", 0) or 0)

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels)
        return out.pooler_output, grid(out.last_hidden_state, pixels, self.patch, self.prefix)


class DINOv3ConvNext(Family):
    """A pyramid of stride 32: the mean of the last stage precedes its cells, and all pass the final norm."""

    network = "DINOv3ConvNextModel"
    tokens = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patch = self.step = 4 * 2 ** (len(self.config.hidden_sizes) - 1)
        self.spatial = self.summary = int(self.config.hidden_sizes[-1])

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels)
        return out.pooler_output, grid(out.last_hidden_state, pixels, self.patch, prefix=1)


# --- segmentation: no summary -----------------------------------------------------------------------------------------


class SAM(Family):
    """SAM's vision encoder before its neck (as in AM-RADIO): the width of its blocks, at its native size only."""

    network = "SamVisionModel"
    fixed = rigid = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.summary = None

    def load(self, folder: Any) -> nn.Module:
        return self._without_neck(super().load(folder))

    def random(self) -> nn.Module:
        return self._without_neck(super().random())

    @staticmethod
    def _without_neck(net: Any) -> nn.Module:
        net.vision_encoder.neck = nn.Identity()
        return net

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, net(pixels).last_hidden_state.permute(0, 3, 1, 2)  # channels come last, before the neck


class SAM3(Family):
    """The trunk of SAM 3, un-normalised, before the neck; from the trunk alone, the image model or the video model."""

    network = "Sam3ViTModel"
    fixed = rigid = True
    keys = {r"^(?:detector_model\.)?(?:vision_encoder\.)?backbone\.": ""}

    def __init__(self, config: Any) -> None:
        config = getattr(config, "detector_config", config)
        config = getattr(config, "vision_config", config)
        super().__init__(getattr(config, "backbone_config", config))
        self.summary = None

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, grid(net(pixels).last_hidden_state, pixels, self.patch)


# --- agglomerative ----------------------------------------------------------------------------------------------------


class Radio(Family):
    """RADIO in transformers' own layout: the summary class tokens concatenated, and the map."""

    network = "RadioModel"
    conditions = True
    keys = {r"\.ls(\d)\.(?:grandma|gamma)$": r".layer_scale\1.lambda1"}  # NVIDIA's names, which RadioModel drops

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.slots = len(self.config.summary_idxs)
        self.summary = self.slots * self.spatial

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        out = net(pixels)
        return out.summary, grid(out.features, pixels, self.patch)


# --- everything else --------------------------------------------------------------------------------------------------


class Generic(Family):
    """Any other vision encoder that AutoModel builds; its layout is measured on the meta device.

    * ``last_hidden_state (B, C, h, w)`` is the map, and so is ``(B, h, w, C)``: the sides are those that grow with the
      image.
    * Of ``last_hidden_state (B, N, C)``, the last ``h*w`` tokens, row by row, are the map; those before are a prefix.
      A model with tokens after its patches, or in another order, needs its own family.
    * The summary is ``pooler_output`` if the model has one and the checkpoint its weights; else the first prefix token;
      else none.
    * Nothing else is changed: whether the map is after the final norm depends on the model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if self.config is not config:
            raise ConfigError(
                f"a {config.model_type} is more than a vision encoder, and the place of the encoder in it is unknown: "
                "save the encoder alone with save_pretrained, and use its folder"
            )
        self.network = "AutoModel"
        self.channels_last = False
        self.native = self.native or 224
        try:
            with torch.device("meta"):
                net = self._network()(self.config).eval()
                self.interpolates = "interpolate_pos_encoding" in inspect.signature(net.forward).parameters
                self._measure(net)
        except ConfigError:
            raise
        except Exception as error:  # a language model, a detector, anything AutoModel can build
            raise ConfigError(f"a {config.model_type} does not run on images alone: {error}") from error

    def _network(self) -> Any:
        # AutoModel is a factory: it builds and loads, but it is not a class of networks.
        return _Auto

    def _measure(self, net: Any) -> None:
        size = self.native or 224
        hidden, pooled = self._run(net, torch.zeros(1, 3, size, size, device="meta"))
        if hidden.ndim == 4:
            self._measure_map(net, hidden.shape, size)
        else:
            self.spatial = int(hidden.shape[-1])
            self.prefix = int(hidden.shape[1]) - (size // self.patch) ** 2
            if self.prefix < 0 or self.patch == 1:
                raise ConfigError(
                    f"{hidden.shape[1]} tokens of an image of {size} pixels do not form a grid of patches of "
                    f"{self.patch}"
                )
            stated = [int(getattr(self.config, key, 0) or 0) for key in ("num_register_tokens", "n_cls_tokens")]
            if self.prefix > 2 + sum(stated):  # class and distillation token; YOLOS has detection tokens at the end
                raise ConfigError(
                    f"its config.json does not describe the {self.prefix} tokens besides the patches, so that the "
                    "place of the patches is unknown; use another checkpoint"
                )
        self.pools = pooled is not None
        self.summary = int(pooled.shape[1]) if pooled is not None else self.spatial if self.prefix else None
        try:
            other = size + self.step
            self._run(net, torch.zeros(1, 3, other, other, device="meta"))
        except Exception:  # noqa: BLE001 - any failure means that it does not run at that size
            self.rigid = self.fixed = True

    def _measure_map(self, net: Any, shape: torch.Size, size: int) -> None:
        """Layout, channels and stride of a map ``(B, C, h, w)`` or ``(B, h, w, C)``."""
        self.prefix, self.tokens = 0, False
        try:  # strides are powers of two: at 512 pixels no stage rounds its side, so the stride is exact
            other = self._run(net, torch.zeros(1, 3, 512, 512, device="meta"))[0].shape
        except Exception:  # noqa: BLE001 - any failure means that it does not run at that size
            other = shape
        grows = other[2] != shape[2]
        channel = next((n for n in (1, 3) if shape[n] == other[n] and (grows or shape[n] != shape[2])), None)
        if channel is None or shape[2] != shape[4 - channel] or other[2] != other[4 - channel]:
            raise ConfigError(f"the layout of its map {tuple(shape)} for {size}x{size} pixels is not understood")
        self.channels_last = channel == 3
        self.spatial = int(shape[channel])
        self.patch = self.step = 512 // int(other[2]) if other != shape else size // int(shape[2])

    def _run(self, net: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        out = net(pixels, interpolate_pos_encoding=True) if self.interpolates else net(pixels)
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state, None if pooled is None else pooled.flatten(1)

    def is_optional(self, net: Any, key: str) -> bool:
        if key.startswith("pooler.") and self.prefix:  # often missing: the class token is then the summary
            net.pooler, self.pools = None, False
            return True
        return super().is_optional(net, key)

    def read(self, net: Any, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        hidden, pooled = self._run(net, pixels)
        first = hidden[:, 0] if hidden.ndim == 3 and self.prefix else None
        if hidden.ndim == 3:
            spatial = grid(hidden, pixels, self.patch, self.prefix)
        else:
            spatial = hidden.permute(0, 3, 1, 2) if self.channels_last else hidden
        return (pooled if self.pools else first), spatial


class _Auto:
    """AutoModel with the interface that :class:`Family` expects."""

    def __new__(cls, config: Any) -> nn.Module:
        return transformers().AutoModel.from_config(config)

    @staticmethod
    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        return transformers().AutoModel.from_pretrained(*arguments, **options)


FAMILIES: dict[str, type[Family]] = {
    "siglip": SigLIP,  # also the type of SigLIP2 checkpoints of a fixed resolution
    "siglip_vision_model": SigLIP,
    "siglip2": SigLIP2NaFlex,
    "siglip2_vision_model": SigLIP2NaFlex,
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "dinov3_vit": DINO,
    "dinov3_convnext": DINOv3ConvNext,
    "sam": SAM,
    "sam_vision_model": SAM,
    "sam3": SAM3,
    "sam3_vision_model": SAM3,
    "sam3_vit_model": SAM3,
    "sam3_video": SAM3,
    "radio": Radio,
}
"""``model_type`` of a config.json → family; :class:`Generic` for every other type."""


def family_of(content: Mapping[str, Any], where: str) -> Family:
    """The family of a model, from the content of its config.json.

    Raises:
        ConfigError: no ``model_type``, one that this transformers lacks, bad values, or not a vision encoder.
    """
    values = dict(content)
    kind = values.pop("model_type", None)
    mapping = transformers().CONFIG_MAPPING
    if kind not in mapping:
        raise ConfigError(
            f"{where}: transformers {transformers().__version__} has no model of type {kind!r}"
            f"{nearest(str(kind), [name for name in mapping if name[:3] == str(kind)[:3]])}. Use `kind: timm` or "
            "`kind: open_clip` for models of those packages; a newer model may need a newer transformers"
        )
    try:
        config = mapping[kind].from_dict(values)
    except Exception as error:  # each configuration class raises its own errors
        raise ConfigError(f"{where}: config.json is not a configuration of {kind}: {error}") from error
    try:
        return FAMILIES.get(config.model_type, Generic)(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
