"""`agglo eval`, `report` and `compare`, and the page of results."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from agglo.model.model import Model
from agglo.report.markup import VOID
from agglo.results.records import read
from support import datasets as tiny
from support.commands import agglo

pytestmark = pytest.mark.evals


def refused(*arguments: object) -> str:
    result = agglo(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("agglo: "), result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of the same shape, and eight pets."""
    root = tmp_path_factory.mktemp("evals")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        made = Model({"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8}, {}, preferred_size=32)
        made.save(root / name)
    for i in range(8):
        tiny.picture(root / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    return root


def knn(home: Path, *more: str) -> list[str]:
    pets = f"{{kind: folder, path: {home / 'pets'}}}"
    return [f"knn.train={pets}", f"knn.test={pets}", "knn.k=3", "knn.size=32", "--evals", "knn", *more]


@pytest.fixture(scope="module")
def measured(home: Path) -> dict[str, Path]:
    """Both models, measured: at two sizes; one of them with pictures."""
    folders = {}
    for name in ("one", "two"):
        folders[name] = home / "results" / name
        more = ["--sizes", "32,48", "-o", str(folders[name]), *(["--no-pictures"] if name == "two" else [])]
        result = agglo("eval", home / name, *knn(home, *more))
        assert result.exit_code == 0, result.output
    return folders


def test_eval_prints_stores_and_resumes(home: Path, tmp_path: Path) -> None:
    out, numbers = tmp_path / "out", tmp_path / "numbers.json"
    first = agglo("eval", home / "one", *knn(home, "-o", str(out), "--no-pictures", "--json", str(numbers)))
    assert first.exit_code == 0, first.output
    (kept,) = read(out)
    assert f"{kept.metrics['top1']:.3f}" in first.stdout
    assert "agglo report" in first.stdout
    assert json.loads(numbers.read_text())["models"][str(home / "one")]["knn"] == dict(kept.metrics)
    second = agglo("eval", home / "one", *knn(home, "-o", str(out), "--no-pictures"))
    assert "already measured: knn (use --again to repeat)" in second.stderr
    assert "--overwrite" in refused("eval", home / "one", *knn(home, "--json", str(numbers)))


def test_eval_refuses_bad_options(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGGLO_DATA", raising=False)
    model = home / "one"
    assert "did you mean 'quick'" in refused("eval", model, "--suite", "quik")
    assert "did you mean 'eupe'" in refused("eval", model, "--protocol", "eup")
    assert "--data DIR" in refused("eval", model, "--protocol", "eupe")
    assert "name one of them" in refused("eval", model, "--suite", "quick", "--protocol", "eupe")
    assert "--json" in refused("eval", model, "-o", tmp_path / "x.json")
    assert "sides in pixels" in refused("eval", model, "--sizes", "12,x")
    assert "workers" in refused("eval", model, *knn(home, "--workers", "-1", "-o", str(tmp_path / "o")))


def test_failed_eval_is_printed_and_exits_1(home: Path, tmp_path: Path) -> None:
    arguments = knn(home, "-o", str(tmp_path), "--no-pictures")
    arguments[0] = "knn.train={kind: cifar, path: nowhere}"
    result = agglo("eval", home / "one", *arguments)
    assert result.exit_code == 1
    assert "knn failed: source cifar: 'nowhere' does not exist" in result.stderr
    assert "cs.toronto.edu" in result.stderr


def test_nothing_measured_is_printed_and_exits_1(home: Path, tmp_path: Path) -> None:
    result = agglo("eval", home / "one", "--evals", "zero_shot", "-o", tmp_path)
    assert result.exit_code == 1
    assert "zero_shot left out: " in result.stderr
    assert f"nothing was measured on {home / 'one'}: every eval" in result.stderr
    assert result.stdout == ""  # no empty table
    both = agglo("eval", home / "one", *knn(home, "-o", str(tmp_path), "--no-pictures", "--evals", "knn,zero_shot"))
    assert both.exit_code == 0, both.output  # an eval that does not apply has not failed


def test_teacher_is_given_by_its_options(home: Path, tmp_path: Path) -> None:
    for cell in (8, 16):
        result = agglo("eval", f"{{kind: hog, cell: {cell}}}", *knn(home, "-o", str(tmp_path), "--no-pictures"))
        assert result.exit_code == 0, result.output
    assert [r.model["name"] for r in read(tmp_path)] == ["hog 8", "hog 16"]


def test_all_heads_are_loaded_for_evals_that_read_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of official checkpoints are large: only then. Without it no released model could be given a decoder."""
    asked: list[object] = []

    def load(*_: object, heads: object, **__: object) -> Model:
        asked.append(heads)
        return Model.load(home / "one")

    monkeypatch.setattr("agglo.zoo.loading.load", load)
    monkeypatch.setattr("agglo.zoo.loading.is_ours", lambda name: name == "ours")
    agglo("eval", "one", *knn(home, "-o", str(home / "heads")))
    agglo("eval", "one", "--evals", "promptable", "promptable.decoder=none", "-o", home / "heads")
    agglo("eval", "ours", *knn(home, "-o", str(home / "heads")))  # one hash, whatever is measured
    assert asked == ["text", "all", None]


def test_protocol_prints_its_differences(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    tiny.spair(data / "spair")
    out = tmp_path / "out"
    arguments = ["--protocol", "eupe", "--evals", "spair", "--data", data, "-o", out, "--no-pictures", "spair.size=32"]
    result = agglo("eval", home / "one", *arguments)
    assert result.exit_code == 0, result.output
    assert "not as published: " in result.stderr
    (kept,) = read(out)
    assert (kept.protocol_name, kept.name) == ("eupe", "spair")
    assert "pck@0.10" in kept.metrics


def test_default_folder_of_a_run_is_inside_it(home: Path) -> None:
    from agglo.cli.measure import default_folder

    (home / "run" / "model").mkdir(parents=True, exist_ok=True)
    assert default_folder(str(home / "run")) == home / "run" / "evals"
    assert default_folder("nvidia/C-RADIOv4-H") == Path("evals") / "nvidia-C-RADIOv4-H"


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Sees that elements close in order, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.ids: set[str] = set()
        self.bold: list[str] = []
        self._bold = False
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.sources += [str(known[key]) for key in ("src", "href") if key in known and tag != "a"]
        assert tag not in ("script", "iframe")
        self.ids |= {str(known["id"])} if "id" in known else set()
        self._bold = known.get("class") == "best"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._bold:
            self.bold.append(data)


def test_report_is_self_contained(home: Path, measured: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = agglo("report", *measured.values(), "-o", out)
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert {"measured", "resolution", "seen", "matches", "failures", "protocol"} <= page.ids
    found = {(r.model["name"], r.name): r.metrics["top1"] for place in measured.values() for r in read(place)}
    best = {size: max(found[str(home / n), f"knn@{size}"] for n in ("one", "two")) for size in (32, 48)}
    assert {f"{value:.3f}" for value in best.values()} <= set(page.bold)
    assert text.count('class="line"') == 2  # a curve for each model
    table = out.with_suffix(".md").read_text()
    assert str(home / "one") in table
    assert "knn@32 top1" in table and "**" in table


def test_report_is_written_to_its_folder_and_keeps_foreign_files(measured: dict[str, Path], tmp_path: Path) -> None:
    assert agglo("report", measured["two"]).exit_code == 0
    text = (measured["two"] / "report.html").read_text()
    assert 'id="seen"' not in text  # no pictures were painted
    assert agglo("report", measured["two"]).exit_code == 0  # ours is made again
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my page")
    assert "not a report of agglo" in refused("report", measured["two"], "-o", mine)
    assert ".html" in refused("report", measured["two"], "-o", tmp_path / "x.txt")
    assert "agglo eval MODEL" in refused("report", tmp_path / "nowhere", measured["one"])


def test_failures_show_the_worst_images(measured: dict[str, Path]) -> None:
    from agglo.report.failures import failures

    found = failures([(measured["one"], result) for result in read(measured["one"])], most=3)
    assert [(group.name, group.metric, group.count) for group in found] == [
        ("knn@32", "top1", 8),
        ("knn@48", "top1", 8),
    ]
    values = [next(iter(each.values.values())) for each in found[0].worst]
    assert values == sorted(values) and values[0] == 0
    assert all(each.thumb is not None and each.label in ("cat", "dog") for each in found[0].worst)


def test_values_under_worst_images_wrap(measured: dict[str, Path], tmp_path: Path) -> None:
    """Model paths have separate lines that wrap: a cell is too narrow for the path and its number."""
    out = tmp_path / "page.html"
    assert agglo("report", *measured.values(), "-o", out).exit_code == 0
    text = out.read_text()
    section = text[text.index('id="failures"') :]
    captions = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", section)
    assert captions
    for caption in captions:
        assert re.fullmatch(r"(cat|dog)<div>[^<]* [\d.]+</div><div>[^<]* [\d.]+</div>", caption), caption
    assert 'class="hits values"' in section
    (rule,) = re.findall(r"\.hits\.values figcaption \{([^}]*)\}", text)
    assert "white-space: normal" in rule and "overflow: visible" in rule and "overflow-wrap: anywhere" in rule


def test_worst_images_without_files_are_named(measured: dict[str, Path], home: Path, tmp_path: Path) -> None:
    from agglo.report.failures import failures

    text = (measured["one"] / "results.jsonl").read_text().replace(str(home / "pets"), str(tmp_path / "gone"))
    (tmp_path / "results.jsonl").write_text(text)
    (measured["one"] / "images").rename(tmp_path / "images")
    try:
        found = failures([(tmp_path, result) for result in read(tmp_path)])
    finally:
        (tmp_path / "images").rename(measured["one"] / "images")
    assert found[0].worst[0].thumb is None
    assert "pets/" in found[0].worst[0].name


def test_different_settings_have_different_rows(home: Path, measured: dict[str, Path], tmp_path: Path) -> None:
    arguments = [a for a in knn(home, "--sizes", "32", "-o", str(tmp_path), "--no-pictures") if a != "knn.k=3"]
    assert agglo("eval", home / "two", *arguments, "knn.k=1").exit_code == 0
    out = tmp_path / "page.html"
    assert agglo("report", measured["one"], tmp_path, "-o", out).exit_code == 0
    text = re.sub(r"\s+", " ", " ".join(Page(out.read_text()).words))
    assert "knn@32: (a) and (b) do not compare: k: 3, 1" in text


# --- comparing --------------------------------------------------------------------------------------------------------


def test_compare_prints_intervals_classes_and_images(measured: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "compared.json"
    result = agglo("compare", measured["one"], measured["two"], "--json", out)
    assert result.exit_code == 0, result.output
    assert "95 % interval" in result.stdout
    entry = json.loads(out.read_text())["evals"][0]
    (interval,) = entry["intervals"]
    assert interval["images"] == 8
    assert interval["low"] <= interval["difference"] <= interval["high"]
    a, b = entry["metrics"]["top1"]
    assert interval["difference"] == pytest.approx(b - a)
    assert len(entry["changed"]["top1"]) >= round(abs(b - a) * 8)
    assert result.stdout == agglo("compare", measured["one"], measured["two"]).stdout


def test_compare_of_two_models_in_one_folder(home: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert agglo("eval", home / name, *knn(home, "-o", str(tmp_path), "--no-pictures")).exit_code == 0
    line = refused("compare", tmp_path, tmp_path)
    assert "name one" in line
    assert agglo("compare", f"{tmp_path}#{home / 'one'}", f"{tmp_path}#{home / 'two'}").exit_code == 0
    assert "holds no results of 'three'" in refused("compare", f"{tmp_path}#three", f"{tmp_path}#three")


def test_compare_names_other_settings_and_other_evals(home: Path, measured: dict[str, Path], tmp_path: Path) -> None:
    arguments = [a for a in knn(home, "--sizes", "32", "-o", str(tmp_path), "--no-pictures") if a != "knn.k=3"]
    assert agglo("eval", home / "two", *arguments, "knn.k=1").exit_code == 0
    result = agglo("compare", measured["one"], tmp_path)
    assert "knn@32: not compared, measured differently: k: 3, 1" in result.stdout
    assert "evaluated for one model only: knn@48" in result.stderr
    folder = tmp_path / "other"
    assert agglo("eval", home / "two", "--evals", "rank", "rank.size=32", "-o", folder, "--no-pictures").exit_code == 0
    assert "no eval was run on both: knn@32, knn@48 and rank" in refused("compare", measured["one"], folder)


def test_compare_finds_the_result_that_compares(home: Path, measured: dict[str, Path], tmp_path: Path) -> None:
    """In a folder that holds other settings, another name of the same settings, and other models."""
    plain = knn(home, "-o", str(tmp_path), "--no-pictures")
    assert agglo("eval", home / "two", *plain).exit_code == 0
    other = [word for word in plain if word != "knn.k=3"]
    assert agglo("eval", home / "two", *other, "knn.k=1").exit_code == 0  # newer, of the same name
    assert agglo("eval", home / "one", *other, "knn.k=2").exit_code == 0  # another model, measured otherwise
    for pair in ((measured["one"], tmp_path), (tmp_path, measured["one"])):
        result = agglo("compare", *pair)
        assert result.exit_code == 0, result.output
        assert "95 % interval" in result.stdout and "not compared" not in result.stdout
        assert str(home / "two") in result.stdout


def test_compare_takes_the_newest_model_of_one_name(home: Path, measured: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "model"
    for seed in (5, 6):
        torch.manual_seed(seed)
        made = Model({"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8}, {}, preferred_size=32)
        made.save(saved)
        assert agglo("eval", saved, *knn(home, "-o", str(tmp_path / "out"), "--no-pictures")).exit_code == 0
    result = agglo("compare", tmp_path / "out", measured["two"], "--json", tmp_path / "compared.json")
    assert result.exit_code == 0, result.output
    newest = read(tmp_path / "out")[-1].metrics["top1"]
    assert json.loads((tmp_path / "compared.json").read_text())["evals"][0]["metrics"]["top1"][0] == newest


def test_sweep_over_sizes_measures_each_input_once(home: Path, tmp_path: Path) -> None:
    result = agglo("eval", home / "one", *knn(home, "--sizes", "32,34,48", "-o", str(tmp_path), "--no-pictures"))
    assert result.exit_code == 0, result.output
    assert "note: knn@34 is knn@32: the model takes 32 px instead of 34" in result.stderr
    assert result.stdout.count("knn@") == 2
    assert [each.name for each in read(tmp_path)] == ["knn@32", "knn@48"]


def test_replaced_images_are_measured_again(home: Path, tmp_path: Path) -> None:
    for i in range(40):
        tiny.picture(tmp_path / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    arguments = knn(tmp_path, "-o", str(tmp_path / "out"), "--no-pictures")
    assert agglo("eval", home / "one", *arguments).exit_code == 0
    assert "already measured" in agglo("eval", home / "one", *arguments).stderr
    tiny.picture(tmp_path / "pets" / "cat" / "3.png", 99)
    result = agglo("eval", home / "one", *arguments)
    assert "already measured" not in result.stderr
    assert len({each.data_hash for each in read(tmp_path / "out")}) == 2


def test_compare_names_an_empty_file(measured: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("\n")
    for pair in ((tmp_path, measured["one"]), (measured["one"], tmp_path)):
        assert f"{tmp_path / 'results.jsonl'} holds no results" in refused("compare", *pair)
