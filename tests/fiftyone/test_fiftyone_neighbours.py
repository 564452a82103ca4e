"""Exact neighbours and the numbers behind the scores; FiftyOne is not needed."""

from __future__ import annotations

import numpy as np
import pytest

from agglo.integrations.fiftyone.neighbours import Neighbours, cover
from agglo.integrations.fiftyone.scores import central, downweighted, isolation
from agglo.integrations.fiftyone.vectors import checked
from agglo.types import ConfigError
from support.planted import circle, cosine

pytest.importorskip("sklearn")


def random(rows: int, width: int = 24) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)


def brute(queries: np.ndarray, values: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None] for x in (queries, values))
    return 1 - a @ b.T


@pytest.mark.parametrize("own", [True, False])
def test_nearest_equals_brute_force(own):
    values, queries = random(300), random(40)
    table = brute(values if own else queries, values)
    if own:
        np.fill_diagonal(table, np.inf)
    rows, distances = Neighbours(values).nearest(7, None if own else queries)
    assert np.array_equal(rows, table.argsort(1)[:, :7])
    np.testing.assert_allclose(distances, np.sort(table, 1)[:, :7], atol=1e-14)


def test_all_neighbours_within_a_distance():
    values = np.concatenate([random(200), 3 * random(200)[:20]])
    table = brute(values, values)
    rows, distances = Neighbours(values).within(0.7)
    for i, (found, far) in enumerate(zip(rows, distances, strict=True)):
        assert set(found) == set(np.flatnonzero(table[i] <= 0.7)) - {i}
        assert (np.diff(far) >= 0).all() and far.max(initial=0) <= 0.7


def test_distances_are_exact_at_both_ends():
    values = np.concatenate([circle(0, 0, 1e-4, 90, 180), 1e-30 * circle(0), 1e30 * circle(0)])
    rows, distances = Neighbours(values).nearest(6, values[:1])
    assert rows[0].tolist() == [0, 1, 5, 6, 2, 3]
    assert distances[0, :4].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(distances[0, 4:], [cosine(1e-4), 1], rtol=1e-9)
    assert Neighbours(circle(0, 180)).nearest(1)[1].tolist() == [[2], [2]]


def test_a_threshold_includes_itself():
    values = circle(0, 30, 30.001)
    exactly = Neighbours(values).nearest(1, values[:1])[1][0, 0]
    assert exactly == 0
    distance = Neighbours(values).nearest(2)[1][0, 0]
    rows, _ = Neighbours(values).within(distance)
    assert rows[0].tolist() == [1]


def test_few_vectors_and_large_k():
    rows, distances = Neighbours(circle(0)).nearest(3)
    assert rows.shape == distances.shape == (1, 0)
    assert [each.tolist() for each in Neighbours(circle(0)).within(1)[0]] == [[]]
    assert Neighbours(circle(0, 1)).nearest(9, circle(0))[0].tolist() == [[0, 1]]


def test_cover_keeps_what_is_far_from_the_kept():
    near = [np.array(each) for each in ([1], [0, 2], [1, 3], [2])]
    assert cover(np.arange(4), near).tolist() == [True, False, True, False]
    assert cover(np.array([1, 0, 2, 3]), near).tolist() == [False, True, False, True]


# --- representativeness -----------------------------------------------------------------------------------------------


def test_the_centre_of_each_cluster_scores_one():
    """Two clusters on the circle, 180° apart: distances to their means are known."""
    angles = [-6, -2, 0, 2, 6]
    values = circle(*angles, *(180 + a for a in angles))
    scores = central(values, clusters=2)
    mean = circle(*angles).mean(0)
    distance = np.linalg.norm(circle(*angles) - mean, axis=1)
    expected = (distance.mean() + distance.min()) / (distance.mean() + distance)
    np.testing.assert_allclose(scores, np.tile(expected, 2), rtol=1e-12)
    assert scores.argmax() in (2, 7) and scores[2] == scores[7] == 1
    assert scores[0] == pytest.approx(scores[:5].min())


def test_the_width_of_a_cluster_does_not_matter():
    angles = np.array([-3, -1, 0, 1, 3]) / 100
    scores = central(circle(*angles, *(180 + 4 * angles)), clusters=2)
    np.testing.assert_allclose(scores[:5], scores[5:], atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 19, 20, 21])
def test_any_number_of_samples_has_finite_scores(count):
    scores = central(random(count))
    assert scores.shape == (count,) and (scores > 0).all() and scores.max() == 1


def test_a_cluster_of_one_is_an_outlier_of_the_nearest_cluster():
    values = circle(0, 0, 0, 119, 240, 244)
    apart = 2 * np.sin(np.deg2rad(119 / 2))
    expected = [1, 1, 1, (apart / 4) / (apart / 4 + apart), 1, 1]
    np.testing.assert_allclose(central(values, clusters=3), expected, rtol=1e-12)


def test_clusters_of_one_alone_and_copies_score_one():
    assert central(circle(0, 90, 200), clusters=3).tolist() == [1] * 3
    assert central(np.tile(circle(7), (30, 1))).tolist() == [1] * 30


def test_repeats_of_a_better_sample_are_downweighted():
    values = circle(0, 10, 90, 200)
    scores = np.array([0.8, 0.9, 0.7, 0.6])
    np.testing.assert_allclose(downweighted(values, scores), [0.56, 0.9, 0.7, 0.6])


# --- uniqueness -------------------------------------------------------------------------------------------------------


def test_uniqueness_is_the_geometric_mean_of_three_distances():
    values = circle(0, 10, 40, 90)
    distances = [sorted(cosine(abs(a - b)) for b in (0, 10, 40, 90) if b != a) for a in (0, 10, 40, 90)]
    expected = np.array([x**0.6 * y**0.3 * z**0.1 for x, y, z in distances])
    np.testing.assert_allclose(isolation(values), expected / expected.max(), rtol=1e-12)


def test_copies_are_the_least_unique_even_far_from_everything_else():
    dense = circle(*np.linspace(0, 2, 30))
    values = np.concatenate([dense, circle(180, 180)])
    scores = isolation(values)
    assert scores[-2:].tolist() == [0, 0] and scores[:-2].min() > 0


@pytest.mark.parametrize(
    ("angles", "expected"), [((0,), [1]), ((0, 50), [1, 1]), ((5, 5), [0, 0]), ((0, 0, 0), [0] * 3)]
)
def test_uniqueness_of_few_samples(angles, expected):
    assert isolation(circle(*angles)).tolist() == expected


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1, 2], [1, 2, 3], [4, 5]], r"^here: vectors of 2 \(2\) and of 3 values \(1, first b\); compute all"),
        ([[1, 2], [1, np.nan], [np.inf, 0]], r"^here: b has 1 values that are not finite \(2 samples in all\)"),
        ([[1, 2], [0, 0]], "^here: b has a vector of zeros"),
        ([[1, 2], [[1], [2]]], r"^here: b has int64 of shape \(2, 1\), not a vector"),
        ([[1, 2], ["x", "y"]], "^here: b has <U1"),
        ([[]], "^here: a has float64 of shape"),
    ],
)
def test_vectors_that_cannot_be_used_are_named(vectors, message):
    with pytest.raises(ConfigError, match=message):
        checked(vectors, list("abcdef")[: len(vectors)], "here")


def test_checked_vectors_keep_their_precision():
    assert checked([[1, 2]], ["a"], "x").dtype == np.float64
    assert checked([np.zeros(2, np.float16) + 1], ["a"], "x").dtype == np.float32
    assert checked([np.ones(2, np.float32)] * 2, ["a", "b"], "x").dtype == np.float32
