"""`agglo train`, `eval`, `compare` and `report` on one run: one set of numbers, one protocol hash, one data hash."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from agglo.cli.main import app
from agglo.results.records import read, read_images
from agglo.results.tables import number

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
    assert "already measured: retrieval (--again measures anew)" in result.stderr
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


def test_run_of_an_older_version_is_recognised(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "evals.json").write_text('{"models": {}}', encoding="utf-8")
    result = CliRunner().invoke(app, ["compare", str(tmp_path), str(runs[0])])
    assert result.exit_code == 2
    assert f"measured by an older version (evals.json): `agglo eval {tmp_path}` measures it anew" in result.stderr
