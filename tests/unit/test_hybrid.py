"""E-RADIO: reference vectors, the published sizes, closed forms of its unusual parts, deployment, windows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agglo.checkpoints.eradio import VARIANTS, options_from_official
from agglo.config import build
from agglo.students._eradio_attention import (
    RECOMPUTED,
    AttentionBlock,
    AttentionOptions,
    RelativeBias,
    from_windows,
    to_windows,
)
from agglo.students._eradio_convs import ConvBN, stack_tiles
from agglo.students.hybrid import Hybrid
from agglo.types import ConfigError

GOLDEN = Path(os.environ.get("AGGLO_SHARED", Path(__file__).parents[3] / "shared")) / "golden" / "radio"
TINY: dict[str, Any] = {"width": 8, "stem_width": 4, "depths": (1, 1, 2, 1), "windows": ((2,), (2,)), "neck_width": 24}
OPTIONS: dict[str, dict[str, Any]] = {
    "released": {},
    "pooled": {"conv_resample": False, "group_ratio": 1.0, "neck_start": 1},
    "plain": {"csp": False, "mlp": "swiglu", "width": 16, "layer_scale": 0.5, "conv_layer_scale": 0.5},
    "tiles": {"tile_stem": True, "tile_downsample": True, "group_ratio": -1, "ratios": ((1,), (1,))},
    "shifted": {"shift": True, "multi_query": True, "depths": (1, 1, 2, 2)},
    "padded": {"windows": ((5,), (2,)), "ratios": ((3, 2, 1), (1,)), "neck_start": 3, "neck_width": 64},
}


def network(**options: Any) -> Hybrid:
    """A tiny network whose norms and biases are not at their uninteresting starts."""
    student = Hybrid(**{**TINY, **options})
    with torch.no_grad():
        for name, tensor in (*student.named_parameters(), *student.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif "cpb_mlp" in name:
                tensor.normal_(std=0.5)
    return student.eval()


# ------------------------------------------------------------------------------------------- reference vectors


def cases() -> Iterator[Any]:
    for path in sorted(GOLDEN.glob("eradio*.json")):
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            yield pytest.param(path, case["id"], id=f"{path.stem}-{case['id']}")


def golden(path: Path, case_id: str, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, Tensor]]:
    """Ours and the reference's, for each output of a case."""
    data = json.loads(path.read_text(encoding="utf-8"))
    case = next(case for case in data["cases"] if case["id"] == case_id)
    weights, tensors = load_file(path.parent / data["weights"]), load_file(path.parent / data["io"])
    student = Hybrid(**options_from_official(data["args"]["model_kwargs"])).eval()
    prefix = "base_model."
    student.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    for step in case.get("pre", ()):
        if step == "switch_to_deploy":
            student.deploy()
        else:
            assert step[0] == "change_window_size"
            student.change_window(step[1])
    images = tensors[f"input/{case['input']}"].float() / 255
    images = (images - weights["input_conditioner.norm_mean"]) / weights["input_conditioner.norm_std"]
    with torch.inference_mode():
        out = student.to(dtype)(images.to(dtype))
    expected = tensors[f"{case_id}/features"]
    yield (out.spatial if expected.ndim == 4 else out.tokens()), expected
    yield out.summary, tensors[f"{case_id}/summary"]


@pytest.mark.skipif(not list(cases()), reason=f"no eradio*.json in {GOLDEN}: set AGGLO_SHARED")
@pytest.mark.parametrize(("path", "case"), list(cases()))
def test_equals_the_reference(path: Path, case: str) -> None:
    for actual, expected in golden(path, case):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() / expected.std() <= 5e-5


@pytest.mark.skipif(not list(cases()), reason=f"no eradio*.json in {GOLDEN}: set AGGLO_SHARED")
@pytest.mark.parametrize(("path", "case"), list(cases())[:1])
def test_bfloat16_is_close_to_the_reference(path: Path, case: str) -> None:
    for actual, expected in golden(path, case, torch.bfloat16):
        assert torch.cosine_similarity(actual.float().flatten(), expected.flatten(), dim=0) >= 0.999


# ---------------------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("eradio_large_fullres_ws16", 389.6),
        ("eradio_xxxtiny", 10.26),
        ("eradio_xxxtiny_8x_ws12", 6.26),
        ("eradio_xxxtiny_8x_ws16", 6.28),
    ],
)
def test_published_variants_have_the_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        student = build("students", {"kind": "hybrid", **VARIANTS[name]})
    count = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05 if millions > 100 else 0.0051)
    assert student.spec.stride == (8 if name == "eradio_xxxtiny_8x_ws16" else 16)


def test_the_release_has_its_434_tensors() -> None:
    with torch.device("meta"):
        student = Hybrid(**VARIANTS["eradio"])
    attention = sum(isinstance(module, RelativeBias) for module in student.modules())
    assert len(student.state_dict()) + len(RECOMPUTED) * attention == 434
    assert (student.spec.summary, student.spec.spatial, student.spec.stride) == (1536, 1536, 16)
    assert VARIANTS["e-radio_v2"] == VARIANTS["eradio"] == VARIANTS["eradio_large_fullres_ws16"]


# ------------------------------------------------------------------------------------------------------- parts


def test_tiles_are_contiguous_regions() -> None:
    x = torch.arange(2 * 3 * 4 * 8.0).view(2, 3, 4, 8)
    out = stack_tiles(x, 2)
    assert out.shape == (2, 12, 2, 4)
    for c, i, j in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (1, 1, 1)):
        assert torch.equal(out[:, c * 4 + i * 2 + j], x[:, c, 2 * i : 2 * i + 2, 4 * j : 4 * j + 4])
    assert not torch.equal(out, torch.nn.functional.pixel_unshuffle(x, 2))


def test_windows_are_row_major_and_invertible() -> None:
    x = torch.arange(2 * 1 * 4 * 6.0).view(2, 1, 4, 6)
    windows = to_windows(x, 2)
    assert windows.shape == (12, 4, 1)
    assert windows[1].flatten().tolist() == [2, 3, 8, 9]
    assert windows[3].flatten().tolist() == [12, 13, 18, 19]
    assert torch.equal(from_windows(windows, 2, (4, 6)), x)


@pytest.mark.parametrize("window", [5, 3, 1])
def test_attention_bias_is_a_function_of_the_offset(window: int) -> None:
    bias = RelativeBias(heads=2, hidden=7, window=5)
    bias.window = window
    with torch.no_grad():
        actual = bias()
        cells = [(y, x) for y in range(window) for x in range(window)]
        assert actual.shape == (1, 2, len(cells), len(cells))
        for q, (qy, qx) in enumerate(cells):
            for k, (ky, kx) in enumerate(cells):
                offset = torch.tensor([qy - ky, qx - kx]) / 4 * 8  # the scale is the trained window's
                offset = offset.sign() * (offset.abs() + 1).log2() / 3
                expected = 16 * torch.sigmoid(bias.cpb_mlp(offset))
                torch.testing.assert_close(actual[0, :, q, k], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_block_is_dense_attention_under_a_mask(shifted: bool) -> None:
    options = AttentionOptions(8, True, -1, None, "gelu", True)
    block = AttentionBlock(8, 2, window=4, ratio=1, shifted=shifted, options=options).eval()
    x = torch.randn(2, 8, 8, 12)
    t = 2 * x.flatten(2).transpose(1, 2)  # without pre-convolution the block begins by doubling
    ys, xs = (a.flatten() for a in torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij"))
    half = 2 if shifted else 0
    regions = torch.stack([(ys + half) // 4, (xs + half) // 4], dim=1)  # the cut-off windows are separate regions
    together = (regions[:, None] == regions[None]).all(-1)
    with torch.no_grad():
        table = block.attn.pos_emb_funct()[0]
        # inside a window, cells are counted from its corner
        inside = (ys + half) % 4 * 4 + (xs + half) % 4
        q, k, v = block.attn.qkv(block.norm1(t)).split((8, 4, 4), dim=-1)
        logits = torch.einsum("bqhd,bkd->bhqk", q.unflatten(-1, (2, 4)), k) / 4**0.5
        logits = (logits + table[:, inside][:, :, inside]).masked_fill(~together, -torch.inf)
        y = torch.einsum("bhqk,bkd->bqhd", logits.softmax(-1), v).flatten(2)
        t = t + block.attn.proj(y)
        t = t + block.mlp(block.norm2(t))
        expected = (t.transpose(1, 2).reshape(x.shape) + x) / 2
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_reach_every_parameter(name: str) -> None:
    student = network(**OPTIONS[name]).train()
    out = student(torch.randn(2, 3, 96, 64))
    stride = student.spec.stride
    assert out.spatial is not None and out.summary is not None
    assert out.spatial.shape == (2, student.spec.spatial, 96 // stride, 64 // stride)
    torch.testing.assert_close(out.summary, out.spatial.mean((2, 3)))
    out.spatial.square().sum().backward()
    # a bias right before a norm moves nothing, so its gradient is only required to exist
    dead = [n for n, p in student.named_parameters() if p.grad is None or not (p.grad.any() or n.endswith("bias"))]
    assert not dead


def test_training_updates_the_running_statistics() -> None:
    student = network().train()
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    student(torch.randn(2, 3, 64, 64))
    assert all(not torch.equal(before[name], buffer) for name, buffer in student.named_buffers())


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_the_neck_sets_the_stride(start: int) -> None:
    student = network(neck_start=start, neck_width=8 * 2**start)
    assert student.spec.stride == 4 * 2**start
    out = student(torch.randn(1, 3, 64, 32))
    assert out.spatial is not None
    assert out.spatial.shape == (1, 8 * 2**start, 64 // student.spec.stride, 32 // student.spec.stride)
    # the first map has the grid and the width already, so nothing is learned about it
    assert not any(name.startswith("high_res_neck.neck_features_proj.0") for name in student.state_dict())


# ------------------------------------------------------------------------------------------ windows, deployment


@pytest.mark.parametrize("name", OPTIONS)
def test_deployed_network_is_equivalent(name: str) -> None:
    student, images = network(**OPTIONS[name]), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = student(images)
        student.deploy()
        student.deploy()  # a second time changes nothing
        torch.testing.assert_close(student(images).spatial, expected.spatial, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in student.modules())


def test_deploying_ignores_a_stored_bias() -> None:
    student, images = network(), torch.randn(1, 3, 64, 64)
    state = student.state_dict()
    for name, module in student.named_modules():
        if isinstance(module, RelativeBias):
            state |= {f"{name}.{buffer}": torch.full((3, 3), 7.0) for buffer in RECOMPUTED}
    other = Hybrid(**TINY)
    other.load_state_dict(state)
    other.deploy()
    with torch.inference_mode():
        torch.testing.assert_close(other(images).spatial, student(images).spatial, rtol=1e-4, atol=1e-4)


def test_strict_loading_reports_unexpected_weights() -> None:
    with pytest.raises(RuntimeError, match="Unexpected"):
        network().load_state_dict({**network().state_dict(), "levels.0.blocks.foreign": torch.zeros(1)})


def test_deployed_network_refuses_training_and_loading() -> None:
    student = network()
    state = student.state_dict()
    student.deploy()
    with pytest.raises(RuntimeError, match="before deploy"):
        student.change_window(4)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        student.train()
    with pytest.raises(RuntimeError, match="cannot load weights"):
        student.load_state_dict(state)
    assert not student.train(False).training


def test_changing_windows_changes_outputs_but_not_weights() -> None:
    student, images = network(), torch.randn(1, 3, 128, 128)
    names = set(student.state_dict())
    with torch.inference_mode():
        trained = student(images).spatial
        student.change_window(4)
        assert not torch.allclose(student(images).spatial, trained)
        student.change_window(2)
        assert torch.equal(student(images).spatial, trained)
    assert set(student.state_dict()) == names
    with pytest.raises(ValueError, match="is less than 1 cell"):
        student.change_window(0)


@pytest.mark.parametrize(
    ("side", "window"),
    [(224, 7), (256, 8), (384, 12), (432, 13), (512, 16), (768, 12), (1024, 16), (544, 1)],
)
def test_optimal_window(side: int, window: int) -> None:
    student = network()
    assert student.set_optimal_window(side) == window
    assert {m.window for m in student.modules() if isinstance(m, RelativeBias)} == {window}


def test_optimal_window_of_too_small_images_is_refused() -> None:
    with pytest.raises(ValueError, match="smallest legal side is 32"):
        network().set_optimal_window(31)


def test_folding_is_accurate() -> None:
    layer = ConvBN(6, 8, 3, stride=2, groups=2).eval()
    assert layer.bn is not None
    for tensor in (layer.bn.weight, layer.bn.bias, layer.bn.running_mean, layer.bn.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 9, 7)
    with torch.no_grad():
        expected = layer(x)
        layer.deploy()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- options


def official(**changes: Any) -> dict[str, Any]:
    return {
        "dim": 16, "in_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": [None, None, [4], 2],
        "sr_ratio": [1, 1, [2, 1], 1], "neck_start_stage": 1, "full_features_head_dim": 32, "yolo_arch": True,
        "return_full_features": True, **changes,
    }  # fmt: skip


def test_official_arguments_become_options() -> None:
    options = options_from_official(official(use_swiglu=True, drop_path_rate=0.2, conv_groups_ratio=1))
    assert options["windows"] == ((4,), (2,))
    assert options["ratios"] == ((2, 1), (1,))
    assert (options["heads"], options["mlp"], options["csp"]) == ((4, 8), "swiglu", True)
    assert (options["conv_resample"], options["group_ratio"], options["bias_hidden"]) == (False, 1, 512)
    student = build("students", {"kind": "hybrid", **options}, ("a", "b"))
    assert (student.spec.summary, student.spec.stride, student.spec.slots) == (32, 8, 1)


def test_official_arguments_over_a_variant() -> None:
    assert options_from_official({"return_full_features": True}, "eradio") == VARIANTS["eradio"]
    assert options_from_official({"num_classes": 0, "dim": 64}, "e-radio_v2") == {**VARIANTS["eradio"], "width": 64}


@pytest.mark.parametrize(
    ("kwargs", "variant", "message"),
    [
        (official(conv_group_ratio=1), None, "conv_group_ratio.*did you mean.*conv_groups_ratio"),
        (official(return_full_features=False), None, "return_full_features.*only True"),
        (official(mlp_ratio=3), None, "mlp_ratio: 3 is not supported"),
        (official(num_heads=8), None, "num_heads: needs one entry for each of four stages"),
        (official(window_size=[None] * 4), None, "window_size: needs one entry"),
        ({"dim": 16, "return_full_features": True}, None, "needs in_dim, depths, num_heads"),
        ({}, "eradio_xxtiny", "no E-RADIO variant.*eradio_xxxtiny"),
    ],
)
def test_official_arguments_that_do_not_fit(kwargs: dict[str, Any], variant: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options_from_official(kwargs, variant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 0, 2, 1)}, "depths"),
        ({"heads": (3, 4)}, "heads: 3 does not divide a stage's width 32; 2 does"),
        ({"windows": ((2,), ())}, "windows"),
        ({"windows": ((1,), (2,))}, "windows.*at least 2"),
        ({"ratios": ((2, 0), (1,))}, "ratios.*at least 1"),
        ({"ratios": ((2,),)}, "ratios: 1 entries"),
        ({"neck_start": 4}, "neck_start: 4.*0 to 3"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hybrid(**{**TINY, **options})
