"""Representativeness and uniqueness in a dataset: fields, brain keys, missing vectors, bad input."""

from __future__ import annotations

import numpy as np
import pytest

from agglo.integrations.fiftyone.index import similarity
from agglo.integrations.fiftyone.scores import central, isolation, representativeness, uniqueness
from agglo.types import ConfigError
from support.planted import circle, plant

SCORES = {"uniqueness": uniqueness, "representativeness": representativeness}
VECTORS = np.random.default_rng(1).normal(size=(30, 12)).astype(np.float32)
EXPECTED = {"uniqueness": isolation(VECTORS), "representativeness": central(VECTORS)}


@pytest.mark.parametrize("name", SCORES)
def test_the_field_and_the_run_are_those_of_fiftyone(fo, dataset, name):
    plant(dataset, VECTORS)
    SCORES[name](dataset, embeddings="radio")
    assert isinstance(dataset.get_field(name), fo.FloatField)
    assert dataset.values(name) == EXPECTED[name].tolist()
    assert dataset.list_brain_runs(type=name) == [name]
    config = dataset.get_brain_info(name).config
    assert config.embeddings_field == "radio" and config.computed_by.startswith("agglo ")
    assert config.cls.startswith("fiftyone.brain.")
    assert dataset.load_brain_results(name) is None
    dataset.delete_brain_run(name)
    assert not dataset.has_field(name)


@pytest.mark.parametrize("name", SCORES)
def test_every_form_of_vectors_gives_the_same_scores(dataset, name):
    ids = plant(dataset, VECTORS)
    similarity(dataset, embeddings="radio", brain_key="ours")
    forms = [{"embeddings": "radio"}, {"embeddings": VECTORS}, {"embeddings": list(VECTORS)}]
    forms += [{"embeddings": dict(zip(ids, VECTORS, strict=True))}, {"similarity_index": "ours"}]
    for form in forms:
        SCORES[name](dataset, "score", **form)
        np.testing.assert_allclose(dataset.values("score"), EXPECTED[name], atol=1e-7)
        dataset.delete_brain_run("score")


@pytest.mark.parametrize("name", SCORES)
def test_samples_without_a_vector_are_reported_and_have_no_score(dataset, name):
    ids = plant(dataset, [*VECTORS, None, None])
    dataset.set_values("score", {ids[-1]: 0.5}, key_field="id")  # of an earlier run, when it had a vector
    with pytest.warns(UserWarning, match=r"field 'radio' .*: 2 of 32 have no vector and are left out, first .*/30.jpg"):
        SCORES[name](dataset, "score", embeddings="radio")
    assert dataset.values("score") == [*EXPECTED[name].tolist(), None, None]


@pytest.mark.parametrize("name", SCORES)
def test_a_view_is_scored_by_itself(dataset, name):
    plant(dataset, [*VECTORS, *VECTORS])
    similarity(dataset, embeddings="radio", brain_key="ours")
    SCORES[name](dataset[30:], similarity_index="ours")
    scores = dataset.values(name)
    assert scores[:30] == [None] * 30
    np.testing.assert_allclose(scores[30:], EXPECTED[name], atol=1e-7)


def test_the_order_of_a_view_does_not_matter(dataset):
    ids = plant(dataset, VECTORS)
    uniqueness(dataset.select(ids[::-1], ordered=True), embeddings="radio")
    np.testing.assert_allclose(dataset.values("uniqueness"), EXPECTED["uniqueness"], atol=1e-12)


def test_a_vector_can_lie_in_an_embedded_document(fo, dataset):
    plant(dataset, circle(0, 10, 50), features=[fo.DynamicEmbeddedDocument(radio=v) for v in VECTORS[:3]])
    dataset.add_sample_field("features.radio", fo.VectorField)
    uniqueness(dataset, embeddings="features.radio")
    assert dataset.values("uniqueness") == isolation(VECTORS[:3]).tolist()


def test_downweighting_is_the_other_method(dataset):
    plant(dataset, circle(*range(20), 180))
    representativeness(dataset, "plain", embeddings="radio")
    representativeness(dataset, "varied", "cluster-center-downweight", embeddings="radio")
    plain, varied = (np.array(dataset.values(name)) for name in ("plain", "varied"))
    assert set(np.round(varied / plain, 9)) == {0.7, 1.0} and varied[-1] == plain[-1]
    assert dataset.get_brain_info("varied").config.method == "cluster-center-downweight"


BAD = {
    "an array of another length": ({"embeddings": VECTORS[:5]}, r"^embeddings: 5 vectors for 30 samples"),
    "a field that does not exist": ({"embeddings": "radoi"}, "has no field 'radoi'; did you mean 'radio'"),
    "no vectors": ({}, "^give either embeddings"),
    "both": ({"embeddings": "radio", "similarity_index": "x"}, "^give either embeddings"),
    "an index that does not exist": ({"similarity_index": "x"}, "has no similarity index 'x'; build one"),
    "a field of another kind": ({"embeddings": "filepath"}, "0.jpg has <U"),
    "a field without vectors": ({"embeddings": "empty"}, "^field 'empty' of dataset .*: no sample has a vector"),
    "vectors of two lengths": (
        {"embeddings": "mixed"},
        r"^field 'mixed' .* of 12 \(29\) and of 3 values \(1, first .*/4",
    ),
    "a vector that is not finite": ({"embeddings": "nan"}, r"^field 'nan' .*/4.jpg has 12 values that are not finite"),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it(fo, dataset, name, case):
    other = {"mixed": VECTORS[4, :3], "nan": np.full(12, np.nan, np.float32)}
    fields = {key: [other[key] if i == 4 else v for i, v in enumerate(VECTORS)] for key in other}
    plant(dataset, VECTORS, **fields)
    dataset.add_sample_field("empty", fo.VectorField)
    arguments, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        SCORES[name](dataset, **arguments)
    assert "\n" not in str(caught.value) and not dataset.has_field(name) and not dataset.list_brain_runs()


@pytest.mark.parametrize("name", SCORES)
def test_an_empty_dataset_is_refused(dataset, name):
    with pytest.raises(ConfigError, match=r"has no samples; add photographs first$"):
        SCORES[name](dataset, embeddings="radio")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"method": "cluster-centre"}, "did you mean 'cluster-center'"), ({"clusters": 0}, "clusters=0 is not positive")],
)
def test_options_of_representativeness_are_checked(dataset, arguments, message):
    plant(dataset, VECTORS)
    with pytest.raises(ConfigError, match=message):
        representativeness(dataset, embeddings="radio", **arguments)


def test_one_sample_scores_one(dataset):
    plant(dataset, VECTORS[:1])
    for name, score in SCORES.items():
        score(dataset, embeddings="radio")
        assert dataset.values(name) == [1]
