"""The App in a browser: grid, heatmap, embeddings panel and a typed search show what the pipeline computed.

``AGGLO_SCREENSHOTS=docs/figures`` keeps the pictures, for the guide.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.fiftyone_app import Page, served
from support.network import free_port


@pytest.fixture
def app(fo: Any, chromium: Any, curated: Any) -> Iterator[tuple[Any, int]]:
    port = free_port()
    with served(fo, curated.dataset, port) as session:  # its own: open panels belong to the session
        yield session, port


@pytest.fixture
def page(chromium: Any, app: tuple[Any, int], curated: Any) -> Iterator[Page]:
    made = Page(chromium, app[1], curated.dataset)
    yield made
    made.close()


def keep(picture: Image.Image, name: str) -> np.ndarray:
    """The pixels ``(H, W, 3)``; also a file in ``AGGLO_SCREENSHOTS``."""
    if folder := os.environ.get("AGGLO_SCREENSHOTS"):
        picture.save(Path(folder) / f"fiftyone_{name}.jpg", quality=82, optimize=True)
    return np.asarray(picture, np.float32)


def test_grid_and_heatmap(page, curated):
    plain = keep(page.picture(), "grid")
    assert f"{len(curated.dataset)} samples" in page.text()
    grid = plain[150:, 310:]
    assert grid.std() > 40, "the grid shows no photographs"
    page.toggle("radio_map")
    drawn = keep(page.picture(), "heatmap")
    assert np.abs(drawn - plain)[150:, 310:].mean() > 20, "the heatmaps are not drawn"
    page.toggle("radio_map")
    page.toggle("radio_map_a_cup_of_coffee")
    prompt = keep(page.picture(), "prompt")
    assert np.abs(prompt - drawn)[150:, 310:].mean() > 5, "the heatmaps of a text equal the others"


def test_embeddings_panel(page, curated):
    text = page.show_layout("layout")
    assert f"{len(curated.dataset)} points" in text
    picture = keep(page.picture(), "embeddings")
    panel = picture[230:760, 820:1250]
    colourful = (panel.max(2) - panel.min(2) > 60).sum()
    assert colourful > 10 * len(curated.dataset), "the plot shows no points"


def test_a_text_typed_into_the_app(page):
    """The App's server loads the model by its zoo name and searches the index of texts."""
    page.search("a cup of coffee")
    assert "a cup of coffee · text_similarity · k=25" in page.text()
