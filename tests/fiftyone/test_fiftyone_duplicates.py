"""Near-duplicates and leaks: all planted pairs and nothing else, at real cosine distances."""

from __future__ import annotations

import numpy as np
import pytest

from agglo.integrations.fiftyone.duplicates import leaky_splits, near_duplicates
from agglo.integrations.fiftyone.index import similarity
from agglo.types import ConfigError
from support.planted import circle, cosine, plant


def test_planted_duplicates_are_found_and_nothing_else(dataset):
    """Copies at 0°, 1° and 3° from three of 60 random vectors, in 32 dimensions with a large common part."""
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(60, 32)) + 2
    angles = np.deg2rad([0, 1, 3])
    side = generator.normal(size=(3, 32))
    own = vectors[[5, 20, 40]]
    side -= own * ((side * own).sum(1) / (own * own).sum(1))[:, None]
    side *= (np.linalg.norm(own, axis=1) / np.linalg.norm(side, axis=1))[:, None]
    copies = own * np.cos(angles)[:, None] + side * np.sin(angles)[:, None]
    ids = plant(dataset, [*vectors, *copies])
    index = near_duplicates(dataset, cosine(3.1), embeddings="radio")
    assert index.duplicate_ids == ids[60:]
    pairs = dict(index.neighbors_map)
    assert {kept: [each for each, _ in found] for kept, found in pairs.items()} == {
        ids[5]: [ids[60]], ids[20]: [ids[61]], ids[40]: [ids[62]]
    }  # fmt: skip
    found = [pairs[ids[i]][0][1] for i in (5, 20, 40)]
    np.testing.assert_allclose(found, [0, cosine(1), cosine(3)], atol=2e-7)
    assert near_duplicates(dataset, cosine(2.9), embeddings="radio").duplicate_ids == ids[60:62]
    assert near_duplicates(dataset, cosine(0.9), embeddings="radio").duplicate_ids == ids[60:61]
    view = index.duplicates_view(type_field="kind", dist_field="distance")
    assert view.values("kind") == ["nearest", "duplicate"] * 3
    assert index.unique_view().values("id") == ids[:60]


def test_exact_copies_need_no_threshold(dataset):
    vectors = np.random.default_rng(4).normal(size=(20, 1280))
    ids = plant(dataset, [*vectors, *vectors[::-1]])
    index = near_duplicates(dataset, 0, embeddings="radio")
    assert index.duplicate_ids == ids[20:]
    assert {distance for found in index.neighbors_map.values() for _, distance in found} == {0.0}


def test_only_the_samples_of_a_view_are_compared(dataset):
    ids = plant(dataset, circle(0, 50, 100, 50, 100.01))
    similarity(dataset, embeddings="radio", brain_key="radio")
    for source in ({"embeddings": "radio"}, {"similarity_index": "radio"}):
        assert near_duplicates(dataset[:3], 0.01, **source).duplicate_ids == []
        assert near_duplicates(dataset[1:4], 0.01, **source).duplicate_ids == [ids[3]]
    assert not dataset.load_brain_results("radio").has_view
    assert len(near_duplicates(dataset, 0.01, similarity_index="radio").duplicates_view()) == 4


def test_fiftyone_s_own_calls_are_right_on_our_index(dataset):
    import fiftyone.brain as brain

    ids = plant(dataset, circle(0, 10, 40, 90, 91, 200), split=["a", "b", "a", "a", "b", "b"])
    similarity(dataset, embeddings="radio", brain_key="radio")
    assert brain.compute_near_duplicates(dataset, threshold=0.001, similarity_index="radio").duplicate_ids == [ids[4]]
    leaks = brain.compute_leaky_splits(dataset, "split", threshold=0.001, similarity_index="radio")
    assert leaks.leak_ids == ids[3:5]
    brain.compute_uniqueness(dataset, similarity_index="radio")
    least = dataset.sort_by("uniqueness").values("id")
    assert set(least[:3]) >= {ids[0]} and least[-1] == ids[5]
    index = dataset.load_brain_results("radio")
    index.find_duplicates(fraction=1 / 3)
    assert len(index.duplicate_ids) == 2
    index.find_unique(3)
    assert len(index.unique_ids) == 3


def test_every_pair_of_different_splits_leaks(dataset):
    """On a circle, 5° and 6° apart: the middle one is a duplicate of the first, and leaks to the third."""
    tags = [["train"], ["train"], ["test"], ["test"]]
    ids = plant(dataset, circle(0, 5, 11, 120), tags=tags)
    leaks = leaky_splits(dataset, ["train", "test"], cosine(8), embeddings="radio")
    assert [(first, second) for first, second, _ in leaks.pairs] == [(ids[1], ids[2])]
    assert leaks.pairs[0][2] == pytest.approx(cosine(6), rel=1e-6)
    assert leaks.leak_ids == leaks.leaks_view().values("id") == ids[1:3]
    assert leaks.no_leaks_view().values("id") == [ids[0], ids[3]]
    assert leaks.no_leaks_view(dataset.match_tags("test")).values("id") == [ids[3]]
    assert leaks.leaks_for_sample(ids[2]).values("id") == [ids[2], ids[1]]
    assert leaks.leaks_for_sample(dataset.first()).values("id") == [ids[0]]
    leaks.tag_leaks()
    assert dataset.match_tags("leak").values("id") == ids[1:3]
    leaks.find_leaks(cosine(12))
    assert [pair[:2] for pair in leaks.pairs] == [(ids[1], ids[2]), (ids[0], ids[2])] and leaks.thresh == cosine(12)


@pytest.mark.parametrize("form", ["tags", "field", "list field", "views"])
def test_splits_are_given_in_every_form(dataset, form):
    names = ["a", "b", "a", "b"]
    ids = plant(dataset, circle(0, 1, 90, 180), tags=[[n] for n in names], split=names, groups=[[n] for n in names])
    views = {name: dataset.match_tags(name) for name in "ab"}
    splits = {"tags": ["a", "b"], "field": "split", "list field": "groups", "views": views}[form]
    leaks = leaky_splits(dataset, splits, 0.01, embeddings="radio")
    assert leaks.leak_ids == ids[:2] and set(leaks.split_views) == {"a", "b"}


def test_a_sample_of_two_splits_leaks_by_itself(dataset):
    ids = plant(dataset, circle(0, 60, 120), tags=[["a"], ["a", "b"], ["b"]])
    leaks = leaky_splits(dataset, ["a", "b"], 0.01, embeddings="radio")
    assert leaks.pairs == [(ids[1], ids[1], 0.0)] and leaks.leak_ids == [ids[1]]


def test_samples_outside_of_the_splits_do_not_leak(dataset):
    plant(dataset, circle(0, 0, 60), tags=[["a"], [], ["b"]])
    assert leaky_splits(dataset, ["a", "b"], 0.01, embeddings="radio").pairs == []


def test_bad_input_is_named(dataset):
    import fiftyone.brain as brain

    with pytest.raises(ConfigError, match="has no samples"):
        near_duplicates(dataset, embeddings="radio")
    plant(dataset, circle(0, 60, 120), tags=[["a"], ["b"], ["b"]], split=["x"] * 3)
    brain.compute_similarity(dataset, embeddings="radio", brain_key="theirs")
    cases = [
        (lambda: near_duplicates(dataset, 3, embeddings="radio"), r"threshold 3 is outside \[0, 2\]"),
        (lambda: near_duplicates(dataset, similarity_index="theirs"), r"index 'theirs' \(sklearn\) does not measure"),
        (lambda: near_duplicates(dataset, similarity_index="thiers"), "index 'thiers'; did you mean 'theirs'"),
        (lambda: near_duplicates(dataset, similarity_index="theirs", embeddings="radio"), "^give either"),
        (lambda: near_duplicates(dataset), "^give either embeddings"),
        (lambda: leaky_splits(dataset, ["a", "c"], embeddings="radio"), "has no tag 'c'; choose from: a, b"),
        (lambda: leaky_splits(dataset, "spilt", embeddings="radio"), "has no field 'spilt'; did you mean 'split'"),
        (lambda: leaky_splits(dataset, "split", embeddings="radio"), "1 split in 'split'; at least two are needed"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()


def test_one_sample_has_no_duplicates(dataset):
    plant(dataset, circle(0))
    index = near_duplicates(dataset, embeddings="radio")
    assert index.duplicate_ids == [] and index.neighbors_map == {}
