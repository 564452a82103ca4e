"""SigLIP2's text tower, for the ``siglip2-g`` heads of C-RADIO."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from agglo.extras import require
from agglo.hub import INDEX, WEIGHTS, ModelFiles, cache_folder, read_json, weight_map
from agglo.text.base import TextTower, check_texts
from agglo.types import AssetError, ConfigError

MAX_TOKENS = 64
"""Sequence length of SigLIP2's training: every sentence is truncated or padded to it."""

NAMES = {
    "siglip2-g-384": "google/siglip2-giant-opt-patch16-384",
    "siglip2-so400m": "google/siglip2-so400m-patch16-naflex",
}
"""Teacher name in RADIO's checkpoints → repository of its text tower."""

_PREFIX = "text_model."
_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


class SigLIP2(TextTower):
    """The text half of a SigLIP2 checkpoint (Tschannen et al. 2025, arXiv:2502.14786).

    A sentence is canonicalised (:meth:`canonicalise`), tokenised with ``<eos>`` at its end, padded on the right to 64
    tokens and encoded without a mask: padding takes part in attention, as in training. The embedding is the pooled
    output (the last position, projected), divided by its norm. Only the text weights are read.

    Args:
        repo: a Hugging Face repository, one of RADIO's names for it (:data:`NAMES`), or a local folder with
            ``config.json``, ``tokenizer.json`` and ``model.safetensors`` (or its index and shards);
            ``tokenizer_config.json`` is optional.
        batch: sentences per batch.

    Attributes:
        length: tokens in a sentence, 64 for every released SigLIP2.

    Raises:
        ConfigError: ``batch`` is not positive; no such repository; a checkpoint of another architecture.
        AssetError: a file is missing or does not fit.
        MissingExtraError: transformers or tokenizers is not installed.
    """

    def __init__(self, *, repo: str = "google/siglip2-giant-opt-patch16-384", batch: int = 64) -> None:
        super().__init__()
        if batch < 1:
            raise ConfigError(f"text.siglip2: batch must be at least 1, got {batch}")
        require("tokenizers", "teachers")
        require("transformers", "teachers")  # before gigabytes are downloaded
        source = _Files(NAMES.get(repo, repo), "text.siglip2", known={*NAMES, *NAMES.values()})
        self.batch = batch
        self.licence = "Apache-2.0" if source.label.startswith("google/siglip2-") else f"unknown ({repo})"
        self.tower: Any = _tower(source)
        self.width = int(self.tower.head.weight.shape[0])
        self.length = min(MAX_TOKENS, self.tower.embeddings.position_embedding.num_embeddings)
        self.tokenizer = _tokenizer(source, self.length)
        self.requires_grad_(False).eval()

    @staticmethod
    def canonicalise(text: str) -> str:
        """Underscores to spaces, no ASCII punctuation, lower case, single spaces: ``"A_cat,  x!"`` → ``"a cat x"``."""
        return " ".join(text.translate(_PUNCTUATION).lower().split())

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids ``(N, length)`` of N sentences, canonicalised, truncated and padded.

        Raises:
            AssetError: a token exceeds the model's vocabulary.
        """
        encodings = self.tokenizer.encode_batch([self.canonicalise(text) for text in texts])
        ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.long).view(-1, self.length)
        known = self.tower.embeddings.token_embedding.num_embeddings
        if ids.numel() and int(ids.max()) >= known:
            raise AssetError(
                f"token {int(ids.max())} exceeds the model's vocabulary of {known}: tokenizer and weights belong to "
                "different checkpoints"
            )
        return ids

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """As :meth:`TextTower.encode`; sentences are truncated to 64 tokens."""
        check_texts(texts)
        device = next(self.tower.parameters()).device
        result = torch.empty(len(texts), self.width, device=device)
        for start in range(0, len(texts), self.batch):
            ids = self.tokens(texts[start : start + self.batch]).to(device)
            pooled = self.tower(input_ids=ids).pooler_output.float()
            result[start : start + self.batch] = nn.functional.normalize(pooled, dim=-1)
        return result


# --- files ------------------------------------------------------------------------------------------------------------


class _Files(ModelFiles):
    def advice(self, files: Sequence[str]) -> str:
        needed = "config.json, tokenizer.json and model.safetensors (or its index and shards)"
        if self.local:
            return f"Put {needed} into {self.folder}"
        entry = f"models--{self.name.replace('/', '--')}"
        return (
            f"On a machine with a network, download {needed}: `hf download {self.name} --include '*.json' "
            f"'model*.safetensors'`; copy {entry} from its cache to {cache_folder()} here, or use a folder of these "
            "files: `repo: FOLDER`"
        )


# --- weights ----------------------------------------------------------------------------------------------------------


def _tower(source: _Files) -> nn.Module:
    """The text model with its weights, float32; built on the meta device, so that memory is used once."""
    source.need("config.json")
    content = source.json("config.json")
    kind = str(content.get("model_type", "")).removesuffix("_text_model")
    if kind not in ("siglip", "siglip2"):
        raise ConfigError(f"text.siglip2: {source.label} holds a {kind or 'nameless'!r} model, not siglip or siglip2")
    transformers = require("transformers", "teachers")
    name = {"siglip": "SiglipText", "siglip2": "Siglip2Text"}[kind]
    try:
        config = getattr(transformers, f"{name}Config").from_dict(dict(content.get("text_config") or content))
        with torch.device("meta"):
            model = getattr(transformers, f"{name}Model")(config)
    except Exception as error:  # each version of transformers raises its own errors
        raise ConfigError(f"text.siglip2: the configuration of {source.label} cannot be built: {error}") from error
    tower = getattr(model, "text_model", model)  # transformers < 5 wraps the tower once more
    _assign(tower, _weights(source), source.label)
    positions = tower.embeddings.position_embedding.num_embeddings
    tower.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    return tower


def _assign(tower: nn.Module, state: dict[str, Tensor], repo: str) -> None:
    try:
        missing, unexpected = tower.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise AssetError(f"{repo}: the weights do not have the sizes of config.json: {error}") from error
    if missing or unexpected:
        raise AssetError(
            f"{repo}: the weights do not fit config.json (missing {missing[:10]}, left over {unexpected[:10]})"
        )


def _weights(source: _Files) -> dict[str, Tensor]:
    """The text tensors by their names in the text model, float32; shards without any are not downloaded."""
    single = source.find(WEIGHTS)
    if single is not None:
        return _read(single)
    index = source.find(INDEX)
    if index is None:
        raise source.missing(WEIGHTS)
    shards = weight_map(read_json(index), index)
    state: dict[str, Tensor] = {}
    for shard in sorted({shard for key, shard in shards.items() if key.startswith(_PREFIX)} or {*shards.values()}):
        state |= _read(source.need(shard))
    return state


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
            chosen = [key for key in keys if key.startswith(_PREFIX)] or keys  # a file may hold only the text model
            state = {key.removeprefix(_PREFIX): tensors.get_tensor(key).float() for key in chosen}
    except (SafetensorError, OSError) as error:
        raise AssetError(f"{file}: cannot be read as safetensors ({error}); download it again") from error
    state.pop("embeddings.position_ids", None)  # a constant that old versions of transformers wrote
    return state


# --- tokens -----------------------------------------------------------------------------------------------------------


def _tokenizer(source: _Files, length: int) -> Any:
    """The tokenizer of ``tokenizer.json``, truncating and padding on the right to ``length`` tokens.

    The flags of tokenizer_config.json decide about ``<bos>`` and ``<eos>``. transformers' own classes are not used:
    since version 5 they ignore those flags, and their defaults are Gemma's (padding on the left, an attention mask).
    The model's ``pad_token_id`` is not used either: without an entry in config.json it is ``<eos>``.
    """
    tokenizers = require("tokenizers", "teachers")
    file = source.need("tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise AssetError(f"{file}: cannot be read as a tokenizer ({error}); download it again") from error
    options = source.json("tokenizer_config.json")

    def special(role: str) -> tuple[str, int]:
        token = options.get(f"{role}_token") or f"<{role}>"
        token = str(token["content"] if isinstance(token, dict) else token)
        number = tokenizer.token_to_id(token)
        if number is None:
            raise AssetError(f"{file}: no token {token!r}: not a tokenizer of SigLIP2")
        return token, number

    before = [special("bos")] if options.get("add_bos_token", False) else []
    after = [special("eos")] if options.get("add_eos_token", True) else []
    template = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=before + after)
    pad, number = special("pad")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(direction="right", length=length, pad_id=number, pad_token=pad)
    return tokenizer
