"""Every recipe in the package decodes, states its claim, resolves to itself and builds."""

import json
from pathlib import Path

import pytest
import torch

from agglo import recipe
from agglo.config import read_yaml
from agglo.model.creation import create
from agglo.training.loop import train_model
from agglo.training.stages import stage_folder


@pytest.mark.weights
@pytest.mark.parametrize("name", recipe.names())
def test_recipe_parses_states_its_claim_and_builds(name: str) -> None:
    for smoke in (False, True):
        loaded = recipe.load(name, smoke=smoke)
        assert loaded.name == name
        assert loaded.claim.summary
        assert loaded.claim.hardware
        assert recipe.from_dict(read_yaml(loaded.to_yaml())).to_dict() == loaded.to_dict()
        if loaded.objective["kind"] == "upsample":
            continue  # it has no student
        with torch.device("meta"):  # at its real size: shapes and names, no memory
            model = create(loaded, initialize=False)
        assert set(model.heads) == set(loaded.teachers)
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        assert all(size % model.spec.step == 0 for partition in loaded.partitions for size in partition.sizes)


@pytest.mark.training
@pytest.mark.parametrize("name", recipe.names())
def test_smoke_version_trains(name: str, tmp_path: Path) -> None:
    loaded = recipe.load(name, smoke=True)
    model = train_model(loaded, tmp_path / "run", quiet=True)
    if loaded.objective["kind"] == "upsample":
        assert model.trained
    else:
        out = model(torch.rand(1, 3, 70, 50))
        assert set(out.heads) == set(loaded.teachers)
        assert torch.isfinite(out.summary).all()
    folder = tmp_path / "run"
    if loaded.stages:
        folder = stage_folder(folder, len(loaded.stages) - 1, loaded.stages[-1].name)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == loaded.train.steps
