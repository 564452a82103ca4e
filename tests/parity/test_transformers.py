"""Our models and transformers' ``RadioModel``: the same weights give the same features, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import agglo
from agglo.checkpoints import radio
from agglo.checkpoints.transformers import from_native, is_native
from agglo.config import build
from agglo.model.heads import HeadConfig
from agglo.model.model import Model
from agglo.types import AssetError, ConfigError, StorageError
from agglo.weights.reading import Checkpoint, read_folder
from support.parity import (
    DEPTH,
    GRID,
    LIMIT,
    PATCH,
    SIZES,
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

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if not hasattr(transformers, "RadioModel"):
    pytest.skip(f"transformers {transformers.__version__} has no RadioModel", allow_module_level=True)

pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore:images exceed the")]

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale": {"layer_scale": 1e-5},
    "one_class_token": {"cls_per_teacher": False, "registers": 0},
    "no_qkv_bias": {"qkv_bias": False},
    "swiglu": {"mlp": "swiglu", "mlp_hidden": 104},
    "odd_mlp": {"width": 36, "mlp_hidden": 134, "layer_scale": 0.1},
    "patch_bias": {"patch_bias": True},
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def write(model: Model, folder: Path, **options: Any) -> Path:
    return build("exports", {"kind": "transformers", **options}).write(model, folder)


def theirs(folder: Path) -> Any:
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "RadioModel"
    assert not any(info.values()), info
    return model.eval()


def compare(ours: Model, native: Any) -> None:
    """Summary and features at every size; images in [0, 1] go into both."""
    assert set(images()) == set(SIZES)
    with torch.inference_mode():
        for name, batch in images().items():
            actual, expected = ours(batch, resize=False), native(batch)
            assert error(actual.summary, expected.summary) <= LIMIT, name
            assert error(actual.tokens(), expected.features) <= LIMIT, name


def same_numbers(one: Model, other: Model, **options: Any) -> None:
    batch = torch.rand(1, 3, 64, 32)
    with torch.inference_mode():
        a, b = one(batch, **options), other(batch, **options)
    assert torch.equal(a.summary, b.summary)
    assert torch.equal(a.spatial, b.spatial)


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_model_gives_the_same_numbers_in_plain_transformers(variant: str, tmp_path: Path) -> None:
    model = small(**VARIANTS[variant])
    compare(model, theirs(write(model, tmp_path / "out")))


def test_export_round_trip_restores_the_model(tmp_path: Path) -> None:
    model = small(layer_scale=1e-5, num_global=1, num_windowed=1, pos_dropout=0.0)
    back = agglo.load(write(model, tmp_path / "out"))
    assert back.student_config["kind"] == "vit"
    assert {k: back.student_config[k] for k in ("num_global", "num_windowed", "pos_dropout")} == {
        "num_global": 1, "num_windowed": 1, "pos_dropout": 0.0
    }  # fmt: skip
    assert (back.tokens, back.summary_slots, back.preferred_size) == (TOKENS, [0, 1], 36)
    assert back.provenance["teachers"] == {"sam3": "SAM License"}
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    same_numbers(model, back, window=2)
    assert torch.equal(agglo.load(tmp_path / "out", window=2)(batch := torch.rand(1, 3, 48, 48)).spatial,
                       model(batch, window=2).spatial)  # fmt: skip


def test_agglo_notes_survive_a_transformers_round_trip(tmp_path: Path) -> None:
    model = small(num_global=2)
    theirs(write(model, tmp_path / "out")).save_pretrained(tmp_path / "again")
    back = agglo.load(tmp_path / "again")
    assert (back.tokens, back.student_config["num_global"]) == (TOKENS, 2)
    assert back.student_config["layer_scale"] is None  # transformers writes ones
    same_numbers(model, back)


def test_the_processor_leaves_normalisation_to_the_model(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    write(small(), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(images=Image.new("RGB", (90, 60), (255, 0, 51)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (
        1,
        3,
        32,
        32,
    )  # 36, the preferred size, is not a multiple of 8: 32 is the nearest, ties to even
    torch.testing.assert_close(pixels[0, :, 16, 16], torch.tensor([1.0, 0.0, 0.2]))


def test_precision_on_disk(tmp_path: Path) -> None:
    model = small()
    folder = write(model, tmp_path / "out", dtype="bfloat16")
    state = load_file(folder / "model.safetensors")
    assert {t.dtype for k, t in state.items() if "conditioner" not in k and "idxs" not in k} == {torch.bfloat16}
    assert state["radio_model.input_conditioner.norm_mean"].dtype == torch.float32
    assert transformers.AutoModel.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    batch = torch.rand(1, 3, 32, 32)
    actual, expected = agglo.load(folder)(batch).spatial, model(batch).spatial
    assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.999
    with torch.no_grad():
        model.student.blocks[0].mlp.fc1.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"fc1.weight is not finite as float16"):
        write(model, tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_exported_heads_are_omitted_with_a_warning(tmp_path: Path) -> None:
    head = HeadConfig({"kind": "mlp", "hidden": 16}, None, 8, None, 0, None)
    model = small(heads={"dino_v3": head})
    with pytest.warns(UserWarning, match=r"RadioModel does not support the heads \(dino_v3\); omitted"):
        folder = write(model, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert "heads (dino_v3)" in card
    assert "license: apache-2.0" in card
    assert "- `sam3`: SAM License" in card
    assert not agglo.load(folder).heads


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"window": 2}, "without window="),
        ({"position": "corner"}, "position: corner"),
        ({"align_corners": True}, "align_corners=False"),
        ({"mlp_norm": True}, "mlp_norm"),
        ({"final_norm": True}, "final_norm"),
        ({"mlp": "swiglu", "mlp_hidden": 101}, "mlp_hidden: 96 or 104"),
    ],
)
def test_incompatible_students_are_refused_with_the_reason(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    check_export_is_refused("transformers", change, why, tmp_path / "out")


def test_other_students_and_incomplete_models_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    student = {"kind": "timm", "model": "test_efficientnet", "stages": [3]}
    with pytest.raises(ConfigError, match="student is a timm"):
        write(Model(student, {}), tmp_path / "out")
    model = small()
    model.take_conditioner()
    with pytest.raises(ConfigError, match="conditioner was taken"):
        write(model, tmp_path / "out")
    plain = small()
    normalized = Model(plain.student_config, {}, tokens=TOKENS, normalizers={"features": True})
    with pytest.raises(ConfigError, match="feature normalizer"):
        write(normalized, tmp_path / "out")


def test_a_folder_of_another_layout_is_not_overwritten(tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path / "own")
    before = (tmp_path / "own" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="name another folder"):
        write(model, tmp_path / "own")
    assert (tmp_path / "own" / "config.json").read_bytes() == before
    assert not is_native(json.loads(before))
    assert "format" not in json.loads((write(model, tmp_path / "out") / "config.json").read_text())
    write(small(layer_scale=1e-5), tmp_path / "out")  # an earlier export is replaced
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    ]  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write(model, tmp_path / "file" / "below")


# --- in ---------------------------------------------------------------------------------------------------------------


def native(**options: Any) -> Any:
    config = transformers.RadioConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, patch_size=PATCH, image_size=32,
        max_img_size=PATCH * GRID, **options,
    )  # fmt: skip
    model = transformers.RadioModel(config).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("original", [True, False], ids=["original_names", "own_names"])
@pytest.mark.parametrize(
    "options",
    [
        {"summary_idxs": [0, 2], "norm_mean": (0.5, 0.4, 0.3), "norm_std": (0.2, 0.3, 0.4)},
        {"use_swiglu_ffn": True, "mlp_ratio": 3.0, "num_registers": 0},
        {"qkv_bias": False, "layerscale_value": 0.5, "mlp_ratio": 2.5, "num_cls_tokens": 2},
    ],
    ids=["plain", "swiglu", "no_qkv_bias"],
)
def test_loading_a_transformers_folder_gives_equal_features(
    options: dict[str, Any], original: bool, tmp_path: Path
) -> None:
    model = native(**options)
    model.save_pretrained(tmp_path, save_original_format=original)
    ours = agglo.load(tmp_path)
    compare(ours, model)
    assert ours.summary_slots == list(options.get("summary_idxs", (0, 1)))
    assert ours.student_config["layer_scale"] == options.get("layerscale_value", 1.0)
    assert (ours.preferred_size, ours.spec.stride) == (32, PATCH)


def test_windows_work_on_transformers_checkpoints(tmp_path: Path) -> None:
    native().save_pretrained(tmp_path)
    model, batch = from_native(read_folder(tmp_path), window=2, num_windowed=1), torch.rand(1, 3, 48, 48)
    assert model.step() == 16
    windowed, everywhere = model(batch), model(batch, window=0)
    assert error(windowed.spatial, everywhere.spatial) > 1e-2
    assert error(agglo.load(tmp_path)(batch).spatial, everywhere.spatial) == 0


def test_layer_scales_of_one_are_omitted(tmp_path: Path) -> None:
    model = native()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lambda1"):
                parameter.fill_(1)
    model.save_pretrained(tmp_path)
    ours = agglo.load(tmp_path)
    assert ours.student_config["layer_scale"] is None
    compare(ours, model)


def test_missing_config_keys_take_transformers_defaults(tmp_path: Path) -> None:
    model = native(layerscale_value=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lambda1"):
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path)
    checkpoint = read_folder(tmp_path)
    tensors = {k: v for k, v in checkpoint.tensors.items() if "lambda1" not in k and "conditioner" not in k}
    compare(from_native(Checkpoint(tensors, config=checkpoint.config)), model)


def test_video_parts_and_heads_are_omitted_with_a_warning(tmp_path: Path) -> None:
    model = native(video_temporal_patch_size=2)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="stacked video frames"):
        compare(agglo.load(tmp_path), model)
    checkpoint = read_folder(tmp_path)
    tensors = {k: v for k, v in checkpoint.tensors.items() if "video" not in k}
    tensors["radio_model.adaptors.clip.head_mlp.fc1.weight"] = torch.zeros(1)
    with pytest.warns(UserWarning, match="official repository"):
        from_native(Checkpoint(tensors, config=checkpoint.config))


def test_invalid_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    native().save_pretrained(tmp_path)
    checkpoint = read_folder(tmp_path)

    def changed(**change: Any) -> Checkpoint:
        return Checkpoint(checkpoint.tensors, config={**checkpoint.config, **change}, source="here")

    with pytest.raises(ConfigError, match=r"here: layer_norm_eps is 1e-05"):
        from_native(changed(layer_norm_eps=1e-5))
    with pytest.raises(ConfigError, match=r"hidden_act is 'silu'"):
        from_native(changed(hidden_act="silu"))
    with pytest.raises(ConfigError, match="not one of a RadioModel"):
        from_native(changed(hidden_size="wide"))
    with pytest.raises(ConfigError, match="not one of a RadioModel"):
        from_native(changed(patch_size=0))
    tensors = {k: v for k, v in checkpoint.tensors.items() if not k.endswith("summary_idxs")}
    with pytest.raises(ConfigError, match=r"summary_slots: \[0, 7\] exceeds 0 to 2, the class tokens"):
        from_native(Checkpoint(tensors, config={**checkpoint.config, "summary_idxs": [0, 7]}))
    with pytest.raises(ConfigError, match=r"windo is not an option.*'window'"):
        from_native(checkpoint, windo=2)
    with pytest.raises(AssetError, match=r"blocks.3"):
        from_native(changed(num_hidden_layers=4))
    with pytest.raises(AssetError, match="another size"):
        from_native(changed(mlp_ratio=3.0))
    assert not is_native({"model_type": "radio", "args": {"teachers": []}})  # heads are read from an official one
    assert not is_native({"model_type": "vit"})


# --- the official layout ----------------------------------------------------------------------------------------------


def test_official_checkpoint_equals_transformers_conversion(tmp_path: Path) -> None:
    """transformers converts the official names by itself, so this does not go through our exporter."""
    state, args = official(layer_scale=False)
    config = transformers.RadioConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, max_img_size=16 * GRID, summary_idxs=[0, 1]
    )
    config.architectures = ["RadioModel"]
    config.save_pretrained(tmp_path)
    named = {k: v for k, v in hugging_face(state, [0, 1]).items() if ".norm." not in k}
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    native = transformers.RadioModel.from_pretrained(tmp_path).eval()
    ours = radio.from_checkpoint(Checkpoint(state, args=args, source="random"))
    assert (ours.student.spec.slots, ours.student.registers, ours.summary_slots) == (3, 7, [0, 1])
    with torch.inference_mode():
        for height, width in [(64, 64), (48, 80), (80, 32), (144, 112)]:
            batch = torch.rand(1, 3, height, width)
            actual, expected = ours(batch, resize=False), native(batch)
            assert error(actual.summary, expected.summary) <= LIMIT
            assert error(actual.tokens(), expected.features) <= LIMIT
    same_numbers(ours, agglo.load(tmp_path))
    same_numbers(ours, agglo.load(write(ours, tmp_path / "out")))
