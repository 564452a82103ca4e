"""Text towers, balancers and sources keep their contracts; every kind has a schema."""

import inspect
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from agglo.config import POINTS, build, find, kinds, schema
from agglo.sources.base import ReadRequest, Source
from support import datasets as tiny_datasets
from support.checkpoints import tiny_siglip2
from support.shapes import encode_text

EVERY = [(point, kind) for point in POINTS for kind in kinds(point, installed=False)]


@pytest.mark.parametrize(("point", "kind"), EVERY)
def test_kind_has_a_docstring_and_a_keyword_schema(point: str, kind: str) -> None:
    cls = find(point, kind)
    assert inspect.getdoc(cls), f"{point}/{kind} has no docstring"
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        assert name == "self" or parameter.kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.KEYWORD_ONLY,
        ), f"{point}/{kind}: {name} is neither the program's (positional-only) nor the recipe's (keyword-only)"
    assert schema(cls) is schema(cls)


def saved_siglip2(folder: Path) -> dict[str, Any]:
    """A whole SigLIP 2 checkpoint in a folder; the options that name it."""
    tiny_siglip2(folder, "siglip")
    return {"repo": str(folder)}


def tiny_open_clip(folder: Path) -> dict[str, Any]:
    """A registered OpenCLIP architecture and a file of its weights; the options that name them."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 8, "layers": 1, "width": 16, "head_width": 16, "patch_size": 4}
    text = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    file = folder / "agglo-contract.json"
    file.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)
    save_file(open_clip.create_model(file.stem).state_dict(), folder / "weights.safetensors")
    return {"model": file.stem, "pretrained": str(folder / "weights.safetensors")}


def reads_parts(kind: str) -> bool:
    """Whether a source can read less than a whole image."""
    return find("sources", kind).read_part is not Source.read_part


LOCAL = {"siglip2": saved_siglip2, "open_clip": tiny_open_clip}
"""Local checkpoints for the kinds that would download theirs."""


@pytest.mark.parametrize("kind", kinds("text", installed=False))
def test_text_towers_return_unit_vectors_in_order(kind: str, tmp_path: Path) -> None:
    tower = build("text", {"kind": kind, **(LOCAL[kind](tmp_path) if kind in LOCAL else {})})
    both = encode_text(tower, ["a photo of a dog", "snow on a mountain"])
    assert both.shape == (2, tower.width)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tower.encode(["snow on a mountain"])[0], both[1], rtol=1e-3, atol=1e-4)
    assert encode_text(tower, []).shape == (0, tower.width)


def balancer_options(kind: str) -> dict[str, Any]:
    return {"kind": kind, **({"points": {"a": [[0, 1], [1, 0.5]]}} if kind == "schedule" else {})}


@pytest.mark.parametrize("kind", kinds("balancers", installed=False))
def test_balancers_weight_the_declared_terms(kind: str) -> None:
    weights = {"a/summary": 2.0, "b/spatial": 1.0, "c/summary": 0.0}
    balancer = build("balancers", balancer_options(kind), weights)
    terms = {"a/summary": torch.tensor(3.0), "b/spatial": torch.tensor(4.0), "c/summary": torch.tensor(float("nan"))}
    terms = {name: term.requires_grad_() for name, term in terms.items()}
    total = balancer(terms)
    assert total.shape == () and bool(total.isfinite())
    total.backward()
    assert terms["c/summary"].grad is None
    for step in range(4):
        assert bool(balancer(terms, step=step, total=4).isfinite())
    with pytest.raises(KeyError, match="did you mean 'a/summary'"):
        balancer({"a/sumary": torch.tensor(1.0)})


@pytest.mark.parametrize("kind", kinds("balancers", installed=False))
def test_balancer_state_round_trips(kind: str) -> None:
    weights = {"a/summary": 2.0, "b/spatial": 1.0, "mesa": 0.5}
    one, other = (build("balancers", balancer_options(kind), weights) for _ in range(2))

    def terms(step: int) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(1.0 + index / (step + 1)) for index, name in enumerate(weights)}

    for step in range(3):
        one(terms(step), step=step, total=6)
    other.load_state_dict(one.state_dict())
    for step in range(3, 6):
        assert torch.equal(one(terms(step), step=step, total=6), other(terms(step), step=step, total=6))


@pytest.mark.parametrize("kind", kinds("balancers", installed=False))
def test_balancers_never_synchronise_with_the_device(kind: str) -> None:
    """A meta tensor has no value, so a copy to the host fails."""
    balancer = build("balancers", balancer_options(kind), {"a/summary": 2.0, "b/spatial": 1.0}).to("meta")
    terms = {"a/summary": torch.tensor(3.0, device="meta"), "b/spatial": torch.tensor(4.0, device="meta")}
    per_image = {name: torch.ones(5, device="meta") for name in terms}
    for step in range(3):
        assert balancer(terms, step=step, total=3, per_image=per_image).device.type == "meta"
        assert balancer({"b/spatial": terms["b/spatial"]}, step=step, total=3).shape == ()


def tiny_folder(folder: Path) -> dict[str, Any]:
    """A folder of two images; the options that name it."""
    for name in ("one.png", "two.jpg"):
        Image.effect_noise((40, 30), 50).save(folder / name)
    return {"path": str(folder)}


def tiny_shard(folder: Path) -> dict[str, Any]:
    """A tar file of two images."""
    images = tiny_folder(folder)["path"]
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for name in ("one.png", "two.jpg"):
            archive.add(Path(images) / name, name)
    return {"shards": str(folder / "shard.tar")}


def tiny_dataset(folder: Path) -> dict[str, Any]:
    """Two images as ``save_to_disk`` writes them."""
    datasets = pytest.importorskip("datasets")
    images = Path(tiny_folder(folder)["path"])
    rows = {"image": [{"bytes": (images / name).read_bytes(), "path": name} for name in ("one.png", "two.jpg")]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    return {"dataset": str(folder / "saved")}


IMAGES = {"folder": tiny_folder, "webdataset": tiny_shard, "huggingface": tiny_dataset, **tiny_datasets.MAKERS}
"""Local images for the kinds that have none built in."""


@pytest.mark.parametrize("kind", kinds("sources", installed=False))
def test_sources_read_the_same_pixels_twice(kind: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AGGLO_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    source = build("sources", {"kind": kind, **(IMAGES[kind](images) if kind in IMAGES else {})})
    assert len(source) > 0
    image = source.read(0)
    assert image.mode == "RGB"
    assert image.tobytes() == source.read(0).tobytes()
    names = [source.name(index) for index in range(len(source))]
    assert len(set(names)) == len(names)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.name(0) == source.name(0)
    assert copy.read(0).tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", [k for k in kinds("sources", installed=False) if reads_parts(k)])
def test_partial_reads_return_the_same_pixels(kind: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AGGLO_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "images"
    images.mkdir()
    source = build("sources", {"kind": kind, **IMAGES[kind](images)})
    parts = 0
    for index in range(len(source)):
        whole = np.asarray(source.read(index))
        part = source.read_part(index, lambda size: ReadRequest(1, 10))
        if isinstance(part, Image.Image):
            assert part.tobytes() == whole.tobytes()
            continue
        parts += 1
        assert (part.shrink, part.size) == (1, whole.shape[:2])
        assert np.array_equal(part.array[:10], whole[:10])
        assert source.read_part(index, lambda size: ReadRequest(2, size[0])).shrink in (1, 2)
    assert parts or kind in tiny_datasets.MAKERS  # some of those are PNG files only
