"""OpenCLIP's text towers, for the ``clip`` and ``siglip`` heads of RADIO."""

from __future__ import annotations

import difflib
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from agglo.config import nearest
from agglo.extras import require
from agglo.text.base import TextTower, check_texts
from agglo.types import AssetError, ConfigError

_NO_VISION = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 1, "image_size": 1}
"""A minimal vision tower for a constructor that requires one; it is discarded at once."""

_NOT_TEXT = ("visual.", "logit_scale", "logit_bias", "text_decoder.", "attn_mask", "text.attn_mask")
"""Keys that are not weights of the text tower (old versions saved the masks, which are constants)."""


class OpenCLIP(TextTower):
    """The text half of an OpenCLIP model, with the model's own tokenizer.

    RADIO's teachers are ``ViT-H-14-378-quickgelu`` / ``dfn5b`` (DFN-CLIP, head ``clip``) and
    ``ViT-SO400M-14-SigLIP-384`` / ``webli`` (head ``siglip``). The vision tower and the logit scale are not loaded; of
    a safetensors file they are not even read.

    Args:
        model: OpenCLIP's name of the architecture; a local folder with ``open_clip_config.json``, the weights and, if
            the model needs them, the tokenizer's files; or ``hf-hub:OWNER/NAME``.
        pretrained: OpenCLIP's tag of the weights, or the path of a checkpoint (safetensors, or a pickle of tensors
            only). Not used for a folder or a repository, which has its own weights.
        batch: sentences per batch.

    Raises:
        ConfigError: unknown architecture or tag; ``batch`` is not positive; an architecture whose text tower is not
            OpenCLIP's own; a tag trained with the other GELU.
        AssetError: the weights or the tokenizer are missing or do not fit.
        MissingExtraError: open_clip is not installed.
    """

    def __init__(self, *, model: str = "ViT-H-14-378-quickgelu", pretrained: str = "dfn5b", batch: int = 64) -> None:
        super().__init__()
        if batch < 1:
            raise ConfigError(f"text.open_clip: batch must be at least 1, got {batch}")
        require("open_clip", "teachers")
        name = f"local-dir:{Path(model).expanduser()}" if Path(model).expanduser().is_dir() else model
        config = _config(name)
        weights, self.licence = _weights(name, pretrained, bool(config.get("quick_gelu", False)))
        self.batch = batch
        self.width = int(config["embed_dim"])
        self.tower: Any = _tower(config, name)
        _assign(self.tower, _read(weights), weights)
        self.tokenizer = _tokenizer(name)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """As :meth:`TextTower.encode`; sentences are truncated to the model's context (CLIP 77 tokens, SigLIP 64)."""
        check_texts(texts)
        device = next(self.tower.parameters()).device
        result = torch.empty(len(texts), self.width, device=device)
        for start in range(0, len(texts), self.batch):
            features = self.tower(self.tokenizer(texts[start : start + self.batch]).to(device))
            features = features[0] if isinstance(features, tuple) else features  # CoCa returns its tokens as well
            result[start : start + self.batch] = nn.functional.normalize(features.float(), dim=-1)
        return result


def _config(name: str) -> dict[str, Any]:
    """OpenCLIP's description of an architecture."""
    open_clip = require("open_clip", "teachers")
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # a folder without its JSON, a hub that cannot be reached
        raise AssetError(
            f"text.open_clip: no configuration of {name} ({error}). Put open_clip_config.json, the weights "
            "(open_clip_model.safetensors) and the tokenizer's files into a folder, then use `model: FOLDER`"
        ) from error
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=6, cutoff=0.3)
        raise ConfigError(f"text.open_clip: open_clip has no model {name!r}{nearest(name, close)}")
    if not isinstance(config, dict) or not {"embed_dim", "text_cfg"} <= config.keys():
        raise ConfigError(f"text.open_clip: the configuration of {name} lacks embed_dim or text_cfg")
    foreign = config["text_cfg"].get("hf_model_name")
    if foreign:
        raise ConfigError(
            f"text.open_clip: the text tower of {name} is {foreign} of transformers, which is not supported; use an "
            "architecture with a text tower of open_clip"
        )
    return config


def _weights(name: str, pretrained: str, quick_gelu: bool) -> tuple[Path, str]:
    """The checkpoint's path, downloaded if needed, and the licence of the weights."""
    open_clip = require("open_clip", "teachers")
    scheme, _, where = name.partition(":")
    if scheme == "local-dir":
        return _in_folder(Path(where)), f"unknown ({Path(where).name})"
    if scheme == "hf-hub":
        return _fetch({"hf_hub": f"{where}/"}, name), f"unknown (see the card of {where})"
    file = Path(pretrained).expanduser()
    if file.is_file():
        return file, f"unknown ({file.name})"
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        raise ConfigError(
            f"text.open_clip: {pretrained!r} is neither a file nor a tag of {name} in open_clip"
            f"{nearest(pretrained, open_clip.list_pretrained_tags_by_model(name))}"
        )
    if bool(tag.get("quick_gelu", False)) != quick_gelu:
        other = name.removesuffix("-quickgelu") if quick_gelu else f"{name}-quickgelu"
        raise ConfigError(
            f"text.open_clip: {pretrained!r} was trained with the {'exact' if quick_gelu else 'quick'} GELU, unlike "
            f"{name}, which gives wrong embeddings; use `model: {other}`"
        )
    card = str(tag.get("hf_hub") or tag.get("url")).rstrip("/")
    return _fetch(tag, name), "Apache-2.0" if card.startswith("timm/") and "SigLIP" in card else f"unknown ({card})"


def _in_folder(folder: Path) -> Path:
    found = [path for end in ("safetensors", "bin", "pt", "pth") for path in sorted(folder.glob(f"*.{end}"))]
    preferred = [path for path in found if path.stem in ("open_clip_model", "open_clip_pytorch_model")]
    if not found:
        raise AssetError(f"text.open_clip: {folder} holds no weights; put open_clip_model.safetensors into it")
    return (preferred or found)[0]


def _fetch(tag: dict[str, Any], name: str) -> Path:
    try:
        return Path(require("open_clip", "teachers").download_pretrained(tag))
    except Exception as error:  # each kind of address raises its own errors
        where = str(tag.get("hf_hub") or tag.get("url"))
        what = f"open_clip_model.safetensors (or open_clip_pytorch_model.bin) of {where.rstrip('/')}"
        repo = "/".join(str(tag.get("hf_hub") or "").split("/")[:2])
        cache = f"run `hf download {repo}`, or " if repo else ""
        raise AssetError(
            f"text.open_clip: the weights of {name} cannot be downloaded ({error}). On a machine with a network, "
            f"{cache}download {what if where.endswith('/') else where}, then use `pretrained: PATH`"
        ) from error


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that belong to its text tower, float32, by OpenCLIP's names."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {key: tensors.get_tensor(key).float() for key in _text_keys(list(tensors.keys()))}
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        state = state.get("state_dict", state)
        return {key.removeprefix("module."): state[key].float() for key in _text_keys(list(state))}
    except (SafetensorError, OSError) as error:
        raise AssetError(f"{file}: cannot be read ({error}); download it again") from error
    except Exception as error:  # a pickle with foreign objects, TorchScript, another kind of file
        raise AssetError(
            f"{file}: holds more than tensors, and is not read ({error}). Save its state_dict() with "
            "safetensors.torch.save_file where you trust it"
        ) from error


def _text_keys(keys: list[str]) -> list[str]:
    return [key for key in keys if not key.removeprefix("module.").startswith(_NOT_TEXT)]


def _tower(config: dict[str, Any], name: str) -> nn.Module:
    """The text tower on the meta device: weights are assigned later, so that memory is used once."""
    open_clip = require("open_clip", "teachers")
    options = {key: value for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    try:
        with torch.device("meta"):
            tower = open_clip.CustomTextCLIP(**{**options, "vision_cfg": _NO_VISION}).text
    except Exception as error:
        raise ConfigError(f"text.open_clip: {name} cannot be built: {error}") from error
    if tower.attn_mask is not None:  # a causal mask, which checkpoints lack
        side = tower.num_pos
        tower.register_buffer("attn_mask", torch.full((side, side), float("-inf")).triu_(1), persistent=False)
    return tower


def _assign(tower: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    if any(key.startswith("text.") for key in state):
        state = {key.removeprefix("text."): value for key, value in state.items()}
    try:
        missing, unexpected = tower.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise AssetError(f"{file}: the weights are of another size: {error}") from error
    if missing or unexpected:
        raise AssetError(
            f"{file}: the weights do not fit the text tower (missing {missing[:10]}, left over {unexpected[:10]})"
        )


def _tokenizer(name: str) -> Any:
    try:
        return require("open_clip", "teachers").get_tokenizer(name)
    except Exception as error:  # each kind of address raises its own errors
        raise AssetError(
            f"text.open_clip: the tokenizer of {name} cannot be loaded ({error}). On a machine with a network, "
            "download open_clip_config.json, the weights and the tokenizer's files (tokenizer.json, "
            "tokenizer_config.json, special_tokens_map.json) of the model, then use `model: FOLDER`"
        ) from error
