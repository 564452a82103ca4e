"""Partitions that name their teachers: forward passes, terms, and invalid names."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from agglo import recipe
from agglo.config import override
from agglo.training import loop
from agglo.types import ConfigError

TREE = {
    "name": "split",
    "claim": {"summary": "a test"},
    "student": {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8, "registers": 1},
    "teachers": {"low": {"kind": "toy"}, "high": {"kind": "toy", "seed": 1}, "both": {"kind": "toy", "seed": 2}},
    "heads": {"summary": {"kind": "mlp", "hidden": 16}, "spatial": {"kind": "mlp", "hidden": 16}},
    "targets": {"normalizer": {"kind": "phi_s"}, "estimate_images": 12},
    "partitions": [
        {"sizes": [32], "batch": 4, "teachers": ["low", "both"]},
        {"sizes": [64], "batch": 2, "teachers": ["high", "both"]},
    ],
    "train": {"steps": 8, "lr": 3e-3, "log_every": 1, "save_every": 100},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(6):
        pixels = torch.rand(80, 72, 3, generator=generator)
        Image.fromarray((pixels * 255).byte().numpy()).save(folder / f"{index}.png")
    return folder


def split(data: Path, *overrides: str) -> recipe.Recipe:
    tree = {**TREE, "data": {"sources": [{"kind": "folder", "path": str(data)}], "workers": 0}}
    return recipe.from_dict(override(tree, overrides))


def test_only_the_teachers_of_a_partition_run_and_have_terms(data: Path, tmp_path: Path) -> None:
    loop.train_model(split(data), tmp_path / "run", quiet=True)
    sides = {4: {"low", "both"}, 2: {"high", "both"}}
    seen = set()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        names = {term.split("/")[0] for term in entry["terms"]}
        assert names in sides.values(), entry
        seen.add(frozenset(names))
    assert seen == {frozenset(names) for names in sides.values()}  # eight steps drew both partitions


def test_statistics_of_a_teacher_come_from_its_partitions(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run = loop.prepare(split(data), folder, torch.device("cpu"), resume=False)
    asked: dict[str, set[int]] = {name: set() for name in run.teachers}
    for name, teacher in run.teachers.items():
        teacher.register_forward_pre_hook(lambda _, args, name=name: asked[name].add(args[0].shape[-1]))
    with loop.Progress(folder, 8, quiet=True) as progress:
        loop.start(run, progress, [])
    assert asked == {"low": {32}, "high": {64}, "both": {32, 64}}
    assert all(bool(normalizer.frozen) for normalizer in run.objective.normalizers.values())


def test_stage_restricts_the_teachers_of_partitions(data: Path) -> None:
    stages = "stages=[{name: first, teachers: [low]}, {name: second}]"
    first = split(data, stages).stage(0)
    assert list(first.teachers) == ["low"]
    assert [partition.teachers for partition in first.partitions] == [["low"]]
    assert len(split(data, stages).stage(1).partitions) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("partitions.0.teachers=[low, bth]", r"partitions\.0\.teachers.*'bth'.*both"),
        ("partitions.1.teachers=[both]", r"'high' is in none"),
        ("partitions.0.teachers=[]", r"partitions\.0\.teachers"),
    ],
)
def test_invalid_partition_teachers_are_refused(data: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(data, change)


def test_feature_cache_excludes_partition_teachers(data: Path) -> None:
    with pytest.raises(ConfigError, match="a feature cache holds all teachers at all sizes"):
        split(data, "data.views.crops=2", "data.feature_cache=there")
