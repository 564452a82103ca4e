"""What FiftyOne's own functions do wrong, and ours do not.

Each test holds as long as FiftyOne is wrong. When one fails, FiftyOne has mended itself: drop the function of agglo
that the test names, and let the guide point to FiftyOne's.
"""

from __future__ import annotations

import numpy as np
import pytest

from agglo.integrations.fiftyone.duplicates import leaky_splits, near_duplicates
from agglo.integrations.fiftyone.index import similarity
from agglo.integrations.fiftyone.layout import visualization
from agglo.integrations.fiftyone.scores import representativeness, uniqueness
from support.planted import circle, cosine, plant

DROP = "FiftyOne has mended this: drop agglo's {} and this test"


@pytest.fixture
def brain(fo):
    import fiftyone.brain

    return fiftyone.brain


def clusters() -> np.ndarray:
    """20 groups of three, far apart in 20 dimensions: one at the centre, two 0.2 to its sides."""
    centres = 10 * np.eye(20)
    side = np.roll(np.eye(20), 1, 1)
    return np.stack([centres - 0.2 * side, centres, centres + 0.2 * side], 1).reshape(60, 20)


def test_representativeness_is_still_reversed(brain, dataset):
    plant(dataset, clusters())
    brain.compute_representativeness(dataset, "theirs", embeddings="radio")
    representativeness(dataset, "ours", embeddings="radio", clusters=20)
    theirs, ours = (np.reshape(dataset.values(name), (20, 3)) for name in ("theirs", "ours"))
    assert (theirs.argmax(1) != 1).all(), DROP.format("representativeness")
    assert (ours.argmax(1) == 1).all()


def test_representativeness_of_clusters_of_one_is_still_not_a_number(brain, dataset):
    plant(dataset, 10 * np.eye(20))
    with np.errstate(invalid="ignore"):
        brain.compute_representativeness(dataset, "theirs", embeddings="radio")
    representativeness(dataset, "ours", embeddings="radio")
    assert not np.isfinite(dataset.values("theirs")).any(), DROP.format("representativeness")
    assert np.isfinite(dataset.values("ours")).all()


def test_representativeness_still_fails_below_twenty_samples(brain, dataset):
    plant(dataset, clusters()[:19])
    with pytest.raises(ValueError, match="n_samples=19 should be >= n_clusters=20"):
        brain.compute_representativeness(dataset, "theirs", embeddings="radio")
    representativeness(dataset, "ours", embeddings="radio")


def test_uniqueness_still_leaves_out_the_nearest_neighbour(brain, dataset):
    """Ten vectors 20° apart, and two identical ones opposite of them."""
    ids = plant(dataset, circle(*range(0, 100, 10), 225, 225))
    brain.compute_uniqueness(dataset, "theirs", embeddings="radio")
    uniqueness(dataset, "ours", embeddings="radio")
    assert set(dataset.sort_by("theirs").values("id")[-2:]) == set(ids[-2:]), DROP.format("uniqueness")
    assert set(dataset.sort_by("ours").values("id")[:2]) == set(ids[-2:])


def test_uniqueness_of_a_view_still_has_the_scores_of_other_samples(brain, dataset):
    vectors = np.random.default_rng(6).normal(size=(12, 8)).astype(np.float32)
    plant(dataset, vectors)
    brain.compute_similarity(dataset, embeddings="radio", brain_key="theirs")
    similarity(dataset, embeddings="radio", brain_key="ours")
    brain.compute_uniqueness(dataset, "whole", similarity_index="theirs")
    brain.compute_uniqueness(dataset[6:], "part", similarity_index="theirs")
    assert dataset[6:].values("part") == dataset[:6].values("whole"), DROP.format("uniqueness")
    uniqueness(dataset[6:], "mended", similarity_index="ours")
    uniqueness(dataset[6:], "expected", embeddings="radio")
    np.testing.assert_allclose(dataset[6:].values("mended"), dataset[6:].values("expected"), atol=1e-9)


def test_text_queries_still_differ_after_a_query_by_image(brain, dataset):
    vectors = np.random.default_rng(7).normal(size=(40, 8)).astype(np.float32) + 1
    ids = plant(dataset, vectors)
    brain.compute_similarity(dataset, embeddings="radio", brain_key="theirs")
    similarity(dataset, embeddings="radio", brain_key="ours")
    found = {}
    for key in ("theirs", "ours"):
        before = dataset.sort_by_similarity(vectors[3] + 1, k=10, brain_key=key).values("id")
        dataset.sort_by_similarity(ids[0], k=1, brain_key=key)
        found[key] = before == dataset.sort_by_similarity(vectors[3] + 1, k=10, brain_key=key).values("id")
    assert not found["theirs"], DROP.format("similarity")
    assert found["ours"]


def test_duplicate_distances_are_still_not_those_of_the_threshold(brain, dataset):
    vectors = np.random.default_rng(8).normal(size=(30, 8)) + 1
    ids = plant(dataset, [*vectors, vectors[0]])
    theirs = brain.compute_near_duplicates(dataset, threshold=0.05, embeddings="radio").neighbors_map
    ours = near_duplicates(dataset, 0.05, embeddings="radio").neighbors_map
    assert ours == {ids[0]: [(ids[-1], 0.0)]}
    assert max(distance for found in theirs.values() for _, distance in found) > 0.05, DROP.format("near_duplicates")


def test_duplicates_of_a_view_still_lie_outside_of_it(brain, dataset):
    ids = plant(dataset, circle(0, 90, 180, 270, 0))
    theirs = brain.compute_near_duplicates(dataset[:4], threshold=0.01, embeddings="radio").duplicate_ids
    assert theirs == [ids[4]], DROP.format("near_duplicates")
    assert near_duplicates(dataset[:4], 0.01, embeddings="radio").duplicate_ids == []


def test_leaky_splits_still_misses_a_pair(brain, dataset):
    """Train, train, test, 5° and 6° apart; their opposites keep the mean at zero."""
    vectors = circle(0, 5, 11)
    ids = plant(dataset, [*vectors, *-vectors], tags=[["train"], ["train"], ["test"], [], [], []])
    theirs = brain.compute_leaky_splits(dataset, ["train", "test"], threshold=cosine(8), embeddings="radio")
    assert theirs.leak_ids == [], DROP.format("leaky_splits")
    assert leaky_splits(dataset, ["train", "test"], cosine(8), embeddings="radio").leak_ids == ids[1:3]


def test_leaky_splits_still_ignores_views(brain, dataset):
    ids = plant(dataset, circle(0, 1, 90, 180, 270))
    views = {"one": dataset[:1], "two": dataset[1:]}
    theirs = brain.compute_leaky_splits(dataset, views, threshold=0.01, embeddings="radio")
    assert theirs.leak_ids == [], DROP.format("leaky_splits")
    assert leaky_splits(dataset, views, 0.01, embeddings="radio").leak_ids == ids[:2]


def test_overwrite_false_still_overwrites_and_removing_still_clears_the_field(brain, dataset):
    ids = plant(dataset, circle(0, 90, 180))
    index = brain.compute_similarity(dataset, embeddings="radio", brain_key="theirs")
    index.add_to_index(circle(45), ids[:1], overwrite=False)
    assert np.allclose(dataset.first().radio, circle(45)), DROP.format("similarity")
    index.remove_from_index(sample_ids=ids[2:])
    assert dataset.last().radio is None, DROP.format("similarity")


def test_tsne_still_fails_below_fifty_samples(brain, dataset):
    plant(dataset, np.random.default_rng(9).normal(size=(49, 64)))
    with pytest.raises(ValueError, match="n_components=50 must be between"):
        brain.compute_visualization(dataset, embeddings="radio", method="tsne", verbose=False)
    assert visualization(dataset, embeddings="radio", method="tsne").points.shape == (49, 2)
