"""Our models and timm's RADIO ports: the same weights give the same tokens, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import agglo
from agglo.checkpoints import radio
from agglo.checkpoints.timm import from_timm, is_timm
from agglo.checkpoints.transformers import is_native
from agglo.config import build
from agglo.exports.timm import ARCHITECTURES, OTHERS
from agglo.model.model import Model
from agglo.types import AssetError, ConfigError
from agglo.weights.reading import Checkpoint, read_folder
from support.parity import (
    DEPTH,
    GRID,
    LIMIT,
    PATCH,
    TOKENS,
    WIDTH,
    check_export_is_refused,
    error,
    hugging_face,
    images,
    official,
    randomize,
    small,
)

timm = pytest.importorskip("timm", reason="timm is not installed")
if not timm.is_model("naflexvit_huge_patch16_radio_v4"):
    pytest.skip(f"timm {timm.__version__} has no RADIO", allow_module_level=True)

pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore:images exceed the")]

SMALL = {
    "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "patch_size": PATCH, "pos_embed_grid_size": (GRID, GRID)
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "v4_like": {},
    "v3_like": {"layer_scale": 1e-5, "align_corners": True},
    "one_token": {"cls_per_teacher": False, "registers": 0},
    "no_qkv_bias": {"qkv_bias": False},
    "final_norm": {"final_norm": True, "patch_bias": True},
    "odd_mlp": {"width": 36, "mlp_hidden": 134},
}


def write(model: Model, folder: Path, **options: Any) -> Path:
    return build("exports", {"kind": "timm", **options}).write(model, folder)


def compare(ours: Model, theirs: Any, batches: dict[str, torch.Tensor] | None = None) -> None:
    """All tokens at every size; theirs takes normalised images."""
    config = theirs.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    slots, prefix = ours.student.spec.slots, ours.student.patch_generator.tokens
    with torch.inference_mode():
        for name, batch in (batches or images()).items():
            tokens, out = theirs.forward_features((batch - mean) / std), ours.encode(batch)
            assert error(out.summary, tokens[:, :slots].flatten(1)) <= LIMIT, name
            assert error(out.tokens(), tokens[:, prefix:]) <= LIMIT, name


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_model_gives_the_same_tokens_in_timm(variant: str, tmp_path: Path) -> None:
    model = small(**VARIANTS[variant])
    folder = write(model, tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(theirs).__name__ == "NaFlexVit"
    compare(model, theirs)
    data = timm.data.resolve_model_data_config(theirs)
    assert tuple(data["input_size"]) == (3, 32, 32)
    torch.testing.assert_close(torch.tensor(data["mean"]), model.conditioner.mean.flatten())
    batch = torch.rand(1, 3, 32, 32)
    pooled = theirs(model.conditioner(batch))
    assert error(pooled, model.encode(batch).summary[:, : pooled.shape[1]]) <= LIMIT


def test_export_round_trip_restores_the_model(tmp_path: Path) -> None:
    model = small(layer_scale=1e-5, align_corners=True, num_windowed=1)
    back = agglo.load(write(model, tmp_path / "out"))
    assert (back.tokens, back.summary_slots, back.preferred_size) == (TOKENS, [0, 1], 36)
    assert (back.student.spec.slots, back.student.registers) == (3, 7)
    assert back.provenance["teachers"] == {"sam3": "SAM License"}
    assert back.student_config["num_windowed"] == 1
    assert back.student_config["align_corners"]
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    batch = torch.rand(1, 3, 48, 32)
    assert torch.equal(back(batch, window=2).spatial, model(batch, window=2).spatial)


@pytest.mark.parametrize("name", [*ARCHITECTURES.values(), *OTHERS.values()])
def test_timm_has_the_architectures_with_these_sizes(name: str) -> None:
    theirs = timm.create_model(name, device="meta")
    found = (theirs.embed_dim, len(theirs.blocks), hasattr(theirs.blocks[0].ls1, "gamma"), theirs.num_prefix_tokens)
    assert ARCHITECTURES[found] == name


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"window": 2}, "without window="),
        ({"position": "corner"}, "position: corner"),
        ({"mlp_norm": True}, "mlp_norm"),
        ({"mlp": "swiglu", "mlp_hidden": 104}, "export it to transformers"),
    ],
)
def test_incompatible_students_are_refused_with_the_reason(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    check_export_is_refused("timm", change, why, tmp_path / "out")


def test_timm_and_transformers_layouts_are_distinguished(tmp_path: Path) -> None:
    model = small()
    own = json.loads((model.save(tmp_path / "own") / "config.json").read_text())
    ours = json.loads((write(model, tmp_path / "timm") / "config.json").read_text())
    native = build("exports", {"kind": "transformers"}).write(model, tmp_path / "transformers")
    theirs = json.loads((native / "config.json").read_text())
    assert [(is_timm(c), is_native(c), "format" in c) for c in (own, ours, theirs)] == [
        (False, False, True), (True, False, False), (False, True, False)
    ]  # fmt: skip
    for folder in ("own", "transformers"):
        with pytest.raises(ConfigError, match="another layout"):
            write(model, tmp_path / folder)


# --- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "change", "slots", "aligned"),
    [
        ("naflexvit_base_patch16_radio_v3", {}, 4, True),
        ("naflexvit_large_patch16_radio_v3", {}, 4, False),
        ("naflexvit_huge_patch16_radio_v3", {}, 4, True),
        ("naflexvit_so400m_patch16_radio_v4", {}, 3, False),
        ("naflexvit_huge_patch16_radio_v4", {"embed_proj_type": "conv", "final_norm": True}, 3, False),
        ("naflexvit_huge_patch16_radio_v4", {"reg_tokens": 2, "pos_embed_align_corners": True}, 1, True),
    ],
)
def test_loading_a_timm_folder_gives_equal_tokens(
    architecture: str, change: dict[str, Any], slots: int, aligned: bool, tmp_path: Path
) -> None:
    theirs = timm.create_model(architecture, **SMALL, **change).eval()
    randomize(theirs)
    timm.models.save_for_hf(theirs, str(tmp_path), safe_serialization=True)
    ours = agglo.load(tmp_path)
    compare(ours, theirs)
    assert (ours.student.spec.slots, ours.student_config["align_corners"]) == (slots, aligned)
    assert ours.summary_slots == {4: [0, 1, 2], 3: [0, 1], 1: [0]}[slots]
    assert ours.preferred_size == 512
    assert ours.provenance["license"] == "nvidia-open-model-license"
    windowed, batch = from_timm(read_folder(tmp_path), window=2, num_windowed=1), torch.rand(1, 3, 48, 48)
    assert windowed.step() == 2 * PATCH
    assert error(windowed(batch).spatial, ours(batch).spatial) > 1e-2


def test_zero_patch_bias_is_omitted(tmp_path: Path) -> None:
    theirs = timm.create_model("naflexvit_huge_patch16_radio_v4", **SMALL).eval()
    randomize(theirs)
    torch.nn.init.zeros_(theirs.embeds.proj.bias)
    timm.models.save_for_hf(theirs, str(tmp_path), safe_serialization=True)
    ours = agglo.load(tmp_path)
    assert not ours.student_config["patch_bias"]
    compare(ours, theirs)


def test_plain_vit_is_exact_at_its_native_size_and_warns(tmp_path: Path) -> None:
    theirs = timm.create_model(
        "vit_base_patch16_radio_v3", img_size=32, embed_dim=WIDTH, depth=DEPTH, num_heads=4, patch_size=PATCH
    ).eval()
    randomize(theirs)
    timm.models.save_for_hf(theirs, str(tmp_path), safe_serialization=True)
    with pytest.warns(UserWarning, match="positions for 32x32 pixels only"):
        ours = agglo.load(tmp_path)
    compare(ours, theirs, {"own": torch.rand(2, 3, 32, 32)})
    assert (ours.student.spec.slots, ours.student.registers) == (4, 4)


def test_invalid_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    theirs = timm.create_model("naflexvit_huge_patch16_radio_v4", **SMALL)
    timm.models.save_for_hf(theirs, str(tmp_path), safe_serialization=True)
    whole = read_folder(tmp_path)

    def changed(**arguments: Any) -> Checkpoint:
        config = {**whole.config, "model_args": {**whole.config["model_args"], **arguments}}
        return Checkpoint(whole.tensors, config=config, source="here")

    with pytest.raises(ConfigError, match=r"here: model_args\.pos_embed_interp_mode is 'bicubic'"):
        from_timm(changed(pos_embed_interp_mode="bicubic"))
    with pytest.raises(ConfigError, match="num_heads is 'four'"):
        from_timm(changed(num_heads="four"))
    with pytest.raises(ConfigError, match=r"windo is not an option.*'window'"):
        from_timm(whole, windo=2)
    with pytest.raises(ConfigError, match="'resnet18' is not a RADIO architecture"):
        from_timm(Checkpoint(whole.tensors, config={"architecture": "resnet18"}))
    with pytest.raises(ConfigError, match="mean and std"):
        from_timm(Checkpoint(whole.tensors, config={**whole.config, "pretrained_cfg": {"mean": [1, "x"]}}))
    tensors = {key: value for key, value in whole.tensors.items() if key != "blocks.1.attn.qkv.weight"}
    with pytest.raises(AssetError, match=r"blocks\.1\.attn\.qkv\.weight"):
        from_timm(Checkpoint(tensors, config=whole.config))
    with pytest.raises(AssetError, match=r"embeds\.proj\.weight is missing; it holds"):
        from_timm(Checkpoint({"fc.weight": torch.zeros(1)}, config=whole.config))
    tensors = {**whole.tensors, "embeds.pos_embed": torch.zeros(1, 2, 3, WIDTH)}
    with pytest.raises(ConfigError, match="2 x 3 patches, expected a square"):
        from_timm(Checkpoint(tensors, config=whole.config))
    assert [is_timm({"architecture": name}) for name in ("vit_base_patch16_radio_v3.c_radio", "vit_base", None)] == [
        True, False, False
    ]  # fmt: skip


# --- the official layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "layer_scale", "aligned"),
    [
        ("naflexvit_base_patch16_radio_v3", True, True),
        ("naflexvit_large_patch16_radio_v3", True, False),
        ("naflexvit_huge_patch16_radio_v3", False, True),
        ("naflexvit_huge_patch16_radio_v4", False, False),
    ],
)
def test_official_checkpoint_equals_timms_conversion(
    architecture: str, layer_scale: bool, aligned: bool, tmp_path: Path
) -> None:
    """timm converts the official names by itself, so this does not go through our exporter."""
    v3 = architecture.endswith("v3")
    state, args = official(layer_scale=layer_scale, v3=v3)
    save_file(hugging_face(state, [0, 1, 2] if v3 else [0, 1]), tmp_path / "official.safetensors")
    theirs = timm.create_model(
        architecture, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "official.safetensors")},
        **{**SMALL, "patch_size": 16},
    ).eval()  # fmt: skip
    ours = radio.from_checkpoint(
        Checkpoint(state, args=args, source="random"), release=radio.Release(align_corners=aligned)
    )
    assert ours.summary_slots == ([0, 1, 2] if v3 else [0, 1])
    sizes = {"square": (64, 64), "landscape": (48, 80), "portrait": (80, 32), "larger": (144, 112)}
    compare(ours, theirs, {name: torch.rand(1, 3, *size) for name, size in sizes.items()})
    batch = torch.rand(1, 3, 64, 96)
    back = agglo.load(write(ours, tmp_path / "out"))
    assert torch.equal(back(batch).spatial, ours(batch).spatial)
    assert torch.equal(back(batch).summary, ours(batch).summary)
