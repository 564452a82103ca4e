"""What `agglo info` tells: published releases without a download, our own, and official files by their headers."""

from pathlib import Path

import pytest
import torch

from agglo.info import describe
from agglo.model import HeadConfig, Model
from agglo.releases import HUB
from agglo.types import ConfigError


@pytest.mark.parametrize("name", list(HUB))
def test_every_release_is_described_without_its_weights(name: str) -> None:
    info = describe(name, size=HUB[name].patch * 4)
    assert info.params[0] / 1e6 == pytest.approx(HUB[name].params, rel=0.02)
    assert info.licence == HUB[name].licence
    assert set(info.heads) == set(HUB[name].teachers)
    assert info.stride == HUB[name].patch
    assert info.flops > 0


def test_the_facts_of_c_radio_v4() -> None:
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


def test_windows_cost_less() -> None:
    whole, windowed = (describe("c-radio_v4-so400m", size=1024, window=w) for w in (None, 8))
    assert windowed.flops < 0.8 * whole.flops
    assert windowed.step == 128


def test_a_saved_model(tmp_path: Path) -> None:
    head = HeadConfig({"kind": "mlp", "hidden": 8}, {"kind": "mlp", "hidden": 8, "upsample": 2}, 5, 6,
                      text={"kind": "minilm"})  # fmt: skip
    student = {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8}
    model = Model(student, {"one": head}, preferred_size=64, provenance={"license": "MIT"})
    info = describe(model.save(tmp_path / "mine"), size=(32, 48))
    assert (info.licence, info.size, info.preferred) == ("MIT", (32, 48), 64)
    assert info.heads == {"one": (5, 6, 2)}
    assert info.text == ("one",)
    assert sum(info.params) == sum(p.numel() for p in model.parameters())


def test_what_cannot_be_described() -> None:
    with pytest.raises(ConfigError, match="did you mean 'c-radio_v4-h'"):
        describe("c-radio_v4-hh")
    with pytest.raises(ConfigError, match="hybrid student cannot look through windows"):
        describe("e-radio_v2", size=64, window=4)


def test_counting_leaves_nothing_behind() -> None:
    before = torch.is_grad_enabled()
    describe("c-radio_v3-b", size=64)
    assert torch.is_grad_enabled() == before
    assert torch.ones(1).device.type == "cpu"
