"""Heads of RADIO checkpoints: formulas against float64 NumPy, names and outputs against the golden files."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from agglo.checkpoints.heads import read_head
from agglo.config import build
from agglo.heads.attention import Attention
from agglo.heads.mlp import Mlp
from agglo.types import AssetError, ConfigError

Array = np.ndarray


# --- a second opinion, written from the formulas, position by position -----------------------------------------------


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter away from its initial value: a norm with gain 1 or a layer scale of 1e-5 would hide mistakes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            around = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
            parameter.normal_(around, 0.4)
    return module.eval()


def weights(module: nn.Module) -> dict[str, Array]:
    return {key: value.detach().double().numpy() for key, value in module.state_dict().items()}


def linear(w: Mapping[str, Array], name: str, x: Array) -> Array:
    return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)


def layer_norm(w: Mapping[str, Array], name: str, x: Array, eps: float) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Array) -> Array:
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def v1(w: Mapping[str, Array], x: Array, inner: int) -> Array:
    x = relu(layer_norm(w, "norm", linear(w, "fc1", x), 1e-5))
    for i in range(inner):
        x = relu(layer_norm(w, f"blocks.{i}.1", linear(w, f"blocks.{i}.0", x), 1e-5))
    return linear(w, "fc2", x)


def v2(w: Mapping[str, Array], x: Array, inner: int, at: str = "") -> Array:
    x = linear(w, f"{at}fc1", x)
    for i in range(inner):
        x = x + linear(w, f"{at}blocks.{i}.2", gelu(layer_norm(w, f"{at}blocks.{i}.0", x, 1e-5)))
    return linear(w, f"{at}fc2", gelu(layer_norm(w, f"{at}norm", x, 1e-5)))


def block(w: Mapping[str, Array], at: str, tokens: list[Array], heads: int) -> list[Array]:
    parts = [
        np.split(linear(w, f"{at}.attn.qkv", layer_norm(w, f"{at}.norm1", t, 1e-6)).reshape(3, heads, -1), 3)
        for t in tokens
    ]
    out = []
    for token, (query, _, _) in zip(tokens, parts, strict=True):
        seen = []
        for h in range(heads):
            scores = np.array([query[0, h] @ key[0, h] for _, key, _ in parts]) / math.sqrt(query.shape[-1])
            share = np.exp(scores - scores.max())
            seen.append(sum(p * value[0, h] for p, (_, _, value) in zip(share / share.sum(), parts, strict=True)))
        x = token + w[f"{at}.ls1.gamma"] * linear(w, f"{at}.attn.proj", np.concatenate(seen))
        y = linear(w, f"{at}.mlp.fc2", gelu(linear(w, f"{at}.mlp.fc1", layer_norm(w, f"{at}.norm2", x, 1e-6))))
        out.append(x + w[f"{at}.ls2.gamma"] * y)
    return out


def over_map(answer: Callable[[Array], Array], x: Tensor, u: int, target: int) -> Array:
    """``answer`` at each position of ``(B, C, H, W)``, its channels (u1, u2, c) as in docs/checkpoints.md, 6."""
    batch, _, height, width = x.shape
    out = np.full((batch, target, u * height, u * width), np.nan)
    for b, h, w in np.ndindex(batch, height, width):
        channels = answer(x[b, :, h, w].double().numpy())
        for u1, u2, c in np.ndindex(u, u, target):
            out[b, c, h * u + u1, w * u + u2] = channels[(u1 * u + u2) * target + c]
    return out


def close(actual: Tensor, expected: Array) -> None:
    error = np.abs(actual.detach().double().numpy() - expected).max() / expected.std()
    assert actual.shape == expected.shape and error < 1e-5, error


# --- the MLPs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [0, 1, 2])
@pytest.mark.parametrize(("version", "formula"), [("v1", v1), ("v2", v2)])
def test_mlp_equals_its_formula(version: str, formula: Callable[..., Array], inner: int) -> None:
    head = shaken(build("heads", {"kind": "mlp", "version": version, "hidden": 9, "inner": inner}, 6, 4))
    w, x = weights(head), torch.randn(3, 6)
    close(head(x), np.stack([formula(w, row, inner) for row in x.double().numpy()]))


@pytest.mark.parametrize("u", [1, 2, 3])
@pytest.mark.parametrize(("version", "formula"), [("v1", v1), ("v2", v2)])
def test_upsampled_maps_are_laid_out_by_cell(version: str, formula: Callable[..., Array], u: int) -> None:
    head = shaken(build("heads", {"kind": "mlp", "version": version, "hidden": 7, "inner": 1, "upsample": u}, 6, 5))
    w, x = weights(head), torch.randn(2, 6, 2, 3)
    assert w["fc2.weight"].shape == (u * u * 5, 7)
    close(head(x), over_map(lambda row: formula(w, row, 1), x, u, 5))


def test_upsampled_cells_are_row_major_with_channels_last() -> None:
    """Closed form: with all weights zero, each output equals its channel number in the last linear."""
    head = Mlp(4, 3, hidden=4, upsample=2)
    with torch.no_grad():
        head.fc2.weight.zero_()
        head.fc2.bias.copy_(torch.arange(12.0))
    expected = torch.tensor([[0.0, 3.0], [6.0, 9.0]]).repeat(2, 5)  # channel 0 of cells (0,0) (0,1) / (1,0) (1,1)
    torch.testing.assert_close(head(torch.randn(1, 4, 2, 5))[0], torch.stack([expected, expected + 1, expected + 2]))


@pytest.mark.parametrize("options", [{"version": "v1"}, {"upsample": 2}, {"version": "v1", "inner": 1, "upsample": 3}])
def test_fold_reaches_every_cell(options: dict[str, Any]) -> None:
    head = shaken(build("heads", {"kind": "mlp", "hidden": 8, **options}, 6, 4))
    x, matrix, mean = torch.randn(2, 6, 3, 2), torch.randn(4, 4), torch.randn(4)
    before = head(x)
    head.fold(matrix, mean)
    expected = torch.einsum("ij,bjhw->bihw", matrix, before) + mean[:, None, None]
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-4)


def test_trained_heads_keep_their_names() -> None:
    names = set(Mlp(6, 4, hidden=8, inner=1, pre_norm=True).state_dict())
    modules = ["pre", "fc1", "blocks.0.0", "blocks.0.2", "norm", "fc2"]
    assert names == {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


def test_impossible_mlps_are_refused() -> None:
    with pytest.raises(ConfigError, match="upsample: 1"):
        Mlp(6, 4, upsample=2)(torch.randn(3, 6))
    for options in ({"upsample": 0}, {"version": "v3"}, {"version": "v1", "pre_norm": True}):
        with pytest.raises(ConfigError):
            build("heads", {"kind": "mlp", **options}, 6, 4)


# --- the attention head -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("u", "inner", "blocks"), [(1, 0, 2), (2, 1, 1)])
def test_attention_equals_its_formula(u: int, inner: int, blocks: int) -> None:
    head = Attention(8, 3, blocks=blocks, heads=2, hidden=6, inner=inner, upsample=u)
    assert head.blocks[0].ls1.gamma.eq(1e-5).all() and head.blocks[0].attn.qkv.bias is None
    w, x = weights(shaken(head)), torch.randn(1, 8, 2, 3)
    tokens = [x[0, :, h, c].double().numpy() for h, c in np.ndindex(2, 3)]
    for i in range(blocks):
        tokens = block(w, f"blocks.{i}", tokens, heads=2)
    seen = torch.from_numpy(np.stack(tokens, axis=1)).reshape(1, 8, 2, 3)
    close(head(x), over_map(lambda row: v2(w, row, inner, "mlp."), seen, u, 3))


def test_attention_is_permutation_equivariant() -> None:
    head = shaken(Attention(8, 3, heads=2, hidden=6))
    x, order = torch.randn(1, 8, 2, 3), torch.randperm(6)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(head(shuffled).flatten(2), head(x).flatten(2)[:, :, order], rtol=1e-4, atol=1e-5)


def test_impossible_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="maps"):
        Attention(16, 3)(torch.randn(2, 16))
    with pytest.raises(ConfigError, match=r"nearest is `heads: 12`"):
        build("heads", {"kind": "attention"}, 24, 3)
    with pytest.raises(ConfigError, match="upsample"):
        build("heads", {"kind": "attention", "upsample": 0}, 32, 3)


# --- official names ---------------------------------------------------------------------------------------------------


class Shape:
    """A tensor that has not been read: its shape alone."""

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)


def official(prefix: str, **modules: tuple[int, ...]) -> dict[str, Any]:
    """Weights of these shapes and their biases; ``__`` for a dot."""
    names = {f"{prefix}{name.replace('__', '.')}": shape for name, shape in modules.items()}
    return {f"{n}.weight": Shape(*s) for n, s in names.items()} | {f"{n}.bias": Shape(s[0]) for n, s in names.items()}


V1 = official("_heads.1.", fc1=(8, 6), norm=(8,), inner__0=(8, 8), inner__1=(8,), inner__3=(8, 8), inner__4=(8,))
V1 |= official("_heads.1.", fc2=(4, 8)) | official("_heads.10.", fc1=(3, 2))
V2 = official("_heads.sam.", fc1=(8, 6), blocks__0__0=(8,), blocks__0__2=(8, 8), final__0=(8,), final__2=(16, 8))


def test_v1_is_recognised_from_names_and_shapes() -> None:
    options, source, target, keys = read_head(V1, "_heads.1.", "v1")
    assert options == {"kind": "mlp", "version": "v1", "hidden": 8, "inner": 2, "upsample": 1}
    assert (source, target) == (6, 4)
    assert set(keys) == set(build("heads", options, source, target).state_dict())
    assert set(keys.values()) == {key for key in V1 if key.startswith("_heads.1.")}
    assert keys["blocks.1.0.weight"] == "_heads.1.inner.3.weight"
    assert keys["blocks.1.1.bias"] == "_heads.1.inner.4.bias"


def test_v2_is_recognised_from_names_and_shapes() -> None:
    options, source, target, keys = read_head(V2, "_heads.sam.", "v2", upsample=2)
    assert options == {"kind": "mlp", "version": "v2", "hidden": 8, "inner": 1, "upsample": 2}
    assert (source, target) == (6, 4)
    assert (keys["norm.bias"], keys["fc2.weight"]) == ("_heads.sam.final.0.bias", "_heads.sam.final.2.weight")


@pytest.mark.parametrize(
    ("change", "drop", "version", "message"),
    [
        ({}, "final.0.bias", "v2", r"1 missing: final\.0\.bias"),
        ({}, "fc1.weight", "v2", r"1 missing: fc1\.weight"),
        ({}, "", "v1", r"names are those of version 'v2'"),
        (
            official("", **{f"extra{i:02}": (1, 1) for i in range(6)}),
            "",
            "v2",
            r"12 left over: .*extra04\.weight, \.\.\.",
        ),
        (
            official("", blocks__2__0=(8,), blocks__2__2=(8, 8)),
            "",
            "v2",
            r"4 missing: blocks\.1\..*4 left over: blocks\.2",
        ),
        ({"blocks.0.2.weight": Shape(8, 9)}, "", "v2", r"blocks\.0\.2\.weight \(8, 9\), expected \(8, 8\)"),
        ({"fc1.parametrizations.weight.original": Shape(8, 6)}, "fc1.weight", "v2", "materialised"),
    ],
)
def test_mismatched_head_tensors_are_listed(change: dict[str, Any], drop: str, version: str, message: str) -> None:
    tensors = V2 | {f"_heads.sam.{name}": shape for name, shape in change.items()}
    tensors.pop(f"_heads.sam.{drop}", None)
    with pytest.raises(AssetError, match=message):
        read_head(tensors, "_heads.sam.", version)


def test_other_invalid_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="attn, v1, v2"):
        read_head(V2, "_heads.sam.", "v7")
    with pytest.raises(ConfigError, match="upsample: must be at least 1, got 0"):
        read_head(V2, "_heads.sam.", "v2", upsample=0)
    with pytest.raises(AssetError, match="16 channels are not a multiple of 3 x 3 cells"):
        read_head(V2, "_heads.sam.", "v2", upsample=3)
    with pytest.raises(AssetError, match=r"no tensors under '_heads\.sam3\.'.*_heads\.sam\."):
        read_head(V2, "_heads.sam3.", "v2")


# --- golden files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def golden() -> Path:
    folder = Path(os.environ.get("AGGLO_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "golden" / "radio"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: set AGGLO_SHARED to a folder that holds golden/radio")
    return folder


def load_head(tensors: Mapping[str, Tensor], prefix: str, version: str, upsample: int) -> nn.Module:
    options, source, target, keys = read_head(tensors, prefix, version, upsample)
    head = build("heads", options, source, target)
    head.load_state_dict({ours: tensors[theirs] for ours, theirs in keys.items()})
    return head.eval()


def deviation(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.std()).item()


def as_map(features: Tensor, like: tuple[int, int]) -> Tensor:
    return features if features.ndim == 4 else features.transpose(1, 2).unflatten(2, like)


@pytest.mark.parametrize("name", ["vit_heads_by_name", "vit_so400m_adaptors"])
@torch.inference_mode()
def test_heads_equal_the_reference(golden: Path, name: str) -> None:
    about = json.loads((golden / f"{name}.json").read_text(encoding="utf-8"))
    tensors, io = load_file(golden / about["weights"]), load_file(golden / about["io"])
    checked = 0
    for case in about["cases"]:
        height, width = (side // 16 for side in about["inputs"][case["input"]][2:])
        summary_idxs = case["model_properties"]["summary_idxs"]
        tokens = io[f"{case['id']}/backbone.summary"].chunk(len(summary_idxs), 1) if "load" in case else ()
        names = case.get("load", {}).get("adaptor_names", [])
        for index, teacher in enumerate(about["args"]["teachers"]):
            if teacher["name"] not in ([names] if isinstance(names, str) else names):
                continue
            key = next(k for k in (teacher["name"], str(index)) if any(t.startswith(f"_heads.{k}.") for t in tensors))
            u, out = teacher.get("fd_upsample_factor", 1), f"{case['id']}/{teacher['name']}"
            version = teacher.get("spatial_mlp_version", about["args"]["mlp_version"])
            spatial = load_head(tensors, f"_feature_projections.{key}.", version, u)
            answer = spatial(as_map(io[f"{case['id']}/backbone.features"], (height, width)))
            assert deviation(answer, as_map(io[f"{out}.features"], (u * height, u * width))) <= 5e-5
            summary = load_head(tensors, f"_heads.{key}.", about["args"]["mlp_version"], 1)
            if (slot := teacher.get("token_slot", index)) in summary_idxs:  # other class tokens are not stored
                answer = summary(tokens[summary_idxs.index(slot)])
                assert deviation(answer, io[f"{out}.summary"]) <= 5e-5
            checked += 1
    assert checked >= 5


@torch.inference_mode()
def test_heads_of_the_hugging_face_layout_equal_the_reference(golden: Path) -> None:
    tensors = load_file(golden / "hf_layout_v4.weights.safetensors")
    io = load_file(golden / "hf_layout_v4.io.safetensors")
    at = "radio_model.adaptors.dino_v3."
    answer = load_head(tensors, f"{at}feat_mlp.", "v2", 1)(as_map(io["nlc/backbone.features"], (6, 8)))
    assert deviation(answer, as_map(io["nlc/dino_v3.features"], (6, 8))) <= 5e-5
    answer = load_head(tensors, f"{at}head_mlp.", "v2", 1)(io["nlc/backbone.summary"].chunk(2, 1)[1])
    assert deviation(answer, io["nlc/dino_v3.summary"]) <= 5e-5


@torch.inference_mode()
def test_heads_of_spectral_checkpoints_need_materialised_weights(golden: Path) -> None:
    tensors = load_file(golden / "vit_spectral.weights.safetensors")
    io = load_file(golden / "vit_spectral.io.safetensors")
    with pytest.raises(AssetError, match="materialised"):
        read_head(tensors, "_heads.0.", "v2")
    plain = {key: value for key, value in tensors.items() if ".parametrizations." not in key}
    for ours, theirs in (("_heads.0.", "head_mlp."), ("_feature_projections.0.", "feat_mlp.")):
        stem = f"effective/adaptor.clip.{theirs}"
        plain |= {f"{ours}{key.removeprefix(stem)}": value for key, value in io.items() if key.startswith(stem)}
    answer = load_head(plain, "_feature_projections.0.", "v2", 1)(as_map(io["clip/backbone.features"], (6, 8)))
    assert deviation(answer, as_map(io["clip/clip.features"], (6, 8))) <= 5e-5
    answer = load_head(plain, "_heads.0.", "v2", 1)(io["clip/backbone.summary"].chunk(2, 1)[0])
    assert deviation(answer, io["clip/clip.summary"]) <= 5e-5
