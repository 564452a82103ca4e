"""The command `agglo cache`: progress, interruption, resuming, verification."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agglo.cache.records import index_file, shard_file
from agglo.cli import cache as caching
from agglo.cli.cache import Pace
from agglo.training import precompute
from support.commands import agglo
from support.training import COMMAND_RECIPE

pytestmark = pytest.mark.processes

CROPS = "data.views.crops=2"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "tiny.yaml").write_text(COMMAND_RECIPE.format(folder=folder))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tiny.yaml"


def refused(*arguments: object) -> str:
    result = agglo(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("agglo: ") or "\nagglo: " in result.stderr, result.stderr
    return result.stderr


def test_cache_command_prints_progress_and_next_command(tiny: Path) -> None:
    result = agglo("cache", tiny, CROPS, "--dtype", "int8")
    assert result.exit_code == 0, result.output
    assert "12 crops, about" in result.stderr and "to write" in result.stderr
    assert "12/12 crops" in result.stderr
    assert "features/tiny: 12 of 12 crops" in result.stdout and "12 records written" in result.stdout
    assert "toy: error 0." in result.stdout
    train = next(line for line in result.stdout.splitlines() if "agglo train" in line).split()
    assert train[-2:] == [CROPS, "data.feature_cache=features/tiny"]
    trained = agglo(*train[1:], "--no-report")
    assert trained.exit_code == 0, trained.output
    again = agglo("cache", tiny, CROPS, "--dtype", "int8")
    assert "0 records written" in again.stdout


def test_interrupted_precompute_prints_resume_command(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, batches = precompute._Job._write, []

    def interrupting(self, loader, batch) -> None:
        real(self, loader, batch)
        batches.append(batch.step)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(precompute._Job, "_write", interrupting)
    result = agglo("cache", tiny, CROPS, "--batch", 3)
    assert result.exit_code == 130
    unfinished = agglo("cache", "--check", "features/tiny")
    assert unfinished.exit_code == 0 and "6 intact records" in unfinished.stdout
    assert "is intact but unfinished: run the same `agglo cache` again" in unfinished.stdout
    command = result.stderr.split("Resume with: ")[1].splitlines()[0]
    assert command == f"agglo cache {tiny} {CROPS} --out features/tiny --dtype fp16"
    monkeypatch.setattr(precompute._Job, "_write", real)
    assert "6 records written" in agglo(*command.split()[1:]).stdout
    assert "features/tiny is intact\n" in agglo("cache", "--check", "features/tiny").stdout


def test_check_names_the_damaged_file_and_a_rerun_repairs_it(tiny: Path) -> None:
    agglo("cache", tiny, CROPS)
    file = shard_file(Path("features/tiny/toy"), 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = agglo("cache", "--check", "features/tiny")
    assert result.exit_code == 2
    assert "toy: " in result.stdout and f"{file} is damaged at byte" in result.stdout
    assert "1 damaged file in features/tiny: delete them and rerun the same `agglo cache`" in result.stderr
    file.unlink()
    index_file(file.parent, 0).unlink(missing_ok=True)
    assert "12 records written" in agglo("cache", tiny, CROPS).stdout
    assert agglo("cache", "--check", "features/tiny").exit_code == 0


def test_check_detects_lost_records(tiny: Path) -> None:
    both = "teachers={toy: {kind: toy}, other: {kind: toy, seed: 1}}"
    agglo("cache", tiny, CROPS, both)
    for path in Path("features/tiny/other").glob("000000.*"):
        path.unlink()
    result = agglo("cache", "--check", "features/tiny")
    assert result.exit_code == 2
    assert "toy: 12 intact records of 12" in result.stdout and "other: 0 intact records of 12" in result.stdout
    assert "lost 12 of the 12 records of other: run the same `agglo cache` again" in result.stderr
    assert "12 records written" in agglo("cache", tiny, CROPS, both).stdout
    assert agglo("cache", "--check", "features/tiny").exit_code == 0
    shutil.rmtree("features/tiny/other")
    assert "lost 12 of the 12 records of other" in refused("cache", "--check", "features/tiny")


def test_other_folder_is_left_unchanged(tiny: Path) -> None:
    assert "in use and is not a feature cache" in refused("cache", tiny, CROPS, "--out", "images")
    assert sorted(path.name for path in Path("images").iterdir()) == [f"{index}.png" for index in range(6)]


def test_full_disk_error_names_resume_command(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    error = refused("cache", tiny, CROPS)
    assert "the disk is full. 0 of 12 crops" in error and "more are needed" in error
    assert f"agglo cache {tiny} {CROPS} --out features/tiny" in error


def test_invalid_arguments_are_refused(tiny: Path) -> None:
    assert "data.views.crops=2" in refused("cache", tiny)
    assert "name a recipe" in refused("cache")
    assert "--check takes a cache's folder and nothing else" in refused("cache", tiny, "--check", "x")
    assert "feature cache nowhere does not exist" in refused("cache", "--check", "nowhere")
    assert "fp32, fp16, bf16, int8, not 'fp8'" in refused("cache", tiny, CROPS, "--dtype", "fp8")
    assert "--batch must be at least 1" in refused("cache", tiny, CROPS, "--batch", 0)
    assert "try --device cpu" in refused("cache", tiny, CROPS, "--device", "nonsense")


def test_pace_counts_this_run_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(caching.time, "monotonic", lambda: now[0])
    pace = Pace()
    assert pace.text(5000, 10000) == ""  # from an earlier run: no rate of this one
    now[0] += 10
    assert pace.text(5100, 10000) == "10.0 images/s, 0:08:10 left"
    assert pace.is_due(False)
    assert not pace.is_due(False)
    assert pace.is_due(True)
