"""A loaded model is for inference: no gradients, the fastest precision on request; it can be trained when asked."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import agglo
from agglo.model.model import HeadConfig, Model
from agglo.types import ConfigError
from agglo.zoo.info import describe
from agglo.zoo.loading import fastest_dtype

STUDENT = {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    head = HeadConfig({"kind": "mlp", "hidden": 8}, {"kind": "mlp", "hidden": 8}, 5, 6)
    return Model(STUDENT, {"one": head}, preferred_size=64).save(tmp_path / "saved")


@pytest.mark.parametrize("load", [agglo.load, Model.load])
def test_outputs_of_a_loaded_model_convert_to_numpy(load: Callable[..., Model], folder: Path) -> None:
    model = load(folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = torch.rand(2, 3, 64, 64)
    out = model(images)
    assert out.summary.numpy().shape == (2, 32)
    assert out.heads["one"].spatial.numpy().shape == (2, 6, 4, 4)
    assert model.intermediates(images, 1)[0].spatial.numpy().shape == (2, 32, 4, 4)
    assert model([images[0]])[0].summary.numpy().shape == (1, 32)


@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_imported_models_have_no_gradients(layout: str, folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="omitted"):
        agglo.export(folder, layout, tmp_path / layout)
    assert agglo.load(tmp_path / layout)(torch.rand(1, 3, 64, 64)).summary.numpy().shape == (1, 32)


def test_loaded_model_can_be_fine_tuned(folder: Path) -> None:
    model = agglo.load(folder).requires_grad_(True).train()
    model(torch.rand(1, 3, 64, 64)).heads["one"].summary.sum().backward()
    assert model.student.blocks[0].attn.qkv.weight.grad is not None


def test_gradients_reach_the_images_of_a_loaded_model(folder: Path) -> None:
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    agglo.load(folder)(images).summary.sum().backward()
    assert images.grad is not None


def test_new_models_have_gradients() -> None:
    model = Model(STUDENT, {})
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(torch.rand(1, 3, 64, 64)).summary.requires_grad


def test_embeddings_of_a_trainable_model_have_no_gradients() -> None:
    model = agglo.load("agglo-lite", heads="text").requires_grad_(True)
    images = model.encode_image(torch.rand(1, 3, 64, 64))
    assert not images.requires_grad
    assert not images.is_inference()  # a probe may be trained on them
    assert (model.encode_text(["a cup"]) @ images.T).numpy().shape == (1, 1)


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        ({}, torch.float32),
        ({"_is_amx_tile_supported"}, torch.bfloat16),
        ({"_is_avx512_bf16_supported"}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_has_it(
    native: set[str], expected: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in native, raising=False)
    assert fastest_dtype("cpu") == expected
    model = agglo.load(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    whole = agglo.load(folder)(torch.full((1, 3, 64, 64), 0.3)).summary
    found = model(torch.full((1, 3, 64, 64), 0.3)).summary
    assert found.dtype == expected
    assert float(torch.cosine_similarity(found.float(), whole)) > 0.999


@pytest.mark.parametrize("native", [True, False])
def test_auto_needs_bfloat16_without_emulation_on_a_gpu(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert fastest_dtype("cuda") == (torch.bfloat16 if native else torch.float32)
    assert asked == [False]


def test_unknown_precisions_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="must be auto, float32, bfloat16 or float16, got int8"):
        agglo.load(folder, dtype="int8")


def test_flops_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    model = Model(STUDENT, {}, tokens=("a",))
    model.save(tmp_path / "agglo")
    for layout in ("transformers", "timm"):
        agglo.export(model, layout, tmp_path / layout)
    infos = [describe(tmp_path / layout, size=128) for layout in ("agglo", "transformers", "timm")]
    tokens, width = 64 + 5, 32
    # 2 FLOPs a weight and token, and attention's two products: 4 n^2 C a block.
    expected = 2 * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width) + 2 * 768 * width * 64
    assert [info.flops for info in infos] == [expected] * 3
    assert len({info.memory for info in infos}) == 1


def test_flops_of_timm_students_count_attention(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    Model({"kind": "timm", "model": "vit_tiny_patch16_224"}, {}, tokens=("a",)).save(tmp_path / "timm")
    tokens, width = 17, 192
    blocks = 12 * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)
    assert describe(tmp_path / "timm", size=64).flops == pytest.approx(blocks + 2 * 768 * width * 16, rel=1e-3)
