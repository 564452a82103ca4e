"""Starting from an earlier run, and runs of several stages."""

import json
from pathlib import Path

import pytest
import torch

from agglo.model.model import Model
from agglo.training import loop
from agglo.types import ConfigError
from support.training import tiny, trace

pytestmark = pytest.mark.training

STAGES = 'stages=[{name: low, teachers: [toy, dense]}, {name: high, set: ["partitions=[{sizes: [64], batch: 2}]"]}]'


def test_stage_keeps_weights_and_new_teachers_start_anew(data: Path, tmp_path: Path) -> None:
    first = loop.train_model(tiny(data, STAGES, "stages.1.set=[]").stage(0), tmp_path / "first", quiet=True)
    made = tiny(data, f"train.start_from={tmp_path / 'first'}")
    run = loop.prepare(made, tmp_path / "second", torch.device("cpu"), resume=False)
    assert run.adopted == ("toy", "dense")
    ours, theirs = run.model.student, first.student
    assert torch.equal(ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
    # toy, other, dense against toy, dense: class tokens go by name, the register by its place.
    assert torch.equal(ours.patch_generator.token[[0, 2, 3]], theirs.patch_generator.token)
    with loop.Progress(tmp_path, 1, quiet=True) as progress:
        loop.start(run, progress, [])
    cells, token = torch.randn(2, 32, 3, 3), torch.randn(2, 32)
    for later in (Model.load(tmp_path / "second" / "initial"), loop.exportable(run, run.ema.model)):
        # A head that was kept predicts the same in its teacher's space, whatever the new statistics are.
        for part, x in (("spatial", cells), ("summary", token)):
            before, after = getattr(first.heads["toy"], part)(x), getattr(later.heads["toy"], part)(x)
            torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_resumed_run_skips_finished_stages(data: Path, tmp_path: Path) -> None:
    made, folder = tiny(data, STAGES), tmp_path / "run"
    model = loop.train_model(made, folder, quiet=True)
    low, high = folder / "stages" / "1_low", folder / "stages" / "2_high"
    assert set(trace(low)[0]["terms"]) == {"toy/summary", "toy/spatial", "dense/spatial"}
    assert {line["size"] for line in trace(high)} == {64}
    assert list(model.heads) == ["toy", "other", "dense"]
    for place in (high, folder):
        assert torch.equal(
            Model.load(place / "model").student.patch_generator.token, model.student.patch_generator.token
        )
    (high / "model" / "config.json").unlink()  # as if killed in the last stage
    began = (low / "metrics.jsonl").stat().st_mtime_ns
    loop.train_model(made, folder, resume=True, quiet=True)
    assert (low / "metrics.jsonl").stat().st_mtime_ns == began
    assert json.loads((high / "model" / "config.json").read_text())


def test_invalid_stages_are_refused_before_the_first(data: Path, tmp_path: Path) -> None:
    for wrong, message in [
        ("stages=[{name: a, teachers: [toi]}]", r"stages\.0\.teachers: no teacher 'toi'; did you mean 'toy'"),
        ("stages=[{name: a}, {name: a}]", "'a' is used twice"),
        ('stages=[{name: a, set: ["train.stepps=3"]}]', "stage a.*stepps|stepps"),
        ("stages=[{name: ../a}]", "stages.0.name|pattern"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tiny(data, wrong)


def test_another_architecture_is_refused(data: Path, tmp_path: Path) -> None:
    loop.train_model(tiny(data, "train.steps=1"), tmp_path / "run", quiet=True)
    for change, message in [
        ("student.width=64", "another architecture: .*patch_generator|another architecture"),
        ("student={kind: hybrid}", "a vit student, the recipe's is a hybrid"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loop.prepare(
                tiny(data, change, f"train.start_from={tmp_path / 'run'}", "partitions=[{sizes: [64], batch: 2}]"),
                tmp_path / "other", torch.device("cpu"), resume=False,
            )  # fmt: skip
    with pytest.raises(ConfigError, match="no model"):
        loop.prepare(tiny(data, "train.start_from=nowhere"), tmp_path / "other", torch.device("cpu"), resume=False)
