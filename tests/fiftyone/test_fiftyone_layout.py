"""Layouts: repeatable, for few samples too, stored under the brain key that the App lists."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from agglo.integrations.fiftyone.index import similarity
from agglo.integrations.fiftyone.layout import visualization
from agglo.types import ConfigError
from support.planted import plant

GROUPS = np.repeat(np.eye(3, 8), 10, 0)
VECTORS = (GROUPS + 0.05 * np.random.default_rng(5).normal(size=GROUPS.shape)).astype(np.float32)

needs_umap = pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason='pip install "agglo[fiftyone]"')
METHODS = ["pca", "tsne", pytest.param("umap", marks=needs_umap)]


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_apart_and_the_layout_is_repeatable(dataset, method):
    ids = plant(dataset, VECTORS)
    first = visualization(dataset, embeddings="radio", brain_key="plot", method=method)
    points = first.points
    centres = points.reshape(3, 10, 2).mean(1)
    spread = np.linalg.norm(points.reshape(3, 10, 2) - centres[:, None], axis=2).max()
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=2)[np.triu_indices(3, 1)].min()
    assert points.shape == (30, 2) and apart > 2 * spread
    again = visualization(dataset, embeddings="radio", brain_key="plot", method=method)
    assert np.array_equal(points, again.points)
    stored = dataset.load_brain_results("plot", cache=False)
    assert np.array_equal(stored.points, points) and stored.sample_ids.tolist() == ids
    assert dataset.list_brain_runs(type="visualization", method=method) == ["plot"]
    assert dataset.get_brain_info("plot").config.embeddings_field == "radio"


@pytest.mark.parametrize("count", [9, 15, 30, 60, 90])
def test_tsne_keeps_groups_together(dataset, count):
    """With FiftyOne's learning rate of 200, groups of 10 to 30 mix."""
    groups = np.repeat(np.eye(3, 8), count // 3, 0)
    plant(dataset, groups + 0.05 * np.random.default_rng(count).normal(size=groups.shape))
    points = visualization(dataset, embeddings="radio", method="tsne").points.reshape(3, -1, 2)
    centres = points.mean(1)
    spread = np.linalg.norm(points - centres[:, None], axis=2).max()
    assert np.linalg.norm(centres[:, None] - centres[None], axis=2)[np.triu_indices(3, 1)].min() > 3 * spread


@pytest.mark.parametrize(("method", "least"), [("pca", 2), ("tsne", 4), pytest.param("umap", 4, marks=needs_umap)])
def test_few_samples(dataset, method, least):
    """FiftyOne's t-SNE fails below 50 samples."""
    plant(dataset, VECTORS[:least])
    assert np.isfinite(visualization(dataset, embeddings="radio", method=method).points).all()
    with pytest.raises(ConfigError, match=f"{method} of {least - 1} samples; at least {least} are needed"):
        visualization(dataset[: least - 1], embeddings="radio", method=method)


def test_every_form_of_vectors(dataset):
    ids = plant(dataset, [*VECTORS, None])
    with pytest.warns(UserWarning, match="1 of 31 have no vector"):
        expected = visualization(dataset, embeddings="radio", method="pca")
    assert expected.sample_ids.tolist() == ids[:-1]
    with pytest.warns(UserWarning, match="1 of 31"):
        similarity(dataset, embeddings="radio", brain_key="radio")
    for form in ({"embeddings": [*VECTORS, None]}, {"similarity_index": "radio"}):
        with pytest.warns(UserWarning, match="1 of 31"):
            found = visualization(dataset, method="pca", **form)
        assert found.sample_ids.tolist() == ids[:-1]
        np.testing.assert_allclose(found.points, expected.points, atol=1e-6)


def test_settings_of_the_method_can_be_given(dataset):
    plant(dataset, VECTORS)
    found = visualization(dataset, embeddings="radio", method="tsne", num_dims=3, perplexity=4, brain_key="plot")
    assert found.points.shape == (30, 3)
    config = dataset.get_brain_info("plot").config
    assert (config.perplexity, config.pca_dims, config.seed) == (4, 8, 51)


def test_patches(fo, dataset):
    boxes = [fo.Detections(detections=[fo.Detection(label="x", bounding_box=[0, 0, 1, 1], radio=v)]) for v in VECTORS]
    plant(dataset, VECTORS, boxes=boxes)
    found = visualization(dataset, embeddings="radio", patches_field="boxes", method="pca")
    assert found.label_ids.tolist() == [each.detections[0].id for each in dataset.values("boxes")]


def test_bad_input_is_named(dataset):
    with pytest.raises(ConfigError, match="has no samples"):
        visualization(dataset, embeddings="radio", method="pca")
    plant(dataset, VECTORS)
    with pytest.raises(ConfigError, match="unknown method 'tnse'; did you mean 'tsne'"):
        visualization(dataset, embeddings="radio", method="tnse")
    with pytest.raises(ConfigError, match="9 dimensions of vectors with 8 values"):
        visualization(dataset, embeddings="radio", method="pca", num_dims=9)
    with pytest.raises(ConfigError, match="unknown option 'perplexty'; did you mean 'perplexity'"):
        visualization(dataset, embeddings="radio", method="tsne", perplexty=3)
    with pytest.raises(ConfigError, match="has no field 'radios'"):
        visualization(dataset, embeddings="radios", method="pca")
    assert dataset.list_brain_runs() == []
