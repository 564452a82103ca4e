"""timm's kinds of maps, trunks, sizes and summaries as teachers; ``benchmarks/teachers_timm.py`` runs every module."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agglo.config import build
from agglo.types import AssetError, ConfigError

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.libraries

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAGES = {"depths": [1, 1, 1, 1], "embed_dim": 24, "num_heads": [1, 1, 1, 1]}
PLAIN = {"embed_dim": 48, "depth": 2, "num_heads": 2}

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", STAGES),  # channels last inside
    "hiera": ("hiera_tiny_224", {"embed_dim": 24, "num_heads": 1, "stages": [1, 1, 1, 1]}),  # stops early
    "hieradet": ("sam2_hiera_tiny", {"embed_dim": 24}),
    "naflex": ("naflexvit_base_patch16_gap", PLAIN),  # `embeds` instead of `patch_embed`
    "dinov3": ("vit_small_patch16_dinov3", PLAIN),
    "eupe": ("vit_small_patch16_dinov3_qkvb", PLAIN),
    "dinov2": ("vit_small_patch14_dinov2", PLAIN),
    "eva02": ("eva02_tiny_patch14_224", PLAIN),
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of this distribution")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import teachers_timm

    return teachers_timm


def stored(name: str, folder: Path, **changes: Any) -> str:
    """A folder as timm saves it, without weights."""
    architecture, arguments = SMALL[name]
    classes = changes.pop("num_classes", 0)
    config = {"architecture": architecture, "num_classes": classes, "model_args": {**arguments, **changes}}
    config["pretrained_cfg"] = {}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def make(model: str, **keys: Any) -> Any:
    return build("teachers", {"kind": "timm", "model": model, "weights": "random", **keys})


def images(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["swin", "hiera", "hieradet", "naflex", "dinov3", "dinov2"])
def test_maps_agree_with_the_image(name: str, bench: Any, tmp_path: Path) -> None:
    row = bench.check(stored(name, tmp_path / name))
    assert row["faults"] == []


@pytest.mark.parametrize(
    ("name", "step", "canvas"),
    [("lambda_resnet26t", 32, None), ("mobilevitv2_050", 32, None), ("test_maxvit", 160, 160), ("test_vit", 16, None)],
)
def test_legal_sizes_are_measured(name: str, step: int, canvas: int | None, bench: Any) -> None:
    row = bench.check(name)
    assert (row["spec"][2:], row["canvas"], row["faults"]) == ([16, step], canvas, [])


@pytest.mark.parametrize(
    "fault",
    [lambda spatial: spatial.mT, lambda spatial: spatial.flip(3), lambda spatial: spatial.flip(2)],
    ids=["transposed", "mirrored", "upside_down"],
)
def test_maps_at_the_wrong_place_are_detected(fault: Any, bench: Any, tmp_path: Path) -> None:
    teacher = make(stored("dinov2", tmp_path / "dinov2"))
    forward = teacher.backbone.net.forward_intermediates

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = forward(*arguments, **options)
        if options.get("intermediates_only"):
            return [fault(each) for each in found]
        return found[0], [fault(each) for each in found[1]]

    teacher.backbone.net.forward_intermediates = wrong
    side = 6 * teacher.spec.stride
    assert any("change cell" in each for each in bench.check_size(teacher, (side, side)))


def test_models_without_maps_of_their_stride_are_refused(bench: Any) -> None:
    assert "no map of stride 16" in bench.check("inception_v4")["refused"]
    with pytest.raises(ConfigError, match=r"fails at 256x256 pixels \(normalization of features not supported\)"):
        make("hieradet_small", norm=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes", "is_class"),
    [
        ("dinov2", {}, True),
        ("dinov3", {}, True),
        ("eupe", {}, True),
        ("dinov3", {"num_classes": 5}, False),  # a classifier keeps the pooling that it was trained with
        ("eva02", {}, False),
    ],
)
def test_summary_is_the_class_token_as_upstream(
    name: str, changes: dict[str, Any], is_class: bool, tmp_path: Path
) -> None:
    teacher = make(stored(name, tmp_path / name, **changes))
    side = 4 * teacher.spec.step
    net = teacher.backbone.net
    tokens = net.forward_features(teacher.backbone.condition(images(side, side)))
    prefix = net.num_prefix_tokens
    first, mean = tokens[:, 0], tokens[:, prefix:].mean(1)
    expected = first if is_class else net.fc_norm(mean)
    torch.testing.assert_close(teacher(images(side, side)).summary, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, mean, atol=1e-2)


def test_naflexvit_sees_as_many_tokens_as_the_student(tmp_path: Path) -> None:
    teacher = make(stored("naflex", tmp_path / "naflex"))
    assert teacher.patch == 16 and teacher.input_size((96, 128), 8) == (192, 256)


def test_stages_after_an_early_stop_are_computed(tmp_path: Path) -> None:
    teacher = make(stored("hiera", tmp_path / "hiera"), stage=0)
    calls: list[int] = []
    teacher.backbone.net.blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    out = teacher(images(224, 224))
    assert calls and out.summary.shape == (2, 192) and out.spatial.shape == (2, 24, 56, 56)


@pytest.mark.parametrize("stated", [{"mean": [0.5]}, {"mean": 0.5}, {"std": [0, 1, 1]}])
def test_pixels_of_a_folder_are_three_numbers(stated: dict[str, Any], tmp_path: Path) -> None:
    folder = stored("dinov2", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, **stated}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssetError, match=r"needs three numbers in its config\.json"):
        make(folder)


def test_pixels_of_a_folder_are_not_guessed(tmp_path: Path) -> None:
    """timm takes ImageNet's where config.json states none."""
    folder = stored("dinov2", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"")
    with pytest.raises(AssetError, match="has no mean and std: add those of its training"):
        build("teachers", {"kind": "timm", "model": folder})
