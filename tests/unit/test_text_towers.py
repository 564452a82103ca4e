"""The text towers behind RADIO's heads: exact against their own libraries on tiny checkpoints of the same format."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agglo.config import build
from agglo.types import AssetError, ConfigError, MissingExtraError
from support.checkpoints import tiny_siglip2, tiny_tokenizer

transformers = pytest.importorskip("transformers", reason="the teachers extra is not installed")

from agglo.text.open_clip import OpenCLIP  # noqa: E402
from agglo.text.siglip2 import NAMES, SigLIP2  # noqa: E402

pytestmark = pytest.mark.libraries

SENTENCES = ["A_photo of a CAT!", "", "snow, on a mountain", "zürich 猫 naïve", "the quick brown fox " * 20, "cat"]


# --- siglip2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["siglip", "siglip2"])
def siglip2(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_siglip2(folder, request.param)
    return folder, model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A_photo of a CAT!", "a photo of a cat"),
        ("  tabs\tand\nlines  ", "tabs and lines"),
        ("it's (so-called) 50% O.K.", "its socalled 50 ok"),
        ("snow__on_a__mountain", "snow on a mountain"),
        (string.punctuation, ""),
        ("ÉCOLE — «été»…", "école — «été»…"),  # only ASCII punctuation is removed
        ("", ""),
    ],
)
def test_canonicalisation(text: str, expected: str) -> None:
    assert SigLIP2.canonicalise(text) == expected
    assert SigLIP2.canonicalise(expected) == expected


def test_equals_transformers(siglip2) -> None:
    """Tokens as transformers' own tokenizer gives them, and the pooled output of get_text_features."""
    folder, model = siglip2
    tower = build("text", {"kind": "siglip2", "repo": str(folder), "batch": 4})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [SigLIP2.canonicalise(text) for text in SENTENCES]
    inputs = theirs(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    assert list(inputs) == ["input_ids"]
    assert torch.equal(tower.tokens(SENTENCES), inputs["input_ids"])
    with torch.no_grad():
        features = model.get_text_features(**inputs)
    features = getattr(features, "pooler_output", features)
    assert tower.width == 40
    torch.testing.assert_close(tower.encode(SENTENCES), torch.nn.functional.normalize(features), rtol=0, atol=1e-6)
    assert tower.licence == f"unknown ({folder})"


def test_tokens_end_with_eos_and_are_padded_on_the_right(tmp_path: Path) -> None:
    """Without tokenizer_config.json, Gemma's defaults (<bos> first, padding on the left) are not used."""
    tiny_siglip2(tmp_path, "siglip2")
    expected = SigLIP2(repo=str(tmp_path)).tokens(SENTENCES)
    pad, eos, bos = 0, 1, 2
    assert expected[1].tolist() == [eos] + [pad] * 63  # an empty sentence
    assert expected[4, -1] == eos and (expected[4] != pad).all()  # one that was cut keeps its end
    assert not (expected == bos).any()
    tiny_tokenizer(tmp_path, ending="<bos> $A")
    assert torch.equal(SigLIP2(repo=str(tmp_path)).tokens(SENTENCES), expected)
    (tmp_path / "tokenizer_config.json").unlink()
    assert torch.equal(SigLIP2(repo=str(tmp_path)).tokens(SENTENCES), expected)
    tiny_tokenizer(tmp_path, add_bos_token=True, bos_token={"content": "<bos>", "lstrip": False})
    assert (SigLIP2(repo=str(tmp_path)).tokens(SENTENCES)[:, 0] == bos).all()


def test_only_text_shards_are_read(tmp_path: Path) -> None:
    tiny_siglip2(tmp_path, "siglip")
    whole = SigLIP2(repo=str(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = {key: "vision_model" if not key.startswith("text_model.") else f"text-{len(key) % 2}" for key in state}
    for file in {*names.values()} - {"vision_model"}:  # without the shard of the vision weights
        save_file({key: value for key, value in state.items() if names[key] == file}, tmp_path / f"{file}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: f"{file}.safetensors" for key, file in names.items()}}))
    sharded = SigLIP2(repo=str(tmp_path))
    assert torch.equal(sharded.encode(SENTENCES), whole.encode(SENTENCES))
    read = sum(parameter.numel() for parameter in sharded.parameters())
    assert read == sum(value.numel() for key, value in state.items() if key.startswith("text_model."))
    assert not any(tensor.is_meta for tensor in [*sharded.parameters(), *sharded.buffers()])
    (tmp_path / "text-0.safetensors").unlink()
    with pytest.raises(AssetError, match=r"text-0\.safetensors"):
        SigLIP2(repo=str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"text_model.x": "../x.safetensors"}}))
    with pytest.raises(AssetError, match="weight_map"):
        SigLIP2(repo=str(tmp_path))


def test_file_with_only_the_text_model_in_half_precision(siglip2, tmp_path: Path) -> None:
    folder, _ = siglip2
    state = {
        k.removeprefix("text_model."): v for k, v in load_file(folder / "model.safetensors").items() if "text" in k
    }
    save_file({key: value.bfloat16() for key, value in state.items()}, tmp_path / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    alone = SigLIP2(repo=str(tmp_path)).encode(SENTENCES)
    assert alone.dtype == torch.float32
    assert (alone * SigLIP2(repo=str(folder)).encode(SENTENCES)).sum(1).min() > 0.999


def test_siglip2_is_frozen_and_batches_do_not_matter(siglip2) -> None:
    folder, _ = siglip2
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tower = SigLIP2(repo=str(folder), batch=1)
    assert torch.equal(torch.rand(3), expected)
    whole = SigLIP2(repo=str(folder)).encode(SENTENCES)
    torch.testing.assert_close(tower.encode(SENTENCES), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(SENTENCES)))
    assert tower.encode([]).shape == (0, 40)
    assert not any(p.requires_grad for p in tower.parameters())
    torch.nn.Sequential(tower).train()
    assert not any(module.training for module in tower.modules())
    assert tower.to(torch.bfloat16).encode(SENTENCES).dtype == torch.float32


def test_siglip2_offline_error_names_the_files(monkeypatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, repo in NAMES.items():
        with pytest.raises(AssetError) as caught:
            SigLIP2(repo=name)
        assert all(word in str(caught.value) for word in (repo, "config.json", "tokenizer.json", "model.safetensors"))
        assert "repo: FOLDER" in str(caught.value)
        home = f"models--{repo.replace('/', '--')}"
        assert f"copy {home} from its cache to {tmp_path}" in str(caught.value)
        assert f"`hf download {repo} --include '*.json' 'model*.safetensors'`" in str(caught.value)


def test_siglip2_loads_from_the_cache_offline(monkeypatch, tmp_path: Path) -> None:
    """A cache copied from another machine serves RADIO's name for the model."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    home, commit = tmp_path / "models--google--siglip2-giant-opt-patch16-384", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots" / commit).mkdir(parents=True)
    tiny_siglip2(home / "snapshots" / commit, "siglip")
    assert SigLIP2(repo="siglip2-g-384").encode(["a cat"]).shape == (1, 40)


def test_siglip2_refuses_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'siglip2-g-384'"):
        SigLIP2(repo="siglip2-g")
    with pytest.raises(ConfigError, match="batch"):
        SigLIP2(repo=str(tmp_path), batch=0)
    with pytest.raises(AssetError, match=r"no config\.json"):
        SigLIP2(repo=str(tmp_path))
    tiny_siglip2(tmp_path, "siglip")
    with pytest.raises(ConfigError, match="is a file"):
        SigLIP2(repo=str(tmp_path / "config.json"))
    with pytest.raises(TypeError, match=r"encode\(\[text\]\)"):
        SigLIP2(repo=str(tmp_path)).encode("one string")  # type: ignore[arg-type]
    config = json.loads((tmp_path / "config.json").read_text())

    def refuses(error: type[Exception], match: str, **changed) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(error, match=match):
            SigLIP2(repo=str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps(config))

    refuses(ConfigError, "holds a 'clip' model", model_type="clip")
    refuses(AssetError, "sizes", text_config=config["text_config"] | {"hidden_size": 48})
    refuses(AssetError, r"missing \['encoder\.layers\.2", text_config=config["text_config"] | {"num_hidden_layers": 3})
    refuses(ConfigError, "cannot be built", text_config=config["text_config"] | {"num_attention_heads": 5})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(AssetError, match="download it again"):
        SigLIP2(repo=str(tmp_path))
    weights.unlink()
    with pytest.raises(AssetError, match=r"model\.safetensors"):
        SigLIP2(repo=str(tmp_path))


def test_siglip2_refuses_another_tokenizer(siglip2, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((siglip2[0] / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(AssetError, match=r"no token '\[PAD\]'"):
        SigLIP2(repo=str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(AssetError, match="not JSON"):
        SigLIP2(repo=str(tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    tower = SigLIP2(repo=str(tmp_path))
    tower.tokenizer.add_tokens([f"new{number}" for number in range(200)])
    with pytest.raises(AssetError, match="vocabulary of 400"):
        tower.encode(["new199"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(AssetError, match="cannot be read as a tokenizer"):
        SigLIP2(repo=str(tmp_path))


# --- open_clip --------------------------------------------------------------------------------------------------------

CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
SIGLIP = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": CLIP["vision_cfg"],
    "text_cfg": CLIP["text_cfg"]
    | {
        "mlp_ratio": 3.7362,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}
COCA = CLIP | {
    "text_cfg": CLIP["text_cfg"] | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
    "vision_cfg": CLIP["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
    "custom_text": True,
}


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", reason="the teachers extra is not installed")


@pytest.fixture(scope="module", params=["clip", "sigmoid", "coca"])
def clip(request, open_clip, tmp_path_factory):
    """Name, weights file and OpenCLIP's own model of a tiny registered architecture."""
    folder = tmp_path_factory.mktemp("open_clip")
    name = f"agglo-tiny-{request.param}"
    config = {"clip": CLIP, "sigmoid": SIGLIP, "coca": COCA}[request.param]
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(4)
    model = open_clip.create_model(name).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors")
    return name, folder / "weights.safetensors", model


def test_equals_open_clip(open_clip, clip) -> None:
    name, weights, model = clip
    tower = build("text", {"kind": "open_clip", "model": name, "pretrained": str(weights), "batch": 4})
    with torch.no_grad():
        theirs = model.encode_text(open_clip.get_tokenizer(name)(SENTENCES), normalize=True)
    assert tower.width == theirs.shape[1]
    torch.testing.assert_close(tower.encode(SENTENCES), theirs, rtol=0, atol=1e-6)
    text = model.text if hasattr(model, "text") else model
    wanted = {k: v for k, v in text.state_dict().items() if not k.startswith(("visual.", "logit_"))}
    assert sum(p.numel() for p in tower.parameters()) == sum(v.numel() for v in wanted.values())
    assert tower.licence == "unknown (weights.safetensors)"


def test_open_clip_is_frozen_and_batches_do_not_matter(clip) -> None:
    name, weights, _ = clip
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tower = OpenCLIP(model=name, pretrained=str(weights), batch=1)
    assert torch.equal(torch.rand(3), expected)
    whole = OpenCLIP(model=name, pretrained=str(weights)).encode(SENTENCES)
    torch.testing.assert_close(tower.encode(SENTENCES), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(SENTENCES)))
    assert whole.dtype == torch.float32 and tower.encode([]).shape == (0, tower.width)
    torch.nn.Sequential(tower).train()
    assert not any(module.training for module in tower.modules())
    assert not any(tensor.is_meta for tensor in [*tower.parameters(), *tower.buffers()])


def test_open_clip_reads_every_local_form(clip, tmp_path: Path) -> None:
    """A training checkpoint, a half-precision file and a folder of OpenCLIP give the same embeddings."""
    name, weights, model = clip
    expected = OpenCLIP(model=name, pretrained=str(weights)).encode(SENTENCES)
    state = model.state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "epoch.pt")
    assert torch.equal(OpenCLIP(model=name, pretrained=str(tmp_path / "epoch.pt")).encode(SENTENCES), expected)
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    half = OpenCLIP(model=name, pretrained=str(tmp_path / "old.pt")).encode(SENTENCES)
    assert (half * expected).sum(1).min() > 0.999
    folder = tmp_path / "folder"
    folder.mkdir()
    config = {"agglo-tiny-clip": CLIP, "agglo-tiny-sigmoid": SIGLIP, "agglo-tiny-coca": COCA}[name]
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(AssetError, match=r"put open_clip_model\.safetensors into it"):
        OpenCLIP(model=str(folder))
    (folder / "another.safetensors").write_bytes(b"not this one")
    (folder / "open_clip_model.safetensors").write_bytes(weights.read_bytes())
    assert torch.equal(OpenCLIP(model=str(folder)).encode(SENTENCES), expected)


def test_open_clip_uses_the_tokenizer_of_the_folder(open_clip, tmp_path: Path) -> None:
    """SigLIP's architectures name a tokenizer of the hub; a folder has its own."""
    config = SIGLIP | {"text_cfg": SIGLIP["text_cfg"] | {"hf_tokenizer_name": "someone/a-tokenizer", "vocab_size": 400}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    tiny_tokenizer(tmp_path)
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    tower = OpenCLIP(model=str(tmp_path))
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["snow on a cat"])
    assert tokens.shape == (1, 20)
    with torch.no_grad():
        torch.testing.assert_close(tower.encode(["snow on a cat"]), model.encode_text(tokens, normalize=True))


def test_open_clip_offline_error_names_the_files(open_clip, monkeypatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        AssetError, match=r"open_clip_model\.safetensors .*apple/DFN5B-CLIP-ViT-H-14-378, .*`pretrained"
    ):
        OpenCLIP()
    with pytest.raises(AssetError, match="timm/ViT-SO400M-14-SigLIP-384"):
        OpenCLIP(model="ViT-SO400M-14-SigLIP-384", pretrained="webli")
    with pytest.raises(AssetError, match=r"open_clip_config\.json"):
        OpenCLIP(model="hf-hub:someone/something")
    (tmp_path / "offline.json").write_text(
        json.dumps(SIGLIP | {"text_cfg": SIGLIP["text_cfg"] | {"hf_tokenizer_name": "someone/a-tokenizer"}})
    )
    open_clip.add_model_config(tmp_path / "offline.json")
    save_file(
        {k: v.contiguous() for k, v in open_clip.create_model("offline").state_dict().items()},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(AssetError, match=r"(?s)tokenizer of offline .*tokenizer\.json.*`model: FOLDER`"):
        OpenCLIP(model="offline", pretrained=str(tmp_path / "w.safetensors"))


def test_open_clip_refuses_bad_input(clip, tmp_path: Path) -> None:
    name, weights, model = clip
    with pytest.raises(ConfigError, match="did you mean 'ViT-H-14-378-quickgelu'"):
        OpenCLIP(model="ViT-H-14-378-quickgel")
    with pytest.raises(ConfigError, match="did you mean 'dfn5b'"):
        OpenCLIP(pretrained="dfn5")
    with pytest.raises(ConfigError, match="use `model: ViT-H-14-378-quickgelu`"):
        OpenCLIP(model="ViT-H-14-378")
    with pytest.raises(ConfigError, match="roberta-base"):
        OpenCLIP(model="roberta-ViT-B-32", pretrained="laion2b_s12b_b32k")
    with pytest.raises(ConfigError, match="batch"):
        OpenCLIP(batch=0)
    with pytest.raises(TypeError, match=r"encode\(\[text\]\)"):
        OpenCLIP(model=name, pretrained=str(weights)).encode("one string")  # type: ignore[arg-type]
    other = tmp_path / "x.safetensors"
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    last = next(key for key in state if key.endswith("transformer.resblocks.1.ln_1.weight") and "visual" not in key)
    save_file({key: value for key, value in state.items() if key != last}, other)
    with pytest.raises(AssetError, match=r"missing \['transformer\.resblocks\.1\.ln_1\.weight'\]"):
        OpenCLIP(model=name, pretrained=str(other))
    save_file(state | {last: torch.zeros(3)}, other)
    with pytest.raises(AssetError, match="of another size"):
        OpenCLIP(model=name, pretrained=str(other))
    save_file(state | {last.replace("1.ln_1", "2.ln_1"): torch.zeros(32)}, other)
    with pytest.raises(AssetError, match="left over"):
        OpenCLIP(model=name, pretrained=str(other))
    other.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(AssetError, match="download it again"):
        OpenCLIP(model=name, pretrained=str(other))


class Foreign:
    """An object of a class that no checkpoint should hold."""


def test_open_clip_does_not_run_a_pickle(clip, tmp_path: Path) -> None:
    file = tmp_path / "evil.pt"
    torch.save({"state_dict": {}, "args": Foreign()}, file)
    with pytest.raises(AssetError, match=r"safetensors\.torch\.save_file"):
        OpenCLIP(model=clip[0], pretrained=str(file))


@pytest.mark.parametrize(
    ("kind", "guest"), [("siglip2", "transformers"), ("siglip2", "tokenizers"), ("open_clip", "open_clip")]
)
def test_missing_library_names_its_extra(kind: str, guest: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, guest, None)
    with pytest.raises(MissingExtraError, match=r'pip install .*\[teachers\]"'):
        build("text", {"kind": kind})
