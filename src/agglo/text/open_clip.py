"""OpenCLIP's text towers: the language of the ``clip`` and ``siglip`` heads of RADIO."""

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
from agglo.text.base import TextTower
from agglo.types import AssetError, ConfigError

_NO_VISION = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 1, "image_size": 1}
"""A vision tower of next to nothing, for a constructor that wants one; it is thrown away at once."""

_NOT_TEXT = ("visual.", "logit_scale", "logit_bias", "text_decoder.", "attn_mask", "text.attn_mask")
"""Keys of a checkpoint that are no weights of its text tower (the masks are constants of old versions)."""


class OpenCLIP(TextTower):
    """The text half of an OpenCLIP model, with the model's own tokenizer.

    RADIO's known teachers are ``ViT-H-14-378-quickgelu`` / ``dfn5b`` (DFN-CLIP, behind the ``clip`` head) and
    ``ViT-SO400M-14-SigLIP-384`` / ``webli`` (behind ``siglip``). Neither the vision tower nor the logit scale is kept,
    nor are their weights read from a safetensors file.

    Args:
        model: OpenCLIP's name of the architecture; or a local folder with ``open_clip_config.json``, the weights and,
            where the model needs one, the tokenizer; or ``hf-hub:OWNER/NAME``.
        pretrained: a tag OpenCLIP knows for this architecture, or the path of a checkpoint (safetensors, or a pickle
            that holds nothing but tensors). A folder or a repository brings its own weights, and this is not used.
        batch: sentences encoded at a time.

    Raises:
        ConfigError: unknown architecture or tag; ``batch`` is not positive; an architecture whose text tower is not
            OpenCLIP's own; a tag trained with the other GELU.
        AssetError: the weights or the tokenizer cannot be fetched or do not fit; names the files and where they go.
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

    def train(self, mode: bool = True) -> OpenCLIP:
        """Stay in eval mode: a frozen tower has no dropout."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Embed sentences.

        Args:
            texts: N sentences; each is cut after the context length of the model (77 tokens for CLIP, 64 for SigLIP).

        Returns:
            ``(N, width)`` float32 unit-norm embeddings on the tower's device.

        Raises:
            TypeError: ``texts`` is one string.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of sentences, not one string: encode([text])")
        device = next(self.tower.parameters()).device
        result = torch.empty(len(texts), self.width, device=device)
        for start in range(0, len(texts), self.batch):
            features = self.tower(self.tokenizer(texts[start : start + self.batch]).to(device))
            features = features[0] if isinstance(features, tuple) else features  # CoCa returns its tokens as well
            result[start : start + self.batch] = nn.functional.normalize(features.float(), dim=-1)
        return result


def _config(name: str) -> dict[str, Any]:
    """The architecture of a model, as OpenCLIP describes it."""
    open_clip = require("open_clip", "teachers")
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # a folder without its JSON, a hub that cannot be reached
        raise AssetError(
            f"text.open_clip: no configuration of {name} ({error}). To go on, put open_clip_config.json, the weights "
            "(open_clip_model.safetensors) and the tokenizer's files into a folder and name it: `model: FOLDER`"
        ) from error
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=6, cutoff=0.3)
        raise ConfigError(f"text.open_clip: open_clip has no model {name!r}{nearest(name, close)}")
    if not isinstance(config, dict) or not {"embed_dim", "text_cfg"} <= config.keys():
        raise ConfigError(f"text.open_clip: the configuration of {name} describes no model with embed_dim and text_cfg")
    guest = config["text_cfg"].get("hf_model_name")
    if guest:
        raise ConfigError(
            f"text.open_clip: the text tower of {name} is {guest} of transformers, which is not built here; use an "
            "architecture whose text tower is open_clip's own"
        )
    return config


def _weights(name: str, pretrained: str, quick_gelu: bool) -> tuple[Path, str]:
    """The checkpoint's path, fetched where it has to be, and the licence of the weights."""
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
            f"text.open_clip: {pretrained!r} is neither a file nor a tag that open_clip knows for {name}"
            f"{nearest(pretrained, open_clip.list_pretrained_tags_by_model(name))}"
        )
    if bool(tag.get("quick_gelu", False)) != quick_gelu:
        other = name.removesuffix("-quickgelu") if quick_gelu else f"{name}-quickgelu"
        raise ConfigError(
            f"text.open_clip: {pretrained!r} was trained with the {'exact' if quick_gelu else 'quick'} GELU and {name} "
            f"has the other one, which gives wrong embeddings; use `model: {other}`"
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
    except Exception as error:  # each way to fetch fails in its own way
        where = str(tag.get("hf_hub") or tag.get("url"))
        what = f"open_clip_model.safetensors (or open_clip_pytorch_model.bin) of {where.rstrip('/')}"
        repo = "/".join(str(tag.get("hf_hub") or "").split("/")[:2])
        cache = f"run `hf download {repo}`, which fills the hub's cache, or " if repo else ""
        raise AssetError(
            f"text.open_clip: the weights of {name} cannot be fetched ({error}). Where there is a network, "
            f"{cache}fetch {what if where.endswith('/') else where}, and name the file in a recipe: `pretrained: PATH`"
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
        raise AssetError(f"{file}: cannot be read ({error}); fetch it again") from error
    except Exception as error:  # a pickle with foreign objects, TorchScript, another kind of file
        raise AssetError(
            f"{file}: holds more than tensors, and is not read ({error}). Save its state_dict() with "
            "safetensors.torch.save_file, once, in a place where you trust it"
        ) from error


def _text_keys(keys: list[str]) -> list[str]:
    return [key for key in keys if not key.removeprefix("module.").startswith(_NOT_TEXT)]


def _tower(config: dict[str, Any], name: str) -> nn.Module:
    """The text tower without storage: its weights are assigned afterwards, so that nothing is held twice."""
    open_clip = require("open_clip", "teachers")
    options = {key: value for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    try:
        with torch.device("meta"):
            tower = open_clip.CustomTextCLIP(**{**options, "vision_cfg": _NO_VISION}).text
    except Exception as error:
        raise ConfigError(f"text.open_clip: {name} cannot be built: {error}") from error
    if tower.attn_mask is not None:  # a constant, which no checkpoint holds: token t sees the tokens up to t
        side = tower.num_pos
        tower.register_buffer("attn_mask", torch.full((side, side), float("-inf")).triu_(1), persistent=False)
    return tower


def _assign(tower: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    if any(key.startswith("text.") for key in state):
        state = {key.removeprefix("text."): value for key, value in state.items()}
    try:
        missing, unexpected = tower.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise AssetError(f"{file}: a model of other sizes: {error}") from error
    if missing or unexpected:
        raise AssetError(
            f"{file}: not the text tower of this model (missing {missing[:10]}, left over {unexpected[:10]})"
        )


def _tokenizer(name: str) -> Any:
    try:
        return require("open_clip", "teachers").get_tokenizer(name)
    except Exception as error:  # each way to fetch fails in its own way
        raise AssetError(
            f"text.open_clip: the tokenizer of {name} cannot be loaded ({error}). Where there is a network, fetch "
            "open_clip_config.json, the weights and the tokenizer's files (tokenizer.json, tokenizer_config.json, "
            "special_tokens_map.json) of the model, and name their folder: `model: FOLDER`"
        ) from error
