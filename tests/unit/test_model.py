"""Model: inputs of any size, heads, saving and loading; timm students."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agglo.model.model import HeadConfig, Model
from agglo.students.timm import Timm
from agglo.types import AssetError, ConfigError, Output

STUDENT = {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8, "registers": 3}
HEADS = {
    "a": HeadConfig({"kind": "mlp", "hidden": 16}, {"kind": "mlp", "hidden": 16}, 10, 6, slot=0),
    "edges": HeadConfig(None, {"kind": "mlp", "hidden": 16}, None, 9, slot=1),
    "c": HeadConfig({"kind": "mlp", "hidden": 16}, None, 7, None, slot=2),
}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(STUDENT, HEADS, preferred_size=64).eval()


@torch.inference_mode()
def test_output_holds_the_backbone_and_every_head(model: Model) -> None:
    out = model(torch.rand(2, 3, 48, 64))
    assert isinstance(out, Output)
    assert out.summary.shape == (2, 64)  # the class tokens of the two teachers that have a summary
    assert out.spatial.shape == (2, 32, 3, 4)
    assert out.tokens().shape == (2, 12, 32)
    assert torch.equal(out.tokens()[:, 5], out.spatial[:, :, 1, 1])
    assert out.heads["a"].summary.shape == (2, 10)
    assert out.heads["a"].spatial.shape == (2, 6, 3, 4)
    assert out.heads["edges"].summary is None
    assert out.heads["c"].spatial is None
    assert model.spec.summary == 64
    assert list(model(torch.rand(1, 3, 32, 32), heads=["c"]).heads) == ["c"]
    assert not model(torch.rand(1, 3, 32, 32), heads=()).heads


@torch.inference_mode()
def test_each_summary_head_reads_its_own_class_token(model: Model) -> None:
    images = torch.rand(1, 3, 32, 32)
    tokens = model.encode(model.prepare(images)).summary.view(3, 32)
    out = model(images)
    torch.testing.assert_close(out.heads["c"].summary[0], model.heads["c"].summary(tokens[2]))
    torch.testing.assert_close(out.summary[0], torch.cat([tokens[0], tokens[2]]))


@torch.inference_mode()
@pytest.mark.parametrize("size", [(1, 1), (7, 200), (33, 31), (64, 64), (250, 130)])
def test_any_size_goes_in(model: Model, size: tuple[int, int]) -> None:
    small = pytest.warns(UserWarning, match="below one patch") if min(size) < 16 else contextlib.nullcontext()
    with small:
        out = model(torch.rand(1, 3, *size))
    assert out.spatial.shape[-2:] == tuple(max(1, round(side / 16)) for side in size)
    assert torch.isfinite(out.summary).all()


def test_without_resizing_an_illegal_size_is_named(model: Model) -> None:
    with pytest.raises(ValueError, match=r"32\D.*48"):
        model(torch.rand(1, 3, 40, 32), resize=False)


def test_unknown_head_and_missing_text_are_refused_with_options(model: Model) -> None:
    with pytest.raises(KeyError, match="edges"):
        model(torch.rand(1, 3, 32, 32), heads=["edgs"])
    with pytest.raises(TypeError, match="text"):
        model.encode_text(["a cat"])


@torch.inference_mode()
def test_a_saved_folder_loads_to_the_same_model(model: Model, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 48, 32)
    expected = model(images)
    loaded = Model.load(model.save(tmp_path / "m"))
    got = loaded(images)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    # Not bit for bit: how a matrix product is split up depends on where the weights lie in memory.
    torch.testing.assert_close(got.summary, expected.summary, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.heads["a"].spatial, expected.heads["a"].spatial, rtol=1e-5, atol=1e-6)
    assert loaded.preferred_size == 64
    assert not loaded.training
    assert (tmp_path / "m" / "README.md").read_text().startswith("---")
    half = Model.load(model.save(tmp_path / "half", dtype=torch.float16))
    assert half(images).summary.dtype == torch.float32
    similarity = torch.cosine_similarity(half(images).summary, expected.summary).min()
    assert similarity > 0.9999
    small, large = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("half", "m"))
    assert small < 0.6 * large


def test_damaged_folders_are_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        Model.load(tmp_path / "nowhere")
    folder = model.save(tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AssetError, match=r"truncated|damaged"):
        Model.load(folder)
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for broken, message in [
        (config | {"format": 99}, "upgrade"),
        (config | {"student": config["student"] | {"kind": "os.system"}}, "no kind"),
        (config | {"student": config["student"] | {"widht": 1}}, "did you mean 'width'"),
    ]:
        (folder / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=message):
            Model.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"student": config["student"] | {"depth": 3}}))
    with pytest.raises(AssetError, match=r"another architecture|missing"):
        Model.load(folder)


@pytest.mark.parametrize(
    ("model", "stages"),
    [("test_vit", (1,)), ("test_convnext", (2, 3)), ("resnet18", (2,)), ("vit_tiny_patch16_224", (5, 11))],
)
def test_any_timm_backbone_is_a_student(model: str, stages: tuple[int, ...]) -> None:
    student = Timm(model=model, stages=stages).eval()
    side = student.spec.step * 3
    with torch.inference_mode():
        out = student(torch.rand(2, 3, side, 2 * student.spec.step))
    assert out.summary.shape == (2, student.spec.summary)
    cells = (side // student.spec.stride, 2 * student.spec.step // student.spec.stride)
    assert out.spatial.shape == (2, student.spec.spatial, *cells)


def test_stages_default_to_what_the_architecture_has() -> None:
    assert Timm(model="resnet18").stages == (3,)
    assert Timm(model="test_vit").stages == (5,)  # the last block, not the fourth


@pytest.mark.weights
@pytest.mark.parametrize("model", ["mobileone_s0", "fastvit_t8"])
def test_training_works_with_strided_pointwise_convolutions_of_the_image(model: str) -> None:
    """In a subprocess, so that a crash of the interpreter fails this test only."""
    code = f"""
import torch
from agglo.students.timm import Timm
student = Timm(model={model!r})
for _ in range(4):
    student(torch.rand(4, 3, 64, 64)).spatial.square().mean().backward()
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_relative_windows_accept_multiples_of_the_nominal_size() -> None:
    student = Timm(model="maxvit_nano_rw_256")
    assert (student.spec.step, student.spec.stride) == (256, 16)
    with pytest.raises(ValueError, match="nearest legal height: 256"):
        student(torch.zeros(1, 3, 224, 256))


def test_unusable_backbones_are_refused_at_construction() -> None:
    for model, own in (("hiera_tiny_224", 224), ("coat_lite_tiny", 224), ("levit_128s", 224)):
        with pytest.raises(
            ConfigError, match=rf"cannot be a student.*{own}x{own} px only, but a student needs several"
        ):
            Timm(model=model)
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        Timm(model="resnett18")
    with pytest.raises(ConfigError, match="stages 0 to"):
        Timm(model="resnet18", stages=(9,))
