"""Features for a language model, and scores of its answers, in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from agglo.evals import vlm as vlm_eval
from agglo.evals._answers import binary, consensus, exact, normalise, polarity
from agglo.evals.base import EvalContext, FeatureError
from agglo.evals.vlm import Vlm, padded
from agglo.types import ConfigError, Features, FeatureSpec
from support.models import Noise, Oracle, Squares

pytestmark = pytest.mark.evals


class Wide(Squares):
    """Images twice as wide as high."""

    def read(self, index: int) -> Image.Image:
        return super().read(index).resize((64, 32))


class Cells(nn.Module):
    spec = FeatureSpec(summary=None, spatial=3, stride=8, step=8)

    def forward(self, images: Tensor) -> Features:
        return Features(None, torch.nn.functional.avg_pool2d(images, 8))


# --- features ---------------------------------------------------------------------------------------------------------


def test_every_image_is_written_with_its_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm_eval, "_SHARD", 2)
    source, folder = Wide(5), tmp_path / "out"
    found = Vlm(folder=str(folder), size=62, source=source).run(Cells())  # type: ignore[arg-type]
    assert found == {"images": 5, "tokens": 32, "width": 3}  # 62 is 64: 8 x 4 cells
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [source.name(i) for i in range(5)]
    assert len({line["file"] for line in lines}) == 3
    for i, line in enumerate(lines):
        tokens = load_file(folder / line["file"])[line["key"]]
        wanted = Cells()(padded(source.read(i), 62, Cells())[None]).spatial  # type: ignore[arg-type]
        assert wanted is not None
        assert tokens.dtype == torch.float16
        assert line["grid"] == [4, 8]
        torch.testing.assert_close(tokens.T.view(3, 4, 8).float(), wanted[0], atol=1e-3, rtol=1e-3)
    config = json.loads((folder / "llava.json").read_text())
    assert config["model"]["mm_hidden_size"] == 3
    assert config["model"]["mm_projector_type"] == "mlp2x_gelu"
    assert [stage["learning_rate"] for stage in config["stages"]] == [1e-3, 2e-5]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    Vlm(folder=str(folder), size=62, source=source).run(Cells())  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_shorter_side_is_padded_to_a_legal_length() -> None:
    image = Image.new("RGB", (100, 30), (255, 255, 255))
    found = padded(image, 50, Cells())  # type: ignore[arg-type]
    assert found.shape == (3, 16, 48)  # 50 is nearest to 48; 30 becomes 14, padded to 16
    assert float(found[:, :14].min()) == 1
    assert bool((found[:, 14:] == 0.5).all())


def test_vlm_refuses_bad_input(tmp_path: Path) -> None:
    class Loud(Cells):
        def forward(self, images: Tensor) -> Features:
            out = super().forward(images)
            return Features(None, None if out.spatial is None else out.spatial * 1e6)

    source: Any = Squares(2)
    with pytest.raises(FeatureError, match=r"squares/0/0 reach .*maximum of float16 is 65504"):
        Vlm(folder=str(tmp_path), size=32, source=source).run(Loud())
    with pytest.raises(TypeError, match="has none"):
        Vlm(folder=str(tmp_path), size=32, source=source).run(Noise(spatial=False))
    for options, message in (
        ({}, "set folder to write features to, or answers"),
        ({"answers": "a.jsonl"}, "answers and truth must be set together"),
        ({"folder": "x", "size": 0}, "size must be at least 1"),
        ({"folder": "x", "benchmark": "mmlu"}, "benchmark must be one of vqav2, textvqa, gqa, pope"),
    ):
        with pytest.raises(ConfigError, match=message):
            Vlm(**options)
    assert not Vlm.bundled


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Two  dogs.", "2 dogs"),
        ("a/the", ""),
        ("The red, white and blue!", "red white and blue"),
        ("dont", "don't"),
        ("Don't", "don't"),
        ("ill", "ill"),
        ("1,000", "1000"),
        ("3.5 miles", "3.5 miles"),
        ("mid-air", "mid air"),
        ("none\n", "0"),
        ("10:30", "10:30"),
    ],
)
def test_answers_are_normalised_as_in_vqa(text: str, wanted: str) -> None:
    assert normalise(text) == wanted
    assert normalise(wanted) == wanted


@pytest.mark.parametrize(("same", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(same: int, wanted: float) -> None:
    # With s of ten: s (s - 1) + (10 - s) s, each over 3 and at most 1, over ten.
    assert consensus("Blue.", ["blue"] * same + ["red"] * (10 - same)) == pytest.approx(wanted)


def test_gqa_and_pope() -> None:
    assert exact(" Left. ", "left") == 1
    assert exact("left side", "left") == 0
    assert polarity("Yes, there is a dog. It is not small.")
    assert not polarity("No, there is none.")
    assert not polarity("There is not a dog")
    assert polarity("There is a note")
    found = binary([(True, True)] * 3 + [(True, False)] * 1 + [(False, True)] * 2 + [(False, False)] * 4)
    assert found == pytest.approx({"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "f1": 2 / 3, "yes": 0.4})
    assert binary([(False, True)])["f1"] == 0


def answers(folder: Path, entries: dict[Any, str], field: str = "text") -> str:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps({"question_id": key, field: text}) + "\n" for key, text in entries.items()))
    return str(path)


def test_each_benchmarks_own_file(tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    given = answers(tmp_path, {1: "blue", 2: "no"})
    ten = lambda a, b, n: [a] * n + [b] * (10 - n)  # noqa: E731
    files: dict[str, Any] = {
        "vqav2": {
            "annotations": [
                {"question_id": 1, "answers": [{"answer": a} for a in ten("blue", "red", 2)]},
                {"question_id": 2, "answers": [{"answer": a} for a in ten("yes", "red", 9)]},
            ]
        },
        "textvqa": {
            "data": [
                {"question_id": 1, "answers": ten("Blue", "red", 2)},
                {"question_id": 2, "answers": ten("yes", "red", 9)},
            ]
        },
        "gqa": {"1": {"answer": "blue"}, "2": {"answer": "yes"}},
    }
    for benchmark, accuracy in (("vqav2", 0.3), ("textvqa", 0.3), ("gqa", 0.5)):
        truth.write_text(json.dumps(files[benchmark]))
        made = Vlm(answers=given, truth=str(truth), benchmark=benchmark)  # type: ignore[arg-type]
        context = EvalContext()
        assert made.run(Oracle(), context) == pytest.approx({"accuracy": accuracy})
        assert set(context.records.images["accuracy"]) == {"1", "2"}
    truth.write_text('{"question_id": 1, "label": "yes"}\n{"question_id": 2, "label": "no"}\n')
    found = Vlm(answers=given, truth=str(truth), benchmark="pope").run(Oracle())
    assert found == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes": 0.5}


def test_unscorable_files_raise(tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({str(i): {"answer": "blue"} for i in range(4)}))

    def run(given: str, benchmark: str = "gqa") -> None:
        Vlm(answers=given, truth=str(truth), benchmark=benchmark).run(Oracle())  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="3 of 4 questions of gqa have no answer, such as 1"):
        run(answers(tmp_path, {0: "blue"}))
    with pytest.raises(ConfigError, match=r"line 1: expected an object with question_id and text"):
        run(answers(tmp_path, {0: "blue"}, "reply"))
    with pytest.raises(ConfigError, match="cannot be read"):
        run(str(tmp_path / "none.jsonl"))
    good = answers(tmp_path, dict.fromkeys(range(4), "blue"), "answer")
    run(good)
    for benchmark in ("vqav2", "textvqa", "pope"):
        with pytest.raises(ConfigError, match=f"not a ground truth file of {benchmark}.*that the benchmark publishes"):
            run(good, benchmark)
    truth.write_text('{"question_id": 0, "label": "maybe"}')
    with pytest.raises(ConfigError, match="'maybe' is neither yes nor no"):
        run(good, "pope")
    truth.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        run(good)
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        run(good, "pope")
    truth.write_text('{"0": {"answer": "blue"}}')
    (tmp_path / "answers.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="contains no answer"):
        run(good)
