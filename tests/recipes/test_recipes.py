"""Every recipe in the package decodes, states its claim, resolves to itself and builds."""

import json
from pathlib import Path

import pytest
import torch

from agglo import recipe
from agglo.config import read_yaml
from agglo.creation import create
from agglo.train.loop import distill


@pytest.mark.parametrize("name", recipe.names())
def test_it_decodes_states_its_claim_and_builds(name: str) -> None:
    for smoke in (False, True):
        loaded = recipe.load(name, smoke=smoke)
        assert loaded.name == name
        assert loaded.claim.summary
        assert loaded.claim.hardware
        assert recipe.decode(read_yaml(loaded.yaml())).flat() == loaded.flat()
    model = create(loaded)
    assert set(model.heads) == set(loaded.teachers)
    assert all(size % model.spec.step == 0 for partition in loaded.partitions for size in partition.sizes)


@pytest.mark.parametrize("name", recipe.names())
def test_its_pocket_size_trains(name: str, tmp_path: Path) -> None:
    loaded = recipe.load(name, smoke=True)
    model = distill(loaded, tmp_path / "run", quiet=True)
    out = model(torch.rand(1, 3, 70, 50))
    assert set(out.heads) == set(loaded.teachers)
    assert torch.isfinite(out.summary).all()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == loaded.train.steps
