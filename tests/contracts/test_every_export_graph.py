"""Every runtime computes what the exported model computes: sizes, heads, windows, lists; bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import agglo
from agglo.config import build, kinds
from agglo.exports import _graph
from agglo.model.model import Model
from agglo.types import AssetError, ConfigError, StorageError
from support.parity import LIMIT, error, randomize

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
for package in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason="the extra export is not installed")

pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore:images exceed the")]

KINDS = kinds("runtimes", installed=False)
MLP = {"kind": "mlp", "hidden": 24}
HEADS = {
    "a": {"summary": MLP, "spatial": MLP, "summary_width": 20, "spatial_width": 12, "slot": 0},
    "b": {"summary": None, "spatial": MLP, "summary_width": None, "spatial_width": 10, "slot": 0},
}
STUDENTS: dict[str, dict[str, Any]] = {
    "vit": {"kind": "vit", "width": 32, "depth": 3, "heads": 4, "patch": 8, "max_grid": 6, "registers": 3},
    "windows": {"kind": "vit", "width": 32, "depth": 5, "heads": 4, "patch": 8, "max_grid": 6, "window": 2},
    "timm": {"kind": "timm", "model": "tf_efficientnet_lite0", "stages": [1, 2], "stride": 8},
}


def model(student: str) -> Model:
    from agglo.model.heads import HeadConfig

    torch.manual_seed(0)
    made = Model(
        STUDENTS[student], {n: HeadConfig(**h) for n, h in HEADS.items()}, tokens=("a", "b"), preferred_size=64
    )
    if student != "timm":
        randomize(made)
    return made.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[str, str], tuple[Model, Path]] = {}

    def get(kind: str, student: str) -> tuple[Model, Path]:
        if (kind, student) not in made:
            original = model(student)
            folder = tmp_path_factory.mktemp("export") / f"{kind}-{student}"
            made[kind, student] = original, agglo.export(original, kind, folder)
        return made[kind, student]

    return get


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_runtime_gives_the_models_features_at_any_size(kind: str, student: str, exported) -> None:
    original, folder = exported(kind, student)
    loaded = agglo.load(folder)
    assert isinstance(loaded, Model) and loaded.spec == original.spec and loaded.step() == original.step()
    step = original.step()
    for batch, rows, columns in ((1, 2, 7), (4, 5, 3), (2, 6, 6)):
        images = torch.rand(batch, 3, rows * step, columns * step)
        with torch.no_grad():
            expected, found = _graph.flat(original(images)), _graph.flat(loaded(images))
        assert found.keys() == expected.keys() and len(found) == 5
        for name, tensor in expected.items():
            assert error(found[name], tensor) < 10 * LIMIT, name


@pytest.mark.parametrize("kind", KINDS)
def test_lists_clips_and_chosen_heads_work_as_with_the_model(kind: str, exported) -> None:
    original, folder = exported(kind, "vit")
    loaded = agglo.load(folder, heads=["b"])
    images = [torch.rand(3, 40, 48), torch.rand(3, 64, 32), torch.rand(3, 40, 48)]
    with torch.no_grad():
        for one, other in zip(original(images, heads=["b"]), loaded(images), strict=True):
            assert error(other.spatial, one.spatial) < 10 * LIMIT and list(other.heads) == ["b"]
            assert error(other.heads["b"].spatial, one.heads["b"].spatial) < 10 * LIMIT
        clips = torch.rand(2, 3, 3, 32, 40)
        assert error(loaded(clips).summary, original(clips).summary) < 10 * LIMIT
    with pytest.raises(KeyError, match="no head 'a'"):
        loaded(images, heads=["a"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_states_facts_and_the_comparison(kind: str, exported) -> None:
    _, folder = exported(kind, "vit")
    facts, report = (json.loads((folder / name).read_text()) for name in ("export.json", "verification.json"))
    assert facts["input"]["multiple"] == 8 and facts["outputs"][:2] == ["summary", "spatial"]
    assert {"license", "mean", "std", "config", "versions"} <= facts.keys()
    assert len({(row["height"], row["width"]) for row in report["sizes"]}) >= 6
    assert all(row["outputs"].keys() == set(facts["outputs"]) for row in report["sizes"])
    assert not list(folder.parent.glob(".*"))


def test_an_embedding_command_runs_on_an_exported_folder(exported, tmp_path: Path) -> None:
    from agglo.embedding import embed

    original, folder = exported("onnx", "vit")
    images = [torch.rand(3, 50, 70) for _ in range(3)]
    torch.testing.assert_close(
        torch.from_numpy(embed(images, folder).summary),
        torch.from_numpy(embed(images, original).summary),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_another_window_or_device_is_refused(exported) -> None:
    _, folder = exported("onnx", "windows")
    with pytest.raises(ConfigError, match="exported with window=2"):
        agglo.load(folder)(torch.rand(1, 3, 48, 48), window=3)
    with pytest.raises(ConfigError, match="dtype='float32'"):
        agglo.load(folder, dtype="bfloat16")
    with pytest.raises(TypeError, match="exported graph"):
        agglo.load(folder).intermediates(torch.rand(1, 3, 48, 48), 1)


def test_a_damaged_or_newer_folder_is_refused(tmp_path: Path) -> None:
    folder = agglo.export(model("vit"), "onnx", tmp_path / "e", heads=[])
    facts = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(ConfigError, match="has format 99, not 1: export the model again"):
        agglo.load(folder)
    (folder / "export.json").write_text(json.dumps(facts))
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(AssetError, match="export the model again"):
        agglo.load(folder)


def test_a_graph_that_differs_from_its_model_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = agglo.export(model("vit"), "onnx", tmp_path / "e", heads=[])
    before = (kept / "export.json").read_text()
    monkeypatch.setattr(_graph, "COSINE", 1.1)
    with pytest.raises(ConfigError, match="differs from the model's at"):
        agglo.export(model("vit"), "onnx", kept, heads=["a"])
    assert (kept / "export.json").read_text() == before and [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_full_disk_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    kept = agglo.export(model("vit"), "onnx", tmp_path / "e", heads=[])
    before = (kept / "export.json").read_text()
    monkeypatch.setattr(_graph, "write_json", full)
    with pytest.raises(StorageError, match="free some space"):
        agglo.export(model("vit"), "onnx", kept)
    assert (kept / "export.json").read_text() == before and [p.name for p in tmp_path.iterdir()] == ["e"]


def test_a_foreign_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(ConfigError, match="name another folder"):
        agglo.export(model("vit"), "onnx", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "text"


def test_an_operation_without_translation_is_named_with_its_module(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    broken = model("vit")
    broken.student.norm = Odd()
    with pytest.raises(ConfigError, match=r"bessel_j0.*student\.norm"):
        agglo.export(broken, "onnx", tmp_path / "e", heads=[])
    assert not list(tmp_path.iterdir())


def test_unknown_heads_and_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no head 'c'"):
        agglo.export(model("vit"), "onnx", tmp_path / "e", heads=["c"])
    with pytest.raises(ConfigError, match="no windowed attention"):
        build("exports", {"kind": "onnx", "window": 2}).write(model("timm"), tmp_path / "e")
