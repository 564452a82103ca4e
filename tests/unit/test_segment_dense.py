"""Masks from a text-aligned map alone: the two refinements in closed form, and real words on real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import agglo
from agglo.config import build
from agglo.decoders.dense import by_affinity, shares, text_scores
from agglo.segmentation.run import DenseSegmenter
from agglo.types import ConfigError
from support.commands import agglo as command


def test_affinity_averages_over_similar_cells() -> None:
    spatial = torch.tensor([[1.0, 1, -1, -1]]).view(1, 1, 2, 2)  # two groups of opposite features
    cells = torch.tensor([[0.0, 2, 10, 20]]).view(1, 1, 2, 2)
    sharp = by_affinity(cells, spatial, 0.01).flatten().tolist()
    assert sharp == pytest.approx([1, 1, 15, 15], abs=1e-4)
    flat = by_affinity(cells, spatial, 1e6).flatten().tolist()
    assert flat == pytest.approx([8] * 4, abs=1e-3)
    a, b = torch.softmax(torch.tensor([2.0, -2.0]), 0) / 2
    mixed = by_affinity(cells, spatial, 0.5).flatten().tolist()
    assert mixed == pytest.approx([float(a * 2 + b * 30)] * 2 + [float(b * 2 + a * 30)] * 2, abs=1e-4)
    assert by_affinity(cells, torch.zeros(1, 3, 5, 4), 0.1).shape == (1, 1, 5, 4)
    with pytest.raises(ConfigError, match="affinity: 0 is not positive"):
        by_affinity(cells, spatial, 0)


def test_shares_add_up_to_one() -> None:
    found = shares(torch.randn(3, 4, 5))
    torch.testing.assert_close(found.sum(0), torch.ones(4, 5))


@pytest.mark.weights
def test_words_find_their_things(tmp_path: Path) -> None:
    photos = build("sources", {"kind": "photos", "split": "all"})
    names = [photos.name(i) for i in range(len(photos))]
    motorcycle = photos.read(names.index("photos/motorcycle_left"))
    model = agglo.load("agglo-lite", heads="text")
    options = {"method": "dense", "model": model}
    (found,) = agglo.segment(motorcycle, ["motorcycle", "wall"], **options)  # type: ignore[arg-type]
    assert found.labels == ("motorcycle", "wall") and found.masks.shape == (2, 500, 741)
    assert not (found.masks[0] & found.masks[1]).any()
    bike = found.masks[0]
    assert bike[250:450, 150:600].mean() > 0.8 and bike[:80].mean() < 0.2 and (found.scores > 0.2).all()
    assert found.masks[1][:80].mean() > 0.5
    with torch.inference_mode():
        plain = text_scores(model, motorcycle, ["motorcycle", "wall"], affinity=None, centre=0)
        assert float(plain.abs().max()) <= 1 and plain.shape == (2, 500, 741)
        assert not torch.allclose(plain, text_scores(model, motorcycle, ["motorcycle", "wall"]))
    motorcycle.save(tmp_path / "m.png")
    done = command("segment", tmp_path / "m.png", "--method", "dense", "-t", "motorcycle, wall", "-o", tmp_path / "o")
    assert done.exit_code == 0, done.output
    assert "m.png: 1 motorcycle, 1 wall" in done.output
    assert len(list((tmp_path / "o" / "masks" / "m").iterdir())) == 2


@pytest.mark.weights
def test_dense_refuses_what_it_cannot_do() -> None:
    picture = np.zeros((40, 50, 3), np.uint8)
    with pytest.raises(ConfigError, match="method 'dense' takes texts only"):
        agglo.segment(picture, boxes=[(1, 2, 3, 4)], method="dense")
    with pytest.raises(ConfigError, match="method is 'dens'; use 'sam3' or 'dense'"):
        agglo.segment(picture, "cat", method="dens")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lite2 has no text tower; those that have text towers: conse"):
        DenseSegmenter(agglo.load("agglo-lite"), head="lite2")
