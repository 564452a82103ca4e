"""Every recipe in the package decodes, states its claim, resolves to itself and builds."""

import pytest

from agglo import recipe
from agglo.config import read_yaml
from agglo.model import create


@pytest.mark.parametrize("name", recipe.names())
def test_it_decodes_states_its_claim_and_builds(name: str) -> None:
    for smoke in (False, True):
        loaded = recipe.load(name, smoke=smoke)
        assert loaded.name == name
        assert loaded.claim.summary
        assert loaded.claim.hardware
        assert recipe.decode(read_yaml(loaded.yaml())) == loaded
    model = create(loaded)
    assert set(model.heads) == set(loaded.teachers)
    assert all(size % model.spec.step == 0 for partition in loaded.partitions for size in partition.sizes)
