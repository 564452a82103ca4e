"""`agglo train`, `eval`, `compare` and `report` on one run: one set of numbers, one protocol hash, one data hash."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from agglo.cli.main import app
from agglo.harness.runs import is_measured, measure_run
from agglo.recipe import load
from agglo.results.records import read, read_images
from agglo.results.tables import number
from agglo.training.run import finish, train

pytestmark = pytest.mark.training

RETRIEVAL = ["--evals", "retrieval", "retrieval.size=64"]
"""The eval of `quickstart --smoke`."""


def agglo(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of the quickstart's smoke size, of other seeds."""
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b", 1)):
        agglo("train", "quickstart", f"train.seed={seed}", "--smoke", "--out", root / name, "--device", "cpu")
    return root / "a", root / "b"


def test_training_writes_the_records_of_eval(runs: tuple[Path, Path], tmp_path: Path) -> None:
    rows = {result.model["name"]: result for result in read(runs[0])}
    assert set(rows) == {"conse", "untrained", "student"}  # lite2 and hog have no text tower
    assert {name: result.model["role"] for name, result in rows.items()} == {
        "conse": "teacher",
        "untrained": "untrained",
        "student": "student",
    }
    assert len({result.column for result in rows.values()}) == 1
    assert not (runs[0] / "evals.json").exists()
    images = read_images(runs[0], rows["student"])
    assert images is not None and images.images
    # The same model measured by `agglo eval` in another folder has the same record.
    agglo("eval", runs[0], *RETRIEVAL, "-o", tmp_path, "--no-pictures", "--no-features")
    (again,) = read(tmp_path)
    assert (again.id, again.column, again.metrics) == (
        rows["student"].id,
        rows["student"].column,
        rows["student"].metrics,
    )
    assert again.model["hash"] == rows["student"].model["hash"]


def test_eval_finds_what_training_measured(runs: tuple[Path, Path]) -> None:
    before = (runs[0] / "evals" / "results.jsonl").read_bytes()
    result = agglo("eval", runs[0], *RETRIEVAL, "--no-pictures")
    assert "already measured: retrieval (use --again to repeat)" in result.stderr
    assert (runs[0] / "evals" / "results.jsonl").read_bytes() == before
    (student,) = (each for each in read(runs[0]) if each.model["name"] == "student")
    assert all(number(value) in result.stdout for value in student.metrics.values())


def test_compare_takes_the_students_of_two_runs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "compared.json"
    agglo("compare", *runs, "--json", out)
    entry = json.loads(out.read_text())
    assert (entry["a"], entry["b"]) == tuple(f"{run}#student" for run in runs)
    (compared,) = entry["evals"]
    metrics = [next(r.metrics for r in read(run) if r.model["name"] == "student") for run in runs]
    assert compared["metrics"] == {name: [each[name] for each in metrics] for name in metrics[0]}
    assert not compared["why"] and compared["intervals"]


def test_compare_takes_a_named_model_of_a_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "compared.json"
    agglo("compare", f"{runs[0]}#untrained", f"{runs[0]}#student", "--json", out)
    entry = json.loads(out.read_text())
    assert (entry["a"], entry["b"]) == ("untrained", "student")
    result = CliRunner().invoke(app, ["compare", f"{runs[0]}#studnt", str(runs[1])])
    assert result.exit_code == 2 and "did you mean 'student'" in result.stderr


def test_report_of_a_run_has_the_sections_of_results_and_its_own(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = (runs[0] / "report.html").read_text(encoding="utf-8")  # written by `agglo train`
    before = (runs[0] / "evals" / "results.jsonl").read_bytes()
    agglo("report", runs[0])
    assert (runs[0] / "evals" / "results.jsonl").read_bytes() == before
    agglo("report", *runs, "-o", tmp_path / "both.html")
    both = (tmp_path / "both.html").read_text(encoding="utf-8")
    for result in read(runs[0]):
        for text in (page, both, (runs[0] / "report.html").read_text(encoding="utf-8")):
            assert all(f">{number(value)}<" in text for value in result.metrics.values())
            assert f"protocol {result.protocol}, data {result.data_hash}" in text
    sections = [set(re.findall(r'<section id="(\w+)"', text)) for text in (page, both)]
    assert sections[0] - sections[1] == {"learning", "seen", "found", "reproduce"}
    assert sections[1] == {"measured", "failures", "protocol"}
    assert all(f">student ({run.name})<" in both for run in runs)


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "evals")))


def test_run_of_an_older_version_is_recognised_and_measured_anew(runs: tuple[Path, Path], tmp_path: Path) -> None:
    old = copied(runs[1], tmp_path / "old")
    (old / "evals.json").write_text('{"models": {}}', encoding="utf-8")
    result = CliRunner().invoke(app, ["compare", str(old), str(runs[0])])
    assert result.exit_code == 2
    assert f"measured by an older version (evals.json): measure it again with `agglo eval {old}`" in result.stderr
    agglo("eval", old, "--no-pictures", "--json", tmp_path / "numbers.json")
    assert {r.id for r in read(old)} == {r.id for r in read(runs[1])}
    numbers = json.loads((tmp_path / "numbers.json").read_text())["models"]
    assert numbers == {r.model["name"]: {r.name: r.metrics} for r in read(old)} | {
        name: {"skipped": numbers[name]["skipped"]} for name in ("lite2", "hog")
    }
    agglo("compare", old, runs[0], "--json", tmp_path / "compared.json")
    (compared,) = json.loads((tmp_path / "compared.json").read_text())["evals"]
    assert not compared["why"] and compared["intervals"]


def test_run_is_measured_if_its_evals_and_its_student_are(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path / "run")
    assert not is_measured(run)
    shutil.copytree(runs[0] / "evals", run / "evals")
    assert is_measured(run)
    recipe, marker = (run / "recipe.yaml").read_text(), (run / "evals" / "measured.json").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("size: 64", "size: 96"))  # the same name, another protocol
    assert recipe != (run / "recipe.yaml").read_text() and not is_measured(run)
    (run / "recipe.yaml").write_text(recipe)
    (run / "evals" / "measured.json").write_text(json.dumps({**json.loads(marker), "failed": {"student": {"a": "b"}}}))
    assert not is_measured(run)
    (run / "evals" / "measured.json").write_text(marker)
    results = run / "evals" / "results.jsonl"
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[1:]) + "\n")  # a teacher's result is lost
    assert not is_measured(run)
    results.write_text("\n".join(lines) + "\n")
    assert is_measured(run)
    shutil.rmtree(run / "model")
    shutil.copytree(runs[1] / "model", run / "model")
    assert not is_measured(run)


def test_run_whose_last_eval_is_left_out_is_measured(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = copied(runs[0], tmp_path / "run")
    recipe = load(str(run / "recipe.yaml"), ["teachers={hog: {kind: hog}}", "evals=[{kind: rank}, {kind: zero_shot}]"])
    recipe.evals[0]["size"] = 64
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    before = measure_run(run, device="cpu")
    assert "zero_shot" in before["hog"].skipped and is_measured(run)


def test_train_warns_of_failed_evals_and_reports_them(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(runs[0], tmp_path / "run")
    source = "evals=[{kind: knn, train: {kind: cifar, path: nowhere}}]"
    recipe = load(str(run / "recipe.yaml"), ["teachers={hog: {kind: hog}}", source])
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr("agglo.training.run.train_model", lambda *arguments, **options: None)
    with pytest.warns(UserWarning, match="evals failed; the model is saved in .*\n  student: knn: source cifar"):
        train(recipe, run, device="cpu")
    assert "eval knn failed on student: source cifar" in (run / "report.html").read_text(encoding="utf-8")
    assert not is_measured(run)


def test_only_the_main_process_measures(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(runs[0], tmp_path / "run")
    recipe = load(str(run / "recipe.yaml"))
    monkeypatch.setattr("agglo.dist.launch_rank", lambda: (1, 2))
    (run / "report.html").unlink()
    assert not finish(recipe, run, device="cpu", evals=True, report=True, phase=lambda title: nullcontext())
    assert not (run / "evals").exists() and not (run / "report.html").exists()
