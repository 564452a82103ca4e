"""Text towers, balancers, sources and evals keep their contracts; every kind has keys a recipe can use."""

import inspect
import pickle

import pytest
import torch
from PIL import Image

from agglo.config import POINTS, build, find, kinds, schema

EVERY = [(point, kind) for point in POINTS for kind in kinds(point, installed=False)]


@pytest.mark.parametrize(("point", "kind"), EVERY)
def test_a_kind_is_documented_and_its_constructor_is_a_schema(point: str, kind: str) -> None:
    cls = find(point, kind)
    assert inspect.getdoc(cls), f"{point}/{kind} has no docstring"
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        assert name == "self" or parameter.kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.KEYWORD_ONLY,
        ), f"{point}/{kind}: {name} is neither the program's (positional-only) nor the recipe's (keyword-only)"
    assert schema(cls) is schema(cls)


@pytest.mark.parametrize("kind", kinds("text", installed=False))
def test_text_towers_give_unit_vectors_in_order(kind: str) -> None:
    tower = build("text", {"kind": kind})
    both = tower.encode(["a photo of a dog", "snow on a mountain"])
    assert both.shape == (2, tower.width)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tower.encode(["snow on a mountain"])[0], both[1], rtol=1e-3, atol=1e-4)
    assert tower.encode([]).shape == (0, tower.width)


@pytest.mark.parametrize("kind", kinds("balancers", installed=False))
def test_balancers_weigh_what_was_announced(kind: str) -> None:
    balancer = build("balancers", {"kind": kind}, {"a/summary": 2.0, "b/spatial": 1.0})
    terms = {"a/summary": torch.tensor(3.0), "b/spatial": torch.tensor(4.0)}
    assert balancer(terms).shape == ()
    with pytest.raises(KeyError):
        balancer({"c/summary": torch.tensor(1.0)})


@pytest.mark.parametrize("kind", kinds("sources", installed=False))
def test_sources_read_the_same_pixels_twice(kind: str, tmp_path) -> None:
    options = {"kind": kind}
    if kind == "folder":
        Image.effect_noise((40, 30), 50).save(tmp_path / "one.png")
        options["path"] = str(tmp_path)
    source = build("sources", options)
    assert len(source) > 0
    image = source.read(0)
    assert image.mode == "RGB"
    assert image.tobytes() == source.read(0).tobytes()
    names = [source.name(index) for index in range(len(source))]
    assert len(set(names)) == len(names)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.name(0) == source.name(0)
    assert copy.read(0).tobytes() == image.tobytes()
