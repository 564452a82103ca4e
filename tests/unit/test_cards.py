"""The usage code of every card runs as written, in every precision that can be written."""

import re
import runpy
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import agglo
from agglo.model.model import Model
from agglo.zoo import loading as zoo
from agglo.zoo.releases import RELEASED

pytestmark = pytest.mark.weights

PRECISIONS = ("float32", "bfloat16", "float16")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    student = {"kind": "vit", "width": 48, "depth": 2, "heads": 4, "patch": 8, "max_grid": 6, "registers": 7}
    return Model(student, {}, tokens=("a", "b", "c"), summary_slots=[0, 1], preferred_size=48).eval()


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """Run the code of a card from the folder that holds the model's, and return its variables."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 1
    monkeypatch.chdir(folder.parent)
    (folder.parent / "snippet.py").write_text(code[0], encoding="utf-8")
    return runpy.run_path("snippet.py", init_globals=given)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_card_of_a_saved_model_runs(model: Model, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_card(model.save(tmp_path / "mine", dtype=getattr(torch, dtype)), monkeypatch)
    assert isinstance(found["model"], Model)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_card_of_an_export_runs(
    model: Model, image: Image.Image, layout: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(layout)
    agglo.export(model, layout, tmp_path / layout, dtype=dtype)
    found = run_card(tmp_path / layout, monkeypatch, image=image)
    summary = found["summary"] if layout == "timm" else found["out"].summary
    features = found["features"] if layout == "timm" else found["out"].features
    assert tuple(summary.shape) == (1, 96)
    assert tuple(features.shape) == (1, 36, 48)
    assert torch.isfinite(summary).all()


@pytest.mark.parametrize("name", [name for name, model in RELEASED.items() if model.bundled])
def test_card_of_a_released_model_runs(
    name: str, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    image.save(tmp_path / "photo.jpg")
    (folder / "README.md").write_text((RELEASED[name].folder / "README.md").read_text(encoding="utf-8"))
    found = run_card(folder, monkeypatch)
    assert found["output"].summary.numpy().shape == (1, found["model"].spec.summary)


@pytest.mark.parametrize("saved", [False, True])
def test_card_of_a_pushed_model_names_its_repository(
    model: Model, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards: list[str] = []

    def upload(*, repo_id: str, folder_path: str, commit_message: str) -> str:
        assert Model.load(folder_path).spec == model.spec
        cards.append((Path(folder_path) / "README.md").read_text(encoding="utf-8"))
        return repo_id

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **options: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    folder = model.save(tmp_path / "run" / "model")
    before = (folder / "README.md").read_text(encoding="utf-8")
    zoo.push(folder if saved else model, "me/student")
    assert 'agglo.load("me/student")' in cards[0]
    assert (folder / "README.md").read_text(encoding="utf-8") == before
