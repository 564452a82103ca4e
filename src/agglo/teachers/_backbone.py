"""A frozen timm backbone that normalises its own input, shared by the kinds ``timm`` and ``conse``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agglo.config import nearest
from agglo.extras import require
from agglo.hub import ModelFiles
from agglo.nn.same_padding import replace_same_convolutions
from agglo.types import AssetError, ConfigError
from agglo.weights import bundled

_LITE = {f"tf_efficientnet_lite{size}": size for size in bundled.LITE_SIZES}
_LONG = 300
"""Characters of an error of timm that are kept."""


class Backbone(nn.Module):
    """A timm model with its weights, mean and standard deviation.

    Args:
        model: timm's name; a folder with ``config.json`` and weights, as timm saves them; or ``hf_hub:OWNER/NAME``, a
            repository of that form. A folder or repository has its own mean, standard deviation and size.
        weights: ``"bundled"``, ``"random"`` (or None), ``"hub"`` or the path of a safetensors file. For a folder or a
            repository, ``"bundled"`` and ``"hub"`` are its own weights.
        size: input side in pixels; a model of one fixed size is built for this one.

    Attributes:
        net: the timm model.
        side: the only legal input side in pixels, or None if any size runs.
        default_side: input side in pixels of the training, or ``side``.
        licence: licence of the weights.
        processor: as :attr:`Teacher.processor`.
        patch: side of a token in pixels if all stages have tokens of one side (a plain vision transformer), or None.

    Raises:
        ConfigError: unknown model, folder or repository, or no such weights.
        AssetError: weights that do not fit the model; no network; a gated repository.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str, weights: str | None, size: int | None = None) -> None:
        super().__init__()
        self.net: Any
        stored = _stored(model)
        if stored is None:
            check_name(model)
            self.net, options = _create(model, weights == "hub", size)
        else:
            own = weights in ("bundled", "hub")
            self.net, options = _open(stored, model, size, weights=own)
        config: dict[str, Any] = self.net.pretrained_cfg
        if stored is not None and weights in ("bundled", "hub"):
            self.licence = _licence(stored, config)
        else:
            self.licence = _load(self.net, model, weights, config)
        self.default_side = int(options.get("img_size", config["input_size"][-1]))
        fixed = bool(config.get("fixed_input_size")) and "dynamic_img_size" not in options
        self.side = self.default_side if fixed else None
        if size is not None and self.side not in (None, size):
            raise ConfigError(f"timm's {model} runs at {self.side} pixels only, not at {size}")
        _check_pixels(config, model)
        replace_same_convolutions(self.net, require("timm", "timm").layers.Conv2dSame)
        self.patch = _patch(self.net)
        self.layout = _layout(self.net)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.processor = {"mean": [*config["mean"]], "std": [*config["std"]], "size": self.default_side}
        self.requires_grad_(False).eval()

    def condition(self, images: Tensor) -> Tensor:
        """Normalise RGB ``(B, 3, H, W)`` in [0, 1]."""
        return ((images - self.mean) / self.std).contiguous(memory_format=self.layout)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of RGB images ``(B, 3, H, W)`` in [0, 1]."""
        return self.net(self.condition(images))


def _check_pixels(config: Mapping[str, Any], model: str) -> None:
    """Raise :class:`AssetError` unless mean and standard deviation are three numbers each."""
    for key in ("mean", "std"):
        values = config.get(key)
        if not isinstance(values, Sequence) or len(values) != 3 or (key == "std" and 0 in values):
            raise AssetError(
                f"teachers.timm: {key} of {model} is {values!r}; a teacher of RGB images needs three numbers in its "
                "config.json"
            )


def check_name(model: str) -> None:
    """Raise :class:`ConfigError` with the nearest names if timm has no such model."""
    timm = require("timm", "timm")
    if ":" in model or "/" in model:
        raise ConfigError(
            f"model {model!r}: use a name of timm, an existing folder, or hf_hub:OWNER/NAME; a file of weights goes "
            "into `weights:`"
        )
    if not timm.is_model(model):
        name = model.split(".")[0]
        close = difflib.get_close_matches(name, timm.list_models(), n=6, cutoff=0.3)  # of more than a thousand
        raise ConfigError(f"timm has no model {model!r}{nearest(name, close)}")


def _stored(model: str) -> ModelFiles | None:
    """The files of a model that has its own configuration; None for timm's own names."""
    scheme = model.partition(":")[0].replace("_", "-").lower()
    if scheme not in ("hf-hub", "local-dir") and not Path(model).expanduser().is_dir():
        return None
    return ModelFiles(model, "teachers.timm")


def _open(source: ModelFiles, model: str, size: int | None, *, weights: bool) -> tuple[Any, dict[str, Any]]:
    """Build a model from a folder or a repository by its own configuration."""
    source.need("config.json")
    content = source.json("config.json")
    if "architecture" not in content:
        raise ConfigError(
            f"teachers.timm: config.json of {source.label} has no timm `architecture`; for a model of transformers "
            "use `kind: transformers`"
        )
    if weights:
        source.weights()
        stated = content.get("pretrained_cfg") or content
        if not {"mean", "std"} <= stated.keys():  # timm would take those of ImageNet
            raise AssetError(
                f"teachers.timm: config.json of {source.label} has no mean and std: add those of its training to "
                "`pretrained_cfg`"
            )
    try:
        return _create(f"local-dir:{source.folder}", weights, size)
    except ConfigError:
        raise
    except Exception as error:  # weights of other sizes, a truncated file, an unknown architecture
        raise AssetError(f"teachers.timm: {model} cannot be loaded: {error}") from error


def _licence(source: ModelFiles, config: dict[str, Any]) -> str:
    where = source.folder.name if source.local else f"see the card of {source.name}"
    return str(config.get("license") or f"unknown ({where})")


def _patch(net: Any) -> int | None:
    strides = {int(stage["reduction"]) for stage in getattr(net, "feature_info", None) or ()}
    embeds = hasattr(net, "patch_embed") or hasattr(net, "embeds")  # NaFlexViT has the latter
    return strides.pop() if len(strides) == 1 and embeds else None


def _create(model: str, pretrained: bool, size: int | None) -> tuple[Any, dict[str, Any]]:
    """The timm model, with resizable position embeddings if it has them, and the options it accepted."""
    timm = require("timm", "timm")
    attempts: list[dict[str, Any]] = [{"dynamic_img_size": True}, {}]
    if size is not None:
        attempts.insert(1, {"img_size": size})
    with torch.random.fork_rng(devices=[]):
        for options in attempts:
            torch.manual_seed(0)  # the same random weights in every process; the caller's state is unchanged
            try:
                net = timm.create_model(model, pretrained=pretrained, **options)
            except TypeError as error:  # this architecture does not take the option
                if not any(key in str(error) for key in options):
                    raise
            except RuntimeError as error:
                why = " ".join(str(error).split())
                raise ConfigError(f"timm cannot build {model!r}: {why[:_LONG]}{' ...' * (len(why) > _LONG)}") from error
            except Exception as error:
                if pretrained and not model.startswith("local-dir:"):
                    raise _download_error(timm, model, error) from error
                raise
            else:  # some architectures accept the first option and ignore it
                if "dynamic_img_size" not in options or getattr(net, "dynamic_img_size", False):
                    return net, options
    raise ConfigError(f"timm cannot build {model!r}")


def _download_error(timm: Any, model: str, error: Exception) -> AssetError | ConfigError:
    """The error for weights that timm could not download."""
    known = timm.get_pretrained_cfg(model)
    if known is not None and known.hf_hub_id:
        return ModelFiles(f"hf-hub:{known.hf_hub_id}", "teachers.timm").refusal("model.safetensors", error)
    url = f" from {known.url}" if known is not None and known.url else ""
    return AssetError(
        f"teachers.timm: the weights of {model} cannot be downloaded{url} ({error}). On a machine with a network, save "
        "them as safetensors, then use `weights: FILE`"
    )


def _layout(net: nn.Module) -> torch.memory_format:
    """Use channels-last for convolutional networks: 1.3 to 1.7 times faster on a CPU."""
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) <= sum(isinstance(module, nn.Linear) for module in net.modules()):
        return torch.contiguous_format
    for convolution in convolutions:  # only these: other 4-D parameters may depend on their memory order
        convolution.to(memory_format=torch.channels_last)
    return torch.channels_last


def _load(net: nn.Module, model: str, weights: str | None, config: dict[str, Any]) -> str:
    """Load ``weights`` into ``net``; return their licence."""
    if weights in (None, "random"):
        return "none (random weights)"
    if weights == "hub":
        return str(config.get("license") or "unknown")
    if weights == "bundled":
        size = _LITE.get(model.split(".")[0])
        if size is None:
            raise ConfigError(
                f"no bundled weights for {model!r}; bundled: {', '.join(_LITE)}. "
                "Use `weights: hub`, `weights: random` or the path of a safetensors file"
            )
        net.load_state_dict(bundled.lite_state_dict(size))
        return bundled.BUNDLED[f"efficientnet-lite{size}"].licence
    file = Path(str(weights)).expanduser()
    if file.suffix != ".safetensors" or not file.is_file():
        raise ConfigError(
            f"weights {weights!r}: not a safetensors file{nearest(str(weights), ('bundled', 'random', 'hub'))}"
        )
    try:
        net.load_state_dict(require("safetensors.torch", "timm").load_file(file))
    except (RuntimeError, ValueError, OSError) as error:
        raise AssetError(f"{file}: does not fit {model}: {error}") from error
    except Exception as error:  # safetensors' own error class derives from Exception only
        raise AssetError(f"{file}: cannot be read as safetensors: {error}") from error
    return f"unknown ({file.name})"
