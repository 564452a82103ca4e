"""Files that an eval's keys name: what they hold counts, where they lie does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agglo.cli.main import app
from agglo.config import find, kinds, schema
from agglo.evals.promptable import Promptable
from agglo.evals.sa_co import SaCo
from agglo.harness.measuring import Measured, measure
from agglo.report.page import write_results
from agglo.results.comparing import compare
from agglo.results.identity import protocol_hash, settings
from agglo.results.places import digest
from agglo.results.records import read, read_images
from agglo.types import ConfigError
from support import datasets as tiny
from support.checkpoints import tiny_sam
from support.models import Noise


class Files:
    """Three questions of GQA, answered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truth("blue", "red", "two")
        tiny.picture(folder / "images" / "0.png", 0)

    def truth(self, *answers: str, name: str = "truth.json") -> None:
        text = json.dumps({str(i): {"answer": each} for i, each in enumerate(answers)})
        (self.folder / name).write_text(text)

    def answers(self, *answers: str, name: str = "answers.jsonl") -> None:
        entries = ({"question_id": str(i), "text": each} for i, each in enumerate(answers))
        (self.folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    def measure(self, model: Noise | None = None, out: str = "out", **keys: Any) -> Measured:
        files = {"answers": str(self.folder / "answers.jsonl"), "truth": str(self.folder / "truth.json")}
        source = {"kind": "folder", "path": str(self.folder / "images")}
        entry = {"kind": "vlm", "name": "vlm", "benchmark": "gqa", "source": source, **files, **keys}
        found = measure(model or Noise(), "noise", [entry], self.folder / out, keep_features=False)
        assert not found.failed
        return found


def test_overwritten_answers_are_scored_again(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.answers("blue", "red", "one")
    first = files.measure()
    assert first.results["vlm"].metrics["accuracy"] == pytest.approx(2 / 3)
    assert files.measure().known == ["vlm"]
    files.answers("blue", "red", "two")
    second = files.measure()
    assert second.known == []
    assert second.results["vlm"].metrics["accuracy"] == 1
    assert first.results["vlm"].column == second.results["vlm"].column
    assert len(read(tmp_path / "out")) == 2  # and the first one is still known by what it was made of
    files.answers("blue", "red", "one")
    assert files.measure().results["vlm"] == first.results["vlm"]
    files.truth("blue", "red", "one")
    third = files.measure().results["vlm"]
    assert third.metrics["accuracy"] == 1
    assert third.column != first.results["vlm"].column


def test_answers_of_two_models_are_comparable(tmp_path: Path) -> None:
    class Other(Noise):
        pass

    files = Files(tmp_path)
    files.answers("blue", "red", "one")
    (tmp_path / "elsewhere").mkdir()
    files.answers("blue", "green", "one", name="elsewhere/mine.jsonl")
    files.truth("blue", "red", "two", name="elsewhere/copy.json")
    moved = {
        key: str(tmp_path / "elsewhere" / name) for key, name in (("answers", "mine.jsonl"), ("truth", "copy.json"))
    }
    ours = files.measure(out="a").results["vlm"]
    theirs = files.measure(Other(), "b", **moved).results["vlm"]
    assert str(tmp_path) not in json.dumps(ours.settings)
    found = compare(ours, theirs, read_images(tmp_path / "a", ours), read_images(tmp_path / "b", theirs))
    assert not found.why
    assert found.metrics["accuracy"] == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_two_files_of_answers_are_two_rows_and_comparable(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for name, answers in (("a", ("blue", "red", "two")), ("b", ("blue", "red", "one"))):
        files.answers(*answers, name=f"{name}.jsonl")
        files.measure(answers=str(tmp_path / f"{name}.jsonl"))
    assert files.measure(answers=str(tmp_path / "a.jsonl")).known == ["vlm"]
    rows = [f"noise (answers {digest(tmp_path / f'{name}.jsonl', 'answers')[:6]})" for name in "ab"]
    page, table = write_results([tmp_path / "out"], tmp_path / "page.html")
    assert f"| {rows[0]} | **1.000** |" in table.read_text() and f"| {rows[1]} | 0.667 |" in table.read_text()
    assert all(f"<th>{row}</th>" in page.read_text() for row in rows)
    assert "2 results of 1 model." in page.read_text()

    def compared(a: str, b: str) -> Any:
        return CliRunner().invoke(app, ["compare", a, b, "--json", str(tmp_path / "compared.json"), "--overwrite"])

    out = str(tmp_path / "out")
    assert all(row in compared(out, out).stderr for row in rows)
    assert compared(f"{out}#{rows[0]}", f"{out}#{rows[1]}").exit_code == 0
    entry = json.loads((tmp_path / "compared.json").read_text())
    assert (entry["a"], entry["b"]) == tuple(rows)
    assert entry["evals"][0]["metrics"]["accuracy"] == pytest.approx([1, 2 / 3])


def test_page_of_results_with_data_files(tmp_path: Path) -> None:
    """A file of truth has a hash and no images."""
    files = Files(tmp_path)
    files.answers("blue", "red", "one")
    made = files.measure().results["vlm"]
    page, table = write_results([tmp_path / "out"], tmp_path / "page.html")
    assert made.data["truth"]["hash"] in page.read_text()
    assert "| noise | 0.667 |" in table.read_text()


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path)
    files.answers("blue", "red", "one")
    wanted = files.measure().results["vlm"]
    monkeypatch.setenv("HOME", str(tmp_path))
    found = files.measure(out="own", answers="~/answers.jsonl", truth="~/truth.json").results["vlm"]
    assert (found.metrics, found.column, found.inputs) == (wanted.metrics, wanted.column, wanted.inputs)
    files.measure(answers=None, truth=None, size=16, folder="~/features")
    assert (tmp_path / "features" / "llava.json").is_file()
    (tmp_path / "sam").mkdir()
    (tmp_path / "sam" / "config.json").write_text("{}")
    own, home = (settings({"kind": "promptable", "decoder": f"{root}/sam"}) for root in (tmp_path, "~"))
    assert protocol_hash(own) == protocol_hash(home)
    assert Promptable(decoder="~/sam").decoder == str(tmp_path / "sam")
    concepts = SaCo(annotations=["~/a.json"], images="~/images", decoder="~/sam")
    assert concepts.annotations == (str(tmp_path / "a.json"),)
    assert (concepts.images, concepts.decoder) == (str(tmp_path / "images"), str(tmp_path / "sam"))
    assert SaCo(annotations=["a"], predictions="~/compared.json").predictions == str(tmp_path / "compared.json")


def test_eval_that_writes_files_always_runs(tmp_path: Path) -> None:
    files = Files(tmp_path)
    nothing = {"answers": None, "truth": None, "size": 16}
    for place in ("one", "two"):
        found = files.measure(folder=str(tmp_path / place), **nothing)
        assert found.known == []
        assert (tmp_path / place / "llava.json").is_file()
    assert len(read(tmp_path / "out")) == 1  # the same measurement


def test_weights_are_identified_by_content(tmp_path: Path) -> None:
    pytest.importorskip("transformers")

    def hashed(decoder: str) -> str:
        return protocol_hash(settings({"kind": "promptable", "decoder": decoder}))

    one, two = tiny_sam(tmp_path / "one"), tiny_sam(tmp_path / "two", seed=1)
    copy = shutil.copytree(one, tmp_path / "copy" / "sam")
    assert hashed(str(copy)) == hashed(one)
    assert hashed(two) != hashed(one)
    assert hashed("facebook/sam-vit-huge") != hashed("facebook/sam-vit-base")
    (Path(one) / "config.json").write_text((Path(one) / "config.json").read_text() + " ")
    assert hashed(one) != hashed(str(copy))


def test_missing_file_fails_one_eval_only(tmp_path: Path) -> None:
    files = Files(tmp_path)
    source = {"kind": "folder", "path": str(tmp_path / "images")}
    gone = {"answers": str(tmp_path / "none.jsonl"), "truth": str(tmp_path / "truth.json")}
    entry = {"kind": "vlm", "name": "vlm", "benchmark": "gqa", "source": source, **gone}
    found = measure(Noise(), "noise", [entry], tmp_path / "out")
    assert "answers: " in found.failed["vlm"] and "none.jsonl cannot be read" in found.failed["vlm"]
    assert files.folder == tmp_path


def test_folder_digest_depends_on_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(40):
            (tmp_path / name / "sub").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "sub" / f"{i:02d}").write_text("x" * i)
    base = digest(tmp_path / "a", "images")
    assert digest(tmp_path / "b", "images") == base
    (tmp_path / "a" / ".cache").write_text("x")
    assert digest(tmp_path / "a", "images") == base
    data = digest(tmp_path / "a", "images", sample=True)
    (tmp_path / "a" / "sub" / "01").write_text("y")
    assert digest(tmp_path / "a", "images") != base
    assert digest(tmp_path / "a", "images", sample=True) != data  # small: every file is read
    few = digest(tmp_path / "a", "images", ["sub/01", "sub/99"])
    (tmp_path / "a" / "sub" / "02").write_text("others do not count")
    assert digest(tmp_path / "a", "images", ["sub/99", "sub/01"]) == few
    (tmp_path / "a" / "sub" / "99").write_text("")
    assert digest(tmp_path / "a", "images", ["sub/01", "sub/99"]) != few
    with pytest.raises(ConfigError, match=r"truth: .*none cannot be read.*name an existing file"):
        digest(tmp_path / "none", "truth")


def test_places_name_keys_of_their_eval() -> None:
    for kind in kinds("evals", installed=False):
        own = find("evals", kind)
        assert set(own.places) <= schema(own).model_fields.keys()
        assert set(own.places.values()) <= {"data", "answers", "weights", "output"}
