"""Teachers from transformers: bitwise equal to the model; planted faults are detected; bad input is refused."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agglo.config import build
from agglo.teachers import _families
from agglo.teachers._processor import Conditioner, pixels_of
from agglo.teachers._published import PUBLISHED
from agglo.teachers.base import spec_of
from agglo.types import AssetError, ConfigError
from support import teachers as tiny

pytestmark = pytest.mark.libraries

CASES = tiny.CASES
T = tiny.T
YOLOS = {**tiny.BASE, "model_type": "yolos", "image_size": [64, 64], "patch_size": 16}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a case's checkpoint, written once."""
    root, done = tmp_path_factory.mktemp("hub"), {}

    def folder(name: str) -> Path:
        if name not in done:
            done[name] = CASES[name].save(root / name)
        return done[name]

    return folder


def make(folder: Path | str, **keys: Any) -> Any:
    return build("teachers", {"kind": "transformers", "model": str(folder), **keys})


def images(name: str, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *CASES[name].shape, generator=torch.Generator().manual_seed(5))


@cache
def by_hand(name: str, folder: Path) -> tuple[Tensor | None, Tensor]:
    """The model's own features of :func:`images`, computed once."""
    return CASES[name].by_hand(folder, images(name))


@torch.no_grad()
def check(teacher: Any, name: str, folder: Path) -> None:
    """The teacher equals its model bit for bit."""
    batch = images(name)
    out = teacher(batch)
    summary, spatial = by_hand(name, folder)
    assert out.spatial.shape == spatial.shape
    assert torch.equal(out.spatial, spatial)
    assert (out.summary is None) == (summary is None)
    assert summary is None or torch.equal(out.summary, summary)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_features_equal_the_models(name: str, stored: Any) -> None:
    folder = stored(name)
    teacher = make(folder)
    check(teacher, name, folder)
    case, spec = CASES[name], teacher.spec
    out = teacher(images(name))
    assert out.spatial.is_contiguous()
    assert (spec.stride, spec.spatial) == (case.patch, out.spatial.shape[1])
    assert spec.summary == (None if out.summary is None else out.summary.shape[1])
    assert out.spatial.shape[-2:] == tuple(side // case.patch for side in case.shape)
    assert spec_of({"kind": "transformers", "model": str(folder)}) == spec
    assert float(out.spatial.std()) > 0.05, "features must depend on the image"


@pytest.mark.parametrize("name", ["siglip", "naflex", "clip_projected", "dinov3", "radio", "generic_vit"])
def test_every_cell_depends_on_its_own_pixels(name: str, stored: Any) -> None:
    teacher, batch = make(stored(name)), images(name, batch=1)
    patch = CASES[name].patch
    other = batch.clone()
    other[..., patch : 2 * patch, 2 * patch : 3 * patch] = 0.9  # row 1, column 2
    with torch.no_grad():
        moved = (teacher(other).spatial - teacher(batch).spatial).norm(dim=1)[0]
    assert divmod(int(moved.argmax()), moved.shape[1]) == (1, 2)


def test_processor_and_conditioner_agree(stored: Any) -> None:
    processor = T.AutoImageProcessor.from_pretrained(stored("dinov3"))
    bytes_ = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = processor(images=bytes_, return_tensors="pt", do_resize=False)["pixel_values"]
    ours = make(stored("dinov3")).condition(bytes_[None] / 255)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- planted faults ---------------------------------------------------------------------------------------------------

TOKENS = ["siglip", "naflex", "clip", "dinov2", "dinov2_registers", "dinov3", "sam3", "radio", "generic_vit"]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setattr(_families, "grid", fault)


def _keeps_prefix(tokens: Tensor, pixels: Tensor, patch: int, prefix: int = 0) -> Tensor:
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    return tokens[:, : height * width].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _transposes(tokens: Tensor, pixels: Tensor, patch: int, prefix: int = 0) -> Tensor:
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    return tokens[:, prefix:].unflatten(1, (width, height)).permute(0, 3, 2, 1)


@pytest.mark.parametrize("name", [name for name in TOKENS if name not in ("siglip", "naflex", "sam3", "radio")])
def test_prefix_in_the_map_is_detected(name: str, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(name)
    plant(monkeypatch, _keeps_prefix)
    with pytest.raises(AssertionError):
        check(make(folder), name, folder)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_registers", "dinov3", "generic_vit"])
def test_wrong_prefix_is_refused(name: str, stored: Any) -> None:
    teacher = make(stored(name))
    correct = teacher.family.prefix
    teacher.family.prefix = correct - 1
    with pytest.raises(ConfigError, match=f"not {correct - 1} before a grid"):
        teacher(images(name))


@pytest.mark.parametrize("name", TOKENS)
def test_transposed_grid_is_detected(name: str, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(name)
    plant(monkeypatch, _transposes)
    with pytest.raises(AssertionError):
        check(make(folder), name, folder)


def test_transposed_sam_is_detected(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make(stored("sam"))
    read = teacher.family.read
    monkeypatch.setattr(teacher.family, "read", lambda net, pixels: (None, read(net, pixels)[1].mT))
    with pytest.raises(AssertionError):
        check(teacher, "sam", stored("sam"))


@pytest.mark.parametrize("name", ["siglip", "naflex", "clip", "dinov2", "dinov3", "dinov3_convnext", "sam", "sam3"])
def test_double_normalisation_is_detected(name: str, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(name)
    teacher = make(folder)
    once = teacher.condition.forward
    monkeypatch.setattr(teacher.condition, "forward", lambda pixels: once(once(pixels)))
    with pytest.raises(AssertionError):
        check(teacher, name, folder)


def test_normalisation_before_radio_is_detected(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make(stored("radio"))
    monkeypatch.setattr(teacher.condition, "forward", lambda pixels: (pixels - 0.5) / 0.5)
    with pytest.raises(AssertionError):
        check(teacher, "radio", stored("radio"))


# --- modes and precision ----------------------------------------------------------------------------------------------


def test_stays_in_eval_mode(stored: Any) -> None:
    teacher, batch = make(stored("dinov3")), images("dinov3")
    before = teacher(batch).spatial
    nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(batch).spatial, before)
    teacher.net.train()  # bypasses the teacher: rotary phases are now random, so the test above can fail
    assert not torch.equal(teacher(batch).spatial, before)


@pytest.mark.parametrize("name", ["siglip", "naflex", "clip_projected", "dinov3", "sam", "sam3", "radio"])
def test_half_precision_equals_autocast(name: str, stored: Any) -> None:
    whole, half, batch = make(stored(name)), make(stored(name), dtype="bfloat16"), images(name)
    with torch.no_grad():
        out = half(batch)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            summary, spatial = whole.family.read(whole.net, whole.condition(batch))
        assert torch.equal(out.spatial, spatial.float())
        assert summary is None or torch.equal(out.summary, summary.float())
        exact = whole(batch).spatial
        error = (out.spatial - exact).abs().max() / exact.std()
        assert 0 < float(error) < 0.2
    assert out.spatial.dtype == torch.float32
    linear = {id(p) for m in half.net.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    kept = [p for p in half.net.parameters() if id(p) not in linear]
    assert kept and all(p.dtype == torch.float32 for p in kept)
    assert all(p.dtype == torch.bfloat16 for p in half.net.parameters() if id(p) in linear)


def test_casting_everything_differs_from_half_precision(stored: Any) -> None:
    half, batch = make(stored("dinov3"), dtype="bfloat16"), images("dinov3")
    with torch.no_grad():
        fine = half(batch).spatial
        blanket = make(stored("dinov3")).net.to(torch.bfloat16)
        coarse = blanket(half.condition(batch).bfloat16()).last_hidden_state[:, 5:]
    assert not torch.equal(coarse.float(), fine.flatten(2).transpose(1, 2))


def test_float16_runs(stored: Any) -> None:
    teacher, batch = make(stored("siglip"), dtype="float16"), images("siglip")
    with torch.no_grad():
        torch.testing.assert_close(teacher(batch).spatial, make(stored("siglip"))(batch).spatial, atol=0.05, rtol=0.05)


def test_compile_applies_to_the_network(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch, "compile", lambda fn, *_, **__: lambda *a, **k: calls.append(1) or fn(*a, **k))
    teacher = make(stored("dinov3"), compile=True)
    check(teacher, "dinov3", stored("dinov3"))
    assert calls == [1]
    assert make(stored("dinov3")).net._compiled_call_impl is None


def test_random_weights_are_deterministic_and_need_no_files() -> None:
    before = torch.get_rng_state()
    small = {"kind": "transformers", "model": "google/siglip2-base-patch16-naflex", "weights": "random"}
    with torch.device("meta"):
        teacher = build("teachers", small)
    assert torch.equal(before, torch.get_rng_state())
    assert teacher.licence == "none (random weights)"
    assert teacher.spec == spec_of(small)


def test_random_weights_of_a_folder(stored: Any, tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(stored("dinov3") / file, tmp_path)
    one, two = (make(tmp_path, weights="random") for _ in range(2))
    batch = images("dinov3")
    assert torch.equal(one(batch).spatial, two(batch).spatial)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_sizes_of_a_fixed_model(stored: Any) -> None:
    teacher = make(stored("siglip"))
    assert (teacher.canvas, teacher.native, teacher.patch, teacher.fixed) == (64, 64, 16, True)
    assert teacher.input_size((432, 432), 16) == teacher.input_size((128, 192), 16) == (64, 64)
    assert teacher.matched_size((432, 432), 16) == (432, 432)
    assert teacher.fill == (0.5, 0.5, 0.5)
    larger = make(stored("siglip"), size=96)
    assert larger.input_size((432, 432), 16) == (96, 96)
    assert larger(torch.rand(1, 3, 96, 96)).spatial.shape == (1, 32, 6, 6)
    assert make(stored("clip")).canvas == 56


def test_sizes_of_a_flexible_model(stored: Any) -> None:
    teacher = make(stored("dinov2"))
    assert (teacher.canvas, teacher.native, teacher.fixed) == (None, 56, False)
    assert teacher.input_size((432, 432), 16) == (378, 378)
    assert teacher.fill == pytest.approx((0.485, 0.456, 0.406))
    assert make(stored("dinov2"), size=70).input_size((128, 256), 16) == (70, 140)
    pyramid = make(stored("dinov3_convnext"))
    assert pyramid.patch is None and pyramid.input_size((224, 256), 16) == (224, 256)


def test_fill_normalises_to_zero(stored: Any) -> None:
    for name in ("siglip", "dinov3", "sam3", "clip"):
        teacher = make(stored(name))
        flat = torch.tensor(teacher.fill).view(1, 3, 1, 1).expand(1, 3, 4, 4)
        assert float(teacher.condition(flat).abs().max()) < 1e-6
    radio = make(stored("radio"))
    assert radio.fill == pytest.approx(radio.net.config.norm_mean)


def test_side_not_divisible_by_the_patch(tmp_path: Path) -> None:
    """384 at patch 14 is 27 cells of 378 pixels: the last pixels are unused, and cells keep their positions."""
    torch.manual_seed(0)
    net = T.SiglipVisionModel(T.SiglipVisionConfig(**{**tiny.SIGLIP, "image_size": 62, "patch_size": 14})).eval()
    net.save_pretrained(tmp_path)
    stated = {"size": {"height": 62, "width": 62}, **tiny.HALF}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    teacher = make(tmp_path)
    assert teacher.canvas == 56
    full = torch.rand(1, 3, 62, 62)
    with torch.no_grad():
        theirs = net((full - 0.5) / 0.5).last_hidden_state
        ours = teacher(full[..., :56, :56]).spatial
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), theirs, atol=1e-6, rtol=1e-5)


def test_dense_only_teacher_has_no_pooling(stored: Any) -> None:
    teacher, batch = make(stored("siglip"), summary=False), images("siglip")
    assert teacher.spec.summary is None and teacher.net.head is None
    out = teacher(batch)
    assert out.summary is None
    assert torch.equal(out.spatial, make(stored("siglip"))(batch).spatial)
    assert make(stored("dinov3"), summary=False)(images("dinov3")).summary is None
    assert make(stored("radio")).spec.slots == 2 and make(stored("radio"), summary=False).spec.slots == 1


def test_sharded_and_pickled_checkpoints(stored: Any, tmp_path: Path) -> None:
    net = T.DINOv3ViTModel.from_pretrained(stored("dinov3"))
    sharded, pickled = tmp_path / "sharded", tmp_path / "pickled"
    net.save_pretrained(sharded, max_shard_size="20KB")
    pickled.mkdir()
    torch.save(net.state_dict(), pickled / "pytorch_model.bin")
    shutil.copy(stored("dinov3") / "config.json", pickled)
    for folder in (sharded, pickled):
        shutil.copy(stored("dinov3") / "preprocessor_config.json", folder)
        check(make(folder), "dinov3", stored("dinov3"))
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(AssetError, match=shard.name):
        make(sharded)


def test_a_nested_processor_file(stored: Any, tmp_path: Path) -> None:
    shutil.copytree(stored("sam3"), tmp_path / "new")
    file = tmp_path / "new" / "preprocessor_config.json"
    inner = json.loads(file.read_text())
    file.unlink()
    (tmp_path / "new" / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    check(make(tmp_path / "new"), "sam3", stored("sam3"))
    file.write_text(json.dumps({**inner, "image_mean": [0.1, 0.2, 0.3]}))  # transformers reads the nested one
    check(make(tmp_path / "new"), "sam3", stored("sam3"))


def test_side_is_the_crop_of_a_cropping_processor() -> None:
    """The shorter side it resizes to counts only without a crop."""
    stated = {"image_processor_type": "CLIPImageProcessor", **tiny.HALF, "size": {"shortest_edge": 64}}
    crop = {"crop_size": {"height": 48, "width": 48}}
    assert pixels_of({**stated, **crop, "do_center_crop": True}, "here").side == 48
    assert pixels_of({**stated, **crop, "do_center_crop": False}, "here").side == 64


@pytest.mark.parametrize(
    "stated",
    [
        {"image_processor_type": "MobileViTImageProcessor"},
        {"feature_extractor_type": "MobileViTFeatureExtractor"},  # as apple/mobilevit-small has it
        {"image_processor_type": "EfficientNetImageProcessor", "image_std": [0.47, 0.48, 0.49]},
        {"image_processor_type": "EfficientNetImageProcessor", "include_top": False},
        {"image_processor_type": "EfficientNetImageProcessor", "rescale_factor": 1 / 127.5, "rescale_offset": True},
        {"image_processor_type": "ViTImageProcessor", "do_normalize": False},
    ],
)
def test_pixels_are_those_of_the_processor(stated: dict[str, Any]) -> None:
    """Channels in the order blue, green, red, an offset and a second division count, and so does a step left out."""
    kind = stated.get("image_processor_type", "MobileViTImageProcessor")
    options = {key: value for key, value in stated.items() if not key.endswith("type")}
    own = getattr(T, kind)(**options, do_resize=False, do_center_crop=False)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want = torch.as_tensor(own(image, return_tensors="pt")["pixel_values"])
    found = Conditioner(pixels_of(stated, "here"))(image[None] / 255)
    assert torch.allclose(found, want, atol=1e-4)


@pytest.mark.parametrize(("key", "value"), [("image_mean", ["a", 0, 0]), ("image_std", [0, 1, 1]), ("image_mean", [1])])
def test_damaged_normalisation_is_named(key: str, value: list[Any]) -> None:
    stated = {"image_processor_type": "ViTImageProcessor", key: value}
    with pytest.raises(AssetError, match=rf"here: {key} is \["):
        pixels_of(stated, "here")


def test_normalisation_is_read_from_the_processor(stored: Any, tmp_path: Path) -> None:
    shutil.copytree(stored("dinov3"), tmp_path / "odd")
    file = tmp_path / "odd" / "preprocessor_config.json"
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 96, "width": 96}}
    file.write_text(json.dumps(stated))
    teacher = make(tmp_path / "odd")
    assert teacher.fill == (0.1, 0.2, 0.3) and teacher.native == 96
    file.write_text(json.dumps({**stated, "do_normalize": False}))
    assert make(tmp_path / "odd").condition.identity
    file.write_text(json.dumps({**stated, "do_rescale": False}))  # made for bytes
    batch = torch.rand(1, 3, 8, 8)
    expected = (batch * 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    torch.testing.assert_close(make(tmp_path / "odd").condition(batch), expected)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("sam", {"summary": True}, "no summary, only a map; set `summary: false`"),
        ("sam3", {"summary": True}, "summary_weight: 0"),
        ("sam3", {"size": 224}, "runs at 112 pixels only, not at 224"),
        ("dinov3", {"size": 100}, "not a multiple of 16 pixels.*nearest is 96"),
        ("dinov3", {"dtype": "bf16"}, "bfloat16"),
        ("dinov3", {"sumary": False}, "did you mean 'summary'"),
    ],
)
def test_refuses_keys(name: str, keys: dict[str, Any], message: str, stored: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        make(stored(name), **keys)


def test_refuses_images_of_other_sizes(stored: Any) -> None:
    with pytest.raises(ConfigError, match="112x112 only"):
        make(stored("sam3"))(torch.rand(1, 3, 224, 224))
    with pytest.raises(ConfigError, match="nearest legal size is 64x96"):
        make(stored("dinov3"))(torch.rand(1, 3, 66, 100))


def broken(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    for file, content in changes.items():
        path = next(path for path in to.iterdir() if path.name.startswith(file))
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "holds no weights. Put model.safetensors or pytorch_model.bin into"),
        ({"model": b"not safetensors"}, "cannot be read as DINOv3ViTModel"),
        ({"config": None}, "holds no config.json"),
        ({"config": b"{"}, "not JSON"),
        ({"preprocessor": None}, "never guessed"),
        ({"preprocessor": b'{"image_mean": [1]}'}, "image_mean"),
    ],
)
def test_refuses_broken_folders(changes: dict[str, Any], message: str, stored: Any, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=message):
        make(broken(stored("dinov3"), tmp_path / "broken", **changes))


def test_refuses_weights_of_another_model(stored: Any, tmp_path: Path) -> None:
    folder = broken(stored("dinov3"), tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    gone = next(key for key in state if "layer.1" in key)
    save_file({key: value for key, value in state.items() if key != gone}, folder / "model.safetensors")
    with pytest.raises(AssetError, match="1 tensors of DINOv3ViTModel are missing"):
        make(folder)
    shutil.copy(stored("siglip") / "model.safetensors", folder)
    with pytest.raises(AssetError, match=r"the weights do not fit its config\.json"):
        make(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    shutil.copy(stored("dinov3") / "model.safetensors", folder)
    with pytest.raises(AssetError, match="cannot be read"):
        make(folder)


def test_layer_scales_of_nvidias_names_are_read(stored: Any, tmp_path: Path) -> None:
    state = load_file(stored("radio") / "model.safetensors")
    scales = {key: torch.rand_like(value) for key, value in state.items() if "lambda1" in key}
    assert len(scales) == 4
    found = []
    for name, ours in (("own", ".layer_scale{}.lambda1"), ("nvidia", ".ls{}.grandma")):
        folder = broken(stored("radio"), tmp_path / name)
        renamed = {key.replace(f".layer_scale{n}.lambda1", ours.format(n)): v for key, v in scales.items() for n in "12"
                   if f"scale{n}" in key}  # fmt: skip
        kept = {key: value for key, value in state.items() if key not in scales}
        save_file({**kept, **renamed}, folder / "model.safetensors", metadata={"format": "pt"})
        found.append(make(folder)(images("radio")))
    assert torch.equal(found[0].spatial, found[1].spatial) and torch.equal(found[0].summary, found[1].summary)
    assert not torch.allclose(found[0].spatial, make(stored("radio"))(images("radio")).spatial, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dinov2", "encoder.layer.2.norm1.weight"),
        ("dinov3", "layer.9.layer_scale1.lambda1"),
        ("siglip_whole", "vision_model.encoder.layers.0.gate"),
        ("radio", "radio_model.model.blocks.0.mlp.norm.weight"),
        ("generic_vit", "encoder.layer.0.gate"),
    ],
)
def test_tensors_without_a_place_in_the_network_are_refused(name: str, key: str, stored: Any, tmp_path: Path) -> None:
    folder = broken(stored(name), tmp_path / "more")
    state = load_file(folder / "model.safetensors")
    outside = {"classifier.weight": torch.ones(2), "decoder.layer.0.weight": torch.ones(2)}
    save_file({**state, **outside}, folder / "model.safetensors", metadata={"format": "pt"})
    expected = make(stored(name))(images(name))
    assert torch.equal(make(folder)(images(name)).spatial, expected.spatial)  # other parts of a checkpoint are not read
    save_file({**state, key: torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"1 tensors have no place in .*; without them the features are wrong"):
        make(folder)


@pytest.mark.parametrize("side", [32, 64, 512])
def test_layout_of_a_map_is_measured(side: int) -> None:
    config = {"model_type": "sam2_hiera_det_model", **tiny.HIERA, "image_size": [side, side]}
    family = _families.family_of(config, "test")
    assert (family.channels_last, family.spatial, family.patch) == (True, 64, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (YOLOS, "101 tokens besides the patches"),
        ({"architecture": "vit_base_patch16_224"}, "kind: timm"),
        ({"model_type": "dinov3_vitt"}, "did you mean 'dinov3_vit'"),
        ({"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, "images alone"),
        ({"model_type": "llava"}, "more than a vision encoder"),
    ],
)
def test_refuses_models_other_than_vision_encoders(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        make(tmp_path)


def test_a_processor_of_another_model(stored: Any, tmp_path: Path) -> None:
    folder = broken(
        stored("sam3"),
        tmp_path / "broken",
        preprocessor=json.dumps({**tiny.HALF, "size": {"height": 126, "width": 126}}).encode(),
    )
    with pytest.raises(ConfigError, match="runs at 112 only"):
        make(folder)


def test_refuses_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder that exists nor OWNER/NAME"):
        make(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file"):
        make(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="transformers: no folder"):
        make(f"local-dir:{tmp_path / 'nowhere'}")


class _Response:
    """The attributes of an HTTP response that the hub's errors read."""

    headers: dict[str, str] = {}
    request = None
    status_code = 403
    text = ""


def _hub_raises(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def refuse(*_: Any, **__: Any) -> None:
        try:
            raised = kind("no", response=_Response())
        except TypeError:
            raised = kind("no")
        raise raised

    monkeypatch.setattr(hub, "hf_hub_download", refuse)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            "GatedRepoError",
            AssetError,
            "facebook/sam3: .* is gated: accept its licence on http.*/facebook/sam3, then .*HF_TOKEN",
        ),
        ("RepositoryNotFoundError", ConfigError, "facebook/sam3: no such repository on the hub.*HF_TOKEN"),
        ("RevisionNotFoundError", ConfigError, "no revision 'v9'"),
        ("LocalEntryNotFoundError", AssetError, "hf download facebook/sam3 --local-dir FOLDER.*`model: FOLDER`"),
        ("EntryNotFoundError", AssetError, "holds no config.json"),
    ],
)
def test_hub_errors(error: str, kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_raises(monkeypatch, error)
    with pytest.raises(kind, match=message):
        make("facebook/sam3", revision="v9")


def test_misspelt_name_suggests_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_raises(monkeypatch, "RepositoryNotFoundError")
    with pytest.raises(ConfigError, match="did you mean 'google/siglip2-giant-opt-patch16-384'"):
        make("google/siglip2-giant-opt-patch16-385")


def test_unknown_name_gets_advice_and_three_suggestions(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub_raises(monkeypatch, "RepositoryNotFoundError")
    with pytest.raises(ConfigError) as caught:
        make("a/nothere")
    advice, _, names = str(caught.value).partition("; the nearest known names: ")
    assert advice.endswith("If it is private, set the environment variable HF_TOKEN (or run `hf auth login`)")
    assert len(names.split(", ")) == 3 and set(names.split(", ")) <= set(PUBLISHED)
    with pytest.raises(ConfigError, match="did you mean 'facebook/sam3'"):
        make("facebook/sam33")


def test_repository_without_weights(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is requested at the commit of the first."""
    from huggingface_hub import errors

    requested = []
    snapshot = stored("dinov3").parent / "snapshots" / "abc123"
    snapshot.mkdir(parents=True, exist_ok=True)

    def download(repo: str, file: str, revision: str | None = None) -> str:
        requested.append((file, revision))
        if file not in ("config.json", "preprocessor_config.json"):
            raise errors.EntryNotFoundError("no")
        return str(shutil.copy(stored("dinov3") / file, snapshot))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(AssetError, match="someone/encoder holds no weights"):
        make("someone/encoder")
    assert requested[0] == ("config.json", None)
    assert {revision for _, revision in requested[1:]} == {"abc123"}


def test_offline_errors_say_what_to_do() -> None:
    with pytest.raises(AssetError, match=r"HF_HUB_OFFLINE is set.*weights: random"):
        make("someone/encoder-that-is-nowhere")
    with pytest.raises(AssetError, match=r"gated: accept its licence on http\S+/facebook/sam3 first, and set HF_TOKEN"):
        make("facebook/sam3")
    with pytest.raises(AssetError, match=r"facebok/sam3 \(did you mean 'facebook/sam3'\?\)"):
        make("facebok/sam3")
    for name in PUBLISHED:
        spec_of({"kind": "transformers", "model": name})  # known without a network


# --- text -------------------------------------------------------------------------------------------------------------


def text_tower(folder: Path, width: int, *, tokenizer: bool = True) -> dict[str, Any]:
    """A folder in the hub's layout of SigLIP, with a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir()
    words = ["<pad>", "<eos>", "<unk>", "a", "dog", "cat"]
    if tokenizer:
        table = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        made = tokenizers.Tokenizer(table)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))
    sizes = {**tiny.TEXT, "hidden_size": width, "vocab_size": len(words), "projection_size": width}
    model = T.SiglipTextModel(T.SiglipTextConfig(**sizes))
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "text_config": sizes}))
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return {"kind": "siglip2", "repo": str(folder)}


def test_text_uses_the_tower_of_the_recipe(stored: Any, tmp_path: Path) -> None:
    options = text_tower(tmp_path / "text", 32)
    teacher = make(stored("siglip"), text=options)
    both = teacher.encode_text(["a dog", "a cat"])
    assert torch.equal(both, build("text", options).encode(["a dog", "a cat"]))
    assert both.shape == (2, teacher.spec.summary)
    assert not any("tower" in name for name, _ in teacher.named_modules()), (
        "the tower is not a submodule of the teacher"
    )
    with pytest.raises(ConfigError, match="have 16 channels, the summary has 32"):
        make(stored("siglip"), text=text_tower(tmp_path / "narrow", 16)).encode_text(["a dog"])
    with pytest.raises(TypeError, match="text-aligned"):
        make(stored("siglip")).encode_text(["a dog"])
    with pytest.raises(ConfigError, match="siglip2"):
        make(stored("siglip"), text={"kind": "siglip3"})


def test_missing_tokenizer_affects_text_only(stored: Any, tmp_path: Path) -> None:
    teacher = make(stored("siglip"), text=text_tower(tmp_path / "text", 32, tokenizer=False))
    check(teacher, "siglip", stored("siglip"))
    with pytest.raises(AssetError, match=r"tokenizer\.json"):
        teacher.encode_text(["a dog"])
