"""RADIO1D: the golden cases, the two necks, what merging and splitting mean, the kept tokens, and wrong options."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agglo.checkpoints.radio1d import options_from_official, weights_from_official
from agglo.config import build
from agglo.students._vit_1d_grids import Merge, Split, merged
from agglo.students.vit_1d import ViT1D
from agglo.types import ConfigError
from support.parity import error

GOLDEN = Path(os.environ.get("AGGLO_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "golden" / "radio"
TINY: dict[str, Any] = {"width": 16, "heads": 2, "patch": 4, "max_grid": 8, "filler_grid": 2}
LEVELS = {"downscale_levels": [2], "decoder_depth": 3, "decoder_upscale_levels": [1]}


def tiny(**options: Any) -> ViT1D:
    return ViT1D(("a", "b"), **{**TINY, **options}).eval()


# --- golden -----------------------------------------------------------------------------------------------------------


def golden_configs() -> list[Path]:
    return sorted(
        path
        for path in GOLDEN.glob("*.json")
        if str(json.loads(path.read_text()).get("args", {}).get("model", "")).startswith("radio1d")
    )


def student_from(path: Path, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], ViT1D]:
    about = json.loads(path.read_text())
    args = about["args"]
    keys = options_from_official(
        args["model"], args["model_kwargs"], args["teachers"], model_norm=bool(args.get("model_norm"))
    )
    student = build("students", {"kind": "vit_1d", **keys, **options}).eval()
    state = load_file(path.with_name(about["weights"]))
    below = {k.removeprefix("base_model."): v for k, v in state.items() if k.startswith("base_model.")}
    student.load_state_dict(weights_from_official(below, final_norm=keys["final_norm"]))
    return about, state, student


@torch.inference_mode()
def test_golden_cases():
    paths = golden_configs()
    if not paths:
        pytest.skip(f"{GOLDEN} holds no RADIO1D configuration: set AGGLO_SHARED to a folder with golden/radio")
    for path in paths:
        about, state, student = student_from(path)
        io = load_file(path.with_name(about["io"]))
        for case in about["cases"]:
            chosen = case.get("load", {}).get("neck_name")
            mean, std = state["input_conditioner.norm_mean"], state["input_conditioner.norm_std"]
            images = (io[f"input/{case['input']}"].float() / 255 - mean) / std
            necks = student.necks(images, case.get("kwargs", {}).get("num_tokens"))
            slots = case["model_properties"]["summary_idxs"]
            for name in case["outputs"]:
                neck, _, what = name.rpartition(".")
                out, expected = necks[neck or chosen], io[f"{case['id']}/{name}"]
                if what == "summary":
                    actual = out.summary.unflatten(1, (student.spec.slots, -1))[:, slots].flatten(1)
                else:
                    actual = out.spatial if expected.ndim == 4 else out.tokens()
                assert error(actual, expected) <= 5e-5, (path.stem, case["id"], name)


@torch.inference_mode()
def test_golden_checkpoint_computes_each_neck():
    paths = golden_configs()
    if not paths:
        pytest.skip(f"{GOLDEN} holds no RADIO1D configuration: set AGGLO_SHARED to a folder with golden/radio")
    for neck in ("encoder", "decoder"):
        _, _, student = student_from(paths[0], neck=neck, num_tokens=3)
        images = torch.randn(1, 3, 3 * student.spec.step, 4 * student.spec.step)
        alone, both = student(images), student.necks(images)[neck]
        assert torch.equal(alone.summary, both.summary)
        assert torch.equal(alone.spatial, both.spatial)


# --- grids ------------------------------------------------------------------------------------------------------------


def test_merging_concatenates_columns_first_and_pads_with_zeros():
    merge = Merge(1)
    merge.norm = torch.nn.Identity()  # type: ignore[assignment]
    merge.reduction = torch.nn.Identity()  # type: ignore[assignment]
    image = torch.arange(1.0, 7.0).view(1, 6, 1)  # 1 2 3 / 4 5 6
    assert merge(image, (2, 3)).tolist() == [[[1, 4, 2, 5], [3, 6, 0, 0]]]
    assert merge(image[:, :3], (1, 3)).tolist() == [[[1, 0, 2, 0], [3, 0, 0, 0]]]


def test_splitting_is_row_major():
    split = Split(2)
    split.norm = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        split.expansion.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [10, 0], [0, 10]]))
    cells = torch.tensor([[[1.0, 2], [3, 4]]])  # a grid of 1 x 2
    assert split(cells, (1, 2)).view(2, 4).tolist() == [[1, 2, 3, 4], [10, 20, 30, 40]]


def test_a_merged_grid_rounds_up_at_every_merge():
    assert merged((7, 9)) == (4, 5)
    assert merged((7, 9), 2) == merged(merged((7, 9))) == (2, 3)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5), (5, 4), (8, 8), (11, 3)])
@pytest.mark.parametrize("merges", [1, 2])
@torch.inference_mode()
def test_every_grid_is_restored(grid, merges):
    levels = [1, 3][:merges]
    student = tiny(heads=4, downscale_levels=levels, decoder_depth=4, decoder_upscale_levels=levels)
    necks = student.necks(torch.randn(2, 3, 4 * grid[0], 4 * grid[1]))
    rows, columns = merged(grid, merges)
    wide = 16 * 2**merges
    assert necks["decoder"].spatial.shape == (2, 16, *grid)
    assert necks["decoder"].summary.shape == (2, 2 * 16)
    assert necks["encoder"].spatial.shape == (2, wide, 1, rows * columns)
    assert necks["encoder"].summary.shape == (2, 2 * wide)
    assert all(torch.isfinite(out.spatial).all() for out in necks.values())


# --- the kept tokens --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_kept_tokens_are_the_first_ones_and_the_number_is_clamped():
    student = tiny(neck="encoder")
    images = torch.randn(2, 3, 16, 24)
    everything = student(images)
    few = student(images, num_tokens=2)
    assert few.tokens().shape == (2, 2, 32)
    assert torch.equal(few.tokens(), everything.tokens()[:, :2])
    assert torch.equal(few.summary, everything.summary)
    assert torch.equal(student(images, num_tokens=999).spatial, everything.spatial)


@torch.inference_mode()
def test_the_decoder_uses_the_kept_tokens_only():
    student = tiny()
    kept = torch.randn(1, 2, 32)
    prefix, spatial = student.decoder(kept, (4, 4))
    # The filler at the places of the kept tokens is replaced; that at the others is not.
    student.decoder.filler_tokens[:2] += 1
    again = student.decoder(kept, (4, 4))
    assert torch.equal(again[0], prefix)
    assert torch.equal(again[1], spatial)
    student.decoder.filler_tokens[2:] += torch.randn(2, 32)
    assert not torch.allclose(student.decoder(kept, (4, 4))[1], spatial)


@torch.inference_mode()
def test_num_tokens_of_a_call_overrides_the_students():
    student = tiny(neck="encoder", num_tokens=3)
    images = torch.randn(1, 3, 16, 16)
    assert student(images).tokens().shape[1] == 3
    assert student(images, num_tokens=1).tokens().shape[1] == 1
    student.num_tokens = None
    assert student(images).tokens().shape[1] == 4


def test_training_draws_every_number_of_tokens_and_repeats_with_the_seed():
    student = tiny(neck="encoder", pos_dropout=0.0).train()
    images = torch.randn(1, 3, 16, 16)

    def lengths() -> list[int]:
        torch.manual_seed(3)
        return [student(images).tokens().shape[1] for _ in range(40)]

    first = lengths()
    assert set(first) == {1, 2, 3, 4}
    assert lengths() == first
    assert {student(images, num_tokens=2).tokens().shape[1] for _ in range(4)} == {2}
    student.rate = "all"
    assert {student(images).tokens().shape[1] for _ in range(4)} == {4}


def test_every_parameter_gets_a_gradient_from_the_two_necks():
    student = tiny(final_norm=True, rate="all").train()
    necks = student.necks(torch.randn(2, 3, 12, 20), num_tokens=2)
    sum(out.summary.square().sum() + out.spatial.square().sum() for out in necks.values()).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


@torch.inference_mode()
def test_half_precision_keeps_its_dtype():
    student = tiny().to(torch.bfloat16)
    images = torch.randn(1, 3, 20, 12)
    out = student(images.to(torch.bfloat16))
    assert out.spatial.dtype == out.summary.dtype == torch.bfloat16
    reference = student.float()(images)
    assert torch.cosine_similarity(out.spatial.float().flatten(), reference.spatial.flatten(), dim=0) > 0.999


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downscale_levels": []}, r"downscale_levels: needs at least one block of 0 to 3.*\[2\].*'vit'"),
        ({"downscale_levels": [4]}, r"downscale_levels: 4 is not a block of 0 to 3; the nearest is 3"),
        ({"downscale_levels": [-1]}, r"downscale_levels: -1 is not a block.*nearest is 0"),
        ({"downscale_levels": [2, 2]}, r"\[2, 2\] has a block twice"),
        ({"decoder_upscale_levels": [2]}, r"decoder_upscale_levels: 2 is not a block of 0 to 1; the nearest is 1"),
        ({"decoder_upscale_levels": [0, 1]}, r"decoder_upscale_levels: 2 splits for 1 merges.*; use 1"),
        ({"num_tokens": 0}, r"num_tokens: 0 is less than 1; use 1 or more"),
        ({"heads": 3}, r"heads: 3 does not divide width 16; the nearest that does is 2"),
        ({"heads": 1}, r"heads: 1 is not divisible by 2.*nearest is 2"),
        ({"class_tokens": 0}, r"class_tokens: 0 is less than 1"),
        ({"registers": -1}, r"registers: -1 is less than 0"),
        ({"neck": "middle"}, r"neck"),
        ({"rate": "beta"}, r"rate"),
    ],
)
def test_invalid_options_are_refused_with_the_next_move(options, message):
    with pytest.raises(ConfigError, match=message):
        build("students", {"kind": "vit_1d", **TINY, **options})
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


def test_invalid_calls_are_refused_with_the_next_move():
    student = tiny()
    with pytest.raises(ValueError, match=r"num_tokens: 0 is less than 1"):
        student(torch.randn(1, 3, 16, 16), num_tokens=0)
    with pytest.raises(ValueError, match=r"multiple of 4.*12 or 16"):
        student(torch.randn(1, 3, 14, 16))


def test_class_tokens_come_from_teachers_or_the_option():
    assert tiny().spec.slots == 2
    assert tiny(class_tokens=3).spec.slots == 3
    assert ViT1D(**TINY).spec.slots == 1
    assert tiny(neck="encoder").spec.summary == 2 * 32
    assert tiny().spec.summary == 2 * 16


# --- official layout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "width", "depth", "hidden"),
    [
        ("radio1d_large_patch16_224", 1024, 24, 4096),
        ("radio1d_so400m_patch16_224", 1152, 27, 4304),
        ("radio1d_huge_patch16_224", 1280, 32, 5120),
    ],
)
def test_official_architectures(model, width, depth, hidden):
    options = options_from_official(
        model, {**LEVELS, "cpe_max_size": 2048, "num_cls_tokens": 3, "num_registers": 7}, model_norm=True
    )
    with torch.device("meta"):
        student = build("students", {"kind": "vit_1d", **options})
    shapes = {name: tuple(p.shape) for name, p in student.named_parameters()}
    assert len(student.blocks) == depth
    assert shapes["patch_generator.pos_embed"] == (1, 128 * 128, width)
    assert shapes["patch_generator.token"] == (10, width)
    assert shapes["blocks.0.mlp.fc1.weight"] == (hidden, width)
    assert shapes[f"blocks.{depth - 1}.mlp.fc1.weight"] == (2 * hidden, 2 * width)
    assert shapes["decoder.filler_tokens"] == (49, 2 * width)
    assert shapes["decoder.blocks.2.attn.qkv.weight"] == (3 * width, width)
    assert "decoder.blocks.0.attn.qkv.bias" not in shapes
    assert [block.attn.heads for block in student.decoder.blocks] == [16, 8, 8]
    assert [student.blocks[0].attn.heads, student.blocks[-1].attn.heads] == [16, 32]


def test_official_options_follow_the_rules_of_the_prefix():
    teachers = [{"name": "a"}, {"name": "b"}, {"name": "a"}]

    def options(**kwargs: Any) -> dict[str, Any]:
        return options_from_official("radio1d_large_patch16_224", {**LEVELS, **kwargs}, teachers)

    assert options(cpe_max_size=2048)["class_tokens"] == 2
    assert options(num_cls_tokens=4, register_multiple=8)["registers"] == 4
    assert options(num_cls_tokens=8, register_multiple=8)["registers"] == 8  # a full multiple more
    assert options(num_registers=3, register_multiple=8)["registers"] == 3
    assert options()["registers"] == 0
    assert not options()["final_norm"]
    assert options(cpe_max_size=2048)["position"] == "cropped"
    assert options(cpe_max_size=224)["position"] == options()["position"] == "corner"
    assert options(img_size=[112, 112], cpe_max_size=2048)["filler_grid"] == 4


def test_official_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"did you mean 'radio1d_huge_patch16_224'"):
        options_from_official("radio1d_hug_patch16_224", LEVELS)
    with pytest.raises(ConfigError, match=r"lacks decoder_depth, decoder_upscale_levels"):
        options_from_official("radio1d_huge_patch16_224", {"downscale_levels": [2]})
    with pytest.raises(ConfigError, match=r"init_values is 0.1; only None is supported"):
        options_from_official("radio1d_huge_patch16_224", {**LEVELS, "init_values": 0.1})
    with pytest.raises(ConfigError, match=r"not square"):
        options_from_official("radio1d_huge_patch16_224", {**LEVELS, "img_size": [224, 448]})


def test_official_keys_that_only_training_reads_are_left_out():
    tensor = torch.zeros(1)
    state = {
        "patch_generator.cls_token.token": tensor,
        "norm.weight": tensor,
        "decoder.norm.weight": tensor,
        "_iter_count": tensor,
        "dynamic_rate_vec": tensor,
        "dynamic_rate_projector.weight": tensor,
    }
    ours = {"patch_generator.token", "decoder.norm.weight"}
    assert set(weights_from_official(state, final_norm=False)) == ours
    assert set(weights_from_official(state, final_norm=True)) == ours | {"norm.weight"}
