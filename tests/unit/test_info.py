"""`agglo info`: published releases without a download, our own models, and official files by their headers."""

import argparse
import io
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console

from agglo import load
from agglo.cli.terminal import info_table
from agglo.model.model import HeadConfig, Model
from agglo.types import ConfigError
from agglo.zoo.info import describe
from agglo.zoo.releases import HUB
from support.checkpoints import ARGS, official_state

pytestmark = pytest.mark.weights


@pytest.mark.parametrize("name", list(HUB))
def test_releases_are_described_without_weights(name: str) -> None:
    info = describe(name, size=HUB[name].patch * 4)
    assert info.params[0] / 1e6 == pytest.approx(HUB[name].params, rel=0.02)
    assert info.licence == HUB[name].licence
    assert set(info.heads) == set(HUB[name].teachers)
    assert info.stride == HUB[name].patch
    assert info.flops > 0


def test_facts_of_c_radio_v4() -> None:
    info = describe("c-radio_v4-h")
    assert (info.summary, info.spatial, info.registers) == ((2560, 2), 1280, 7)
    assert (info.preferred, info.largest, info.step) == (512, 2048, 16)
    # 2 FLOPs a weight and token, and attention's two products: 4 n^2 C a block.
    tokens, width, depth = 32 * 32 + 10, 1280, 32
    blocks = depth * (2 * 12 * width * width * tokens + 4 * tokens * tokens * width)
    patches = 2 * 768 * width * 32 * 32
    assert info.flops == pytest.approx(blocks + patches, rel=1e-3)
    assert info.memory[0] == pytest.approx(4 * 651.64e6, rel=1e-3)
    # An MLP's input, its hidden activations (GELU works in place), and the residual stream: not the attention matrix.
    assert 4 * tokens * (5120 + 2 * width) <= info.memory[1] < 4 * tokens * (3 * 5120)


def test_windows_reduce_the_cost() -> None:
    whole, windowed = (describe("c-radio_v4-so400m", size=1024, window=w) for w in (None, 8))
    assert windowed.flops < 0.8 * whole.flops
    assert windowed.step == 128


def test_saved_model(tmp_path: Path) -> None:
    head = HeadConfig({"kind": "mlp", "hidden": 8}, {"kind": "mlp", "hidden": 8, "upsample": 2}, 5, 6,
                      text={"kind": "minilm"})  # fmt: skip
    student = {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8}
    model = Model(student, {"one": head}, preferred_size=64, provenance={"license": "MIT"})
    info = describe(model.save(tmp_path / "mine"), size=(32, 48))
    assert (info.licence, info.size, info.preferred) == ("MIT", (32, 48), 64)
    assert info.heads == {"one": (5, 6, 2)}
    assert info.text == ("one",)
    assert sum(info.params) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["c-radio_v4-h", "c-radio_v3-b", "radio_v2.5-b", "radio_v2.1"])
def test_text_heads_are_listed_before_the_download(name: str) -> None:
    assert set(describe(name, size=64).text) == {"clip", "siglip", "siglip2-g"} & set(HUB[name].teachers)
    shown = Console(width=200, file=io.StringIO())
    shown.print(info_table(describe(name, size=64)))
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for head in HUB[name].teachers:
        line = next(line for line in lines if line.startswith(f"head {head} "))
        assert (", text" in line) == (head in ("clip", "siglip", "siglip2-g"))


@pytest.mark.parametrize("how", ["cached", "copied", "folder"])
def test_download_is_described_as_loaded(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """radio_v2.1 differs from the defaults in preferred size, licence and windows."""
    entry = HUB["radio_v2.1"]
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    home = cache / "models--nvidia--RADIO"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    folder = home / "snapshots" / "0123456789abcdef0123456789abcdef01234567" if how == "cached" else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": official_state(), "args": argparse.Namespace(**ARGS)}, folder / str(entry.file))
    if how == "folder":
        (tmp_path / "alone").mkdir()
        (tmp_path / str(entry.file)).rename(tmp_path / "alone" / str(entry.file))
    where = {"cached": entry.name, "copied": folder / str(entry.file), "folder": tmp_path / "alone"}[how]
    info, model = describe(where, size=64), load(where, heads="all")
    assert info.params == (sum(p.numel() for p in model.student.parameters()),
                           sum(p.numel() for p in model.heads.parameters()))  # type: ignore[attr-defined]  # fmt: skip
    assert (info.preferred, info.largest, info.licence) == (432, 2048, "NSCLv1, non-commercial")
    assert (info.preferred, info.largest) == (model.preferred_size, model.provenance["max_size"])
    assert info.licence == model.provenance["license"]
    # Five windowed blocks to a global one; of an unknown file's four blocks, none would be windowed.
    assert model.student_config["num_windowed"] == 5
    assert describe(where, size=64, window=2).flops < info.flops


def test_describe_refuses_bad_input() -> None:
    with pytest.raises(ConfigError, match="did you mean 'c-radio_v4-h'"):
        describe("c-radio_v4-hh")
    with pytest.raises(ConfigError, match="hybrid student has no windowed attention"):
        describe("e-radio_v2", size=64, window=4)


def test_cost_releases_its_memory() -> None:
    before = torch.is_grad_enabled()
    describe("c-radio_v3-b", size=64)
    assert torch.is_grad_enabled() == before
    assert torch.ones(1).device.type == "cpu"
