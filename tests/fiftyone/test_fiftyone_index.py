"""The similarity index: exact, the same before and after queries, incremental, found again in later sessions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agglo.integrations.fiftyone.index import similarity
from agglo.types import ConfigError
from support.planted import circle, cosine, plant

VECTORS = np.random.default_rng(2).normal(size=(40, 16)).astype(np.float32)


def order(query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.argsort(-unit @ (query / np.linalg.norm(query)), kind="stable")


def test_sort_by_similarity_equals_brute_force(dataset):
    ids = plant(dataset, VECTORS)
    similarity(dataset, embeddings="radio", brain_key="radio")
    view = dataset.sort_by_similarity(ids[3], k=7, brain_key="radio", dist_field="distance")
    expected = order(VECTORS[3], VECTORS)
    assert view.values("id") == [ids[i] for i in expected[:7]]
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    np.testing.assert_allclose(view.values("distance"), 1 - (unit @ unit[3])[expected[:7]], atol=1e-6)
    least = dataset.sort_by_similarity(ids[3], k=5, reverse=True, brain_key="radio", dist_field="distance")
    assert least.values("id") == [ids[i] for i in expected[::-1][:5]]
    np.testing.assert_allclose(least.values("distance"), 1 - (unit @ unit[3])[expected[::-1][:5]], atol=1e-6)
    assert dataset.sort_by_similarity(ids[3], brain_key="radio").values("id") == [ids[i] for i in expected]
    assert dataset.sort_by_similarity(ids[3], k=500, brain_key="radio").values("id") == [ids[i] for i in expected]


def test_a_vector_several_ids_and_a_view_can_be_queried(dataset):
    ids = plant(dataset, VECTORS)
    similarity(dataset, embeddings="radio", brain_key="radio")
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    by_vector = dataset.sort_by_similarity(5 * VECTORS[8], k=9, brain_key="radio").values("id")
    assert by_vector == [ids[i] for i in order(VECTORS[8], VECTORS)[:9]]
    several = dataset.sort_by_similarity(ids[:3], k=9, brain_key="radio").values("id")
    assert several == [ids[i] for i in order(unit[:3].mean(0), VECTORS)[:9]]
    inside = dataset[10:20].sort_by_similarity(ids[0], k=4, brain_key="radio").values("id")
    assert inside == [ids[10 + i] for i in order(VECTORS[0], VECTORS[10:20])[:4]]
    assert dataset.sort_by_similarity(5 * VECTORS[8], k=9, brain_key="radio").values("id") == by_vector


def test_queries_by_image_change_nothing(dataset):
    """FiftyOne's index centres its vectors at the first of them."""
    ids = plant(dataset, VECTORS + 1)
    index = similarity(dataset, embeddings="radio", brain_key="radio")
    query = VECTORS[5]

    def answer():
        return dataset.sort_by_similarity(query, k=20, brain_key="radio").values("id")

    before = answer()
    dataset.sort_by_similarity(ids[0], k=3, brain_key="radio")
    index.find_duplicates(thresh=0.1)
    assert answer() == before == [ids[i] for i in order(query, VECTORS + 1)[:20]]
    assert np.array_equal(index.get_embeddings()[0], VECTORS + 1)


def test_added_vectors_are_found_and_stored(dataset):
    ids = plant(dataset, [*VECTORS, None])
    with pytest.warns(UserWarning, match="1 of 41 have no vector"):
        index = similarity(dataset, embeddings="radio", brain_key="radio")
    dataset.sort_by_similarity(ids[0], k=1, brain_key="radio")
    new = np.full((1, 16), 3, np.float32)
    index.add_to_index(new, ids[-1:])
    assert dataset.sort_by_similarity(new[0], k=1, brain_key="radio").values("id") == ids[-1:]
    assert dataset.values("radio")[-1].tolist() == new[0].tolist()
    again = dataset.load_brain_results("radio", cache=False)
    assert again.total_index_size == 41 and again is not index


@pytest.mark.parametrize("source", ["field", "array"])
def test_adding_and_removing_lasts(dataset, source):
    ids = plant(dataset, VECTORS)
    vectors = "radio" if source == "field" else VECTORS
    index = similarity(dataset, embeddings=vectors, brain_key="radio")
    index.remove_from_index(sample_ids=ids[:2])
    index.add_to_index(-VECTORS[5:7], ids[5:7])
    expected = VECTORS.copy()
    expected[5:7] *= -1
    for each in (index, dataset.load_brain_results("radio", cache=False)):
        assert each.total_index_size == 38 and set(each.sample_ids) == set(ids[2:])
        held, _, _ = each.get_embeddings(ids[2:])
        assert np.array_equal(held, expected[2:])
        assert len(dataset.sort_by_similarity(ids[9], brain_key="radio")) == 38
    assert all(vector is not None for vector in dataset.values("radio"))  # FiftyOne's index clears them
    index.add_to_index(VECTORS[:1], ids[:1])
    assert dataset.load_brain_results("radio", cache=False).total_index_size == 39


def test_existing_vectors_are_kept_or_refused_without_overwrite(dataset):
    ids = plant(dataset, VECTORS)
    index = similarity(dataset, embeddings="radio")
    index.remove_from_index(sample_ids=ids[1:2])
    index.add_to_index(7 * np.ones((2, 16)), ids[:2], overwrite=False)
    assert np.array_equal(index.get_embeddings(ids[:2])[0], [VECTORS[0], np.full(16, 7)])
    with pytest.raises(ConfigError, match=f"{ids[0]} is already in the index"):
        index.add_to_index(np.ones((1, 16)), ids[:1], overwrite=False, allow_existing=False)


def test_deleted_samples_take_no_place_among_the_results(dataset):
    ids = plant(dataset, circle(*range(0, 60, 10)))
    index = similarity(dataset, embeddings="radio", brain_key="radio")
    dataset.delete_samples(ids[1:3])
    assert dataset.sort_by_similarity(ids[0], k=3, brain_key="radio").values("id") == [ids[0], *ids[3:5]]
    dataset.delete_samples(ids[3:4])
    index.find_duplicates(thresh=cosine(10.1))
    assert index.duplicate_ids == [ids[5]] and index.total_index_size == 3


def test_a_second_call_brings_the_index_up_to_date(dataset):
    plant(dataset, VECTORS[:10])
    first = similarity(dataset, embeddings="radio", brain_key="radio")
    plant(dataset, VECTORS[10:])
    assert first.total_index_size == 10
    second = similarity(dataset, embeddings="radio", brain_key="radio")
    assert second.total_index_size == 40 and dataset.list_brain_runs() == ["radio"]


def test_vectors_of_another_process_are_found(dataset):
    """The App's server keeps an index as it was first loaded."""
    ids = plant(dataset, circle(0, 90))
    similarity(dataset, embeddings="radio", brain_key="radio")
    elsewhere = dataset.load_brain_results("radio", cache=False)
    ids += plant(dataset, circle(1, 180))
    assert elsewhere.sort_by_similarity(ids[0], k=2).values("id") == [ids[0], ids[2]]
    dataset.tag_samples("seen")  # changes samples, not vectors
    reads = elsewhere._vectors
    assert elsewhere.sort_by_similarity(ids[2], k=1).values("id") == [ids[2]] and elsewhere._vectors is reads
    ids += plant(dataset, circle(2))
    elsewhere.find_duplicates(thresh=cosine(2.5))
    assert elsewhere.duplicate_ids == [ids[2], ids[4]]


def test_patches_are_indexed_by_label(fo, dataset):
    boxes = [
        fo.Detections(detections=[fo.Detection(label="x", bounding_box=[0, 0, 1, 1], radio=VECTORS[2 * i + j])
                                  for j in range(2)]) if i != 1 else None
        for i in range(4)
    ]  # fmt: skip
    plant(dataset, VECTORS[:4], boxes=boxes)
    last = dataset.last()
    last.boxes.detections[1].radio = None
    last.save()
    with pytest.warns(UserWarning, match="1 of 6 have no vector and are left out, first label"):
        index = similarity(dataset, embeddings="radio", patches_field="boxes", brain_key="patches")
    assert index.total_index_size == 5 and index.label_ids is not None
    label = dataset.first().boxes.detections[1].id
    patches = dataset.to_patches("boxes").sort_by_similarity(label, k=2, brain_key="patches")
    expected = order(VECTORS[1], VECTORS[[0, 1, 4, 5, 6]])[:2]
    assert patches.values("id") == [index.label_ids[i] for i in expected]
    again = dataset.load_brain_results("patches", cache=False)
    assert again.label_ids.tolist() == index.label_ids.tolist()
    index.find_duplicates(thresh=0)
    assert index.duplicate_ids == []


def test_all_slices_of_groups_are_indexed(fo, dataset):
    dataset.add_group_field("group", default="left")
    samples = []
    for i in range(3):
        group = fo.Group()
        for j, side in enumerate(("left", "right")):
            path = f"/{i}{side}.jpg"
            samples.append(fo.Sample(filepath=path, group=group.element(side), radio=VECTORS[2 * i + j]))
    ids = dataset.add_samples(samples)
    index = similarity(dataset, embeddings="radio", brain_key="radio")
    assert sorted(index.sample_ids) == sorted(ids)
    view = dataset.select_group_slices(["left", "right"]).sort_by_similarity(ids[0], k=4, brain_key="radio")
    assert view.values("id") == [ids[i] for i in order(VECTORS[0], VECTORS[:6])[:4]]
    assert index.total_index_size == 6  # the slice that is not shown is not taken for deleted


def test_frames_are_indexed(fo, dataset):
    for video in range(2):
        sample = fo.Sample(filepath=f"/{video}.mp4")
        for number in range(1, 4):
            sample.frames[number] = fo.Frame(filepath=f"/{video}-{number}.jpg", radio=VECTORS[3 * video + number - 1])
        dataset.add_sample(sample)
    frames = dataset.to_frames(sample_frames=False)
    ids = frames.values("id")
    similarity(frames, embeddings="radio", brain_key="frames")
    found = frames.sort_by_similarity(ids[1], k=3, brain_key="frames").values("id")
    assert found == [ids[i] for i in order(VECTORS[1], VECTORS[:6])[:3]]


# --- text -------------------------------------------------------------------------------------------------------------

ZOO = """
import numpy as np, fiftyone.core.models as fom
from PIL import Image
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
class Colours(fom.Model, fom.EmbeddingsMixin, fom.PromptMixin):
    media_type, ragged_batches, transforms, preprocess = "image", False, None, False
    has_embeddings = can_embed_prompts = True
    def __init__(self, gain): self.gain = gain
    def predict(self, image): return None
    def embed(self, image): return self.gain * np.asarray(image, np.float32).mean((0, 1)) / 255
    def embed_prompts(self, prompts): return np.array([COLOURS[each] for each in prompts], np.float32)
def download_model(model_name, model_path): open(model_path, "w").close()
def load_model(model_name, model_path, gain): return Colours(gain)
"""


@pytest.fixture(scope="module")
def colours(fo) -> str:
    """The name of a zoo model whose vectors are colours."""
    folder = Path(fo.config.model_zoo_dir) / "agglo" / "colours"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(ZOO)
    model = {"base_name": "agglo/colours", "base_filename": "colours.txt"}
    (folder / "manifest.json").write_text(json.dumps({"name": "agglo/colours", "url": "", "models": [model]}))
    return "agglo/colours"


def paint(dataset, folder, **pictures) -> list[str]:
    import fiftyone

    samples = []
    for name, colour in pictures.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
        samples.append(fiftyone.Sample(filepath=str(folder / f"{name}.png")))
    return dataset.add_samples(samples)


def names(view) -> list[str]:
    return [Path(path).stem for path in view.values("filepath")]


def test_text_is_searched_with_the_zoo_model_here_and_in_a_later_session(dataset, colours, tmp_path):
    ids = paint(dataset, tmp_path, leaf=(20, 200, 40), sky=(40, 60, 220), rose=(210, 30, 30))
    index = similarity(dataset, embeddings="radio", brain_key="text", model=colours, model_kwargs={"gain": 2})
    assert index.supports_prompts and index.config.model == colours and index.config.model_kwargs == {"gain": 2}
    assert dataset.first().radio.tolist() == pytest.approx([40 / 255, 400 / 255, 80 / 255], rel=1e-6)
    assert names(dataset.sort_by_similarity("green", k=2, brain_key="text")) == ["leaf", "sky"]
    dataset.sort_by_similarity(ids[0], k=2, brain_key="text")
    assert names(dataset.sort_by_similarity("green", k=2, brain_key="text")) == ["leaf", "sky"]
    assert names(dataset.sort_by_similarity(["red", "blue"], k=3, brain_key="text"))[2] == "leaf"
    dataset.persistent = True
    code = "import sys, fiftyone as fo; d = fo.load_dataset(sys.argv[1]);"
    code += "v = d.sort_by_similarity('blue', k=1, brain_key='text'); print('FOUND', v.first().filepath)"
    result = subprocess.run(
        [sys.executable, "-c", code, dataset.name], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert f"FOUND {tmp_path / 'sky.png'}" in result.stdout, result.stderr[-2000:]


def test_only_new_samples_are_embedded(dataset, colours, tmp_path):
    options = {"embeddings": "radio", "brain_key": "text", "model": colours}
    ids = paint(dataset, tmp_path, leaf=(0, 255, 0))
    similarity(dataset, **options, model_kwargs={"gain": 1})
    dataset.set_values("radio", {ids[0]: np.array([0, 9, 0], np.float32)}, key_field="id")
    paint(dataset, tmp_path, rose=(255, 0, 0))
    similarity(dataset, **options, model_kwargs={"gain": 1})
    assert [vector.tolist() for vector in dataset.values("radio")] == [[0, 9, 0], [1, 0, 0]]
    assert names(dataset.sort_by_similarity("red", k=1, brain_key="text")) == ["rose"]


def test_text_of_another_width_is_refused(dataset, colours):
    plant(dataset, VECTORS)
    similarity(dataset, embeddings="radio", brain_key="text", model=colours, model_kwargs={"gain": 1})
    with pytest.raises(ConfigError, match=r"a query of shape \(1, 3\), the index has vectors of 16 values; text needs"):
        dataset.sort_by_similarity("red", k=1, brain_key="text")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_indexed_is_refused(dataset):
    with pytest.raises(ConfigError, match="has no samples"):
        similarity(dataset, embeddings="radio")
    plant(dataset, VECTORS)
    with pytest.raises(ConfigError, match=r"^give either embeddings"):
        similarity(dataset)
    with pytest.raises(ConfigError, match="unknown option 'metric'; choose from: batch_size"):
        similarity(dataset, embeddings="radio", metric="euclidean")
    with pytest.raises(ConfigError, match="has no field 'radios'; did you mean 'radio'"):
        similarity(dataset, embeddings="radios")
    with pytest.raises(ConfigError, match=r"^name the field for the model's vectors: embeddings='radio'"):
        similarity(dataset, model="agglo-lite")
    with pytest.raises(ConfigError, match=r"no label field 'boxs'"):
        similarity(dataset, embeddings="radio", patches_field="boxs")
    assert dataset.list_brain_runs() == []


def test_a_key_of_another_run_is_refused(dataset):
    import fiftyone.brain

    plant(dataset, VECTORS, other=list(VECTORS))
    fiftyone.brain.compute_similarity(dataset, embeddings="radio", brain_key="theirs")
    similarity(dataset, embeddings="radio", brain_key="ours")
    with pytest.raises(ConfigError, match=r"key 'theirs' .* belongs to another run .*delete_brain_run\('theirs'\)"):
        similarity(dataset, embeddings="radio", brain_key="theirs")
    with pytest.raises(ConfigError, match=r"key 'ours' indexes field 'radio' of samples, not 'other'"):
        similarity(dataset, embeddings="other", brain_key="ours")


def test_queries_and_additions_are_checked(dataset):
    ids = plant(dataset, VECTORS)
    index = similarity(dataset, embeddings="radio", brain_key="radio")
    one = np.ones((1, 16))
    cases = [
        (lambda: index.sort_by_similarity("a" * 24), f"1 ids are not in this index, first {'a' * 24}"),
        (lambda: index.sort_by_similarity(np.full(16, np.nan)), "query: query 0 has 16 values that are not finite"),
        (lambda: index.sort_by_similarity(ids[:2], aggregation="post-min"), "'post-min' is not supported; use 'mean'"),
        (lambda: index.add_to_index(one[:, :3], ids[:1]), "vectors of 3 values, the index has 16"),
        (lambda: index.add_to_index(one * np.nan, ids[:1]), f"add_to_index: {ids[0]} has 16 values that are not"),
        (lambda: index.add_to_index(np.ones((2, 16)), [ids[0]] * 2), f"{ids[0]} occurs 2 times"),
        (lambda: index.add_to_index(one, ids[:1], label_ids=ids[:1]), "label_ids are required for an index of patches"),
        (lambda: index.remove_from_index(["a" * 24], allow_missing=False), "1 ids are not in this index"),
        (lambda: index.find_duplicates(), "give either a threshold"),
        (lambda: index.find_duplicates(thresh=-1), r"threshold -1 is outside \[0, 2\]"),
        (lambda: index.find_duplicates(fraction=1.5), r"fraction 1.5 is outside \[0, 1\]"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
    assert index.total_index_size == 40 and np.array_equal(index.get_embeddings()[0], VECTORS)


def test_one_sample_can_be_indexed(dataset):
    ids = plant(dataset, VECTORS[:1])
    index = similarity(dataset, embeddings="radio", brain_key="radio")
    assert dataset.sort_by_similarity(ids[0], k=3, brain_key="radio").values("id") == ids
    index.find_duplicates(thresh=1)
    assert index.duplicate_ids == []


# --- agglo's models ---------------------------------------------------------------------------------------------------


@pytest.mark.weights
def test_a_loaded_model_is_stored_by_its_zoo_name(dataset, tmp_path):
    """The index of a model object answers text in later sessions, and a field keeps to one model."""
    from agglo.integrations.fiftyone import load_model
    from agglo.integrations.fiftyone.records import field_record

    paint(dataset, tmp_path, leaf=(20, 200, 40), sky=(40, 60, 220))
    model = load_model("agglo-lite", text=True)
    index = similarity(dataset, embeddings="text", brain_key="text", model=model)
    config = dataset.get_brain_info("text").config
    assert (config.model, config.model_kwargs, config.supports_prompts) == ("agglo-lite", {"text": True}, True)
    found = dataset.sort_by_similarity("a green leaf", brain_key="text").values("id")
    again = dataset.load_brain_results("text", cache=False)
    assert again is not index and again.supports_prompts
    assert again.sort_by_similarity("a green leaf").values("id") == found
    assert again.get_model() is not model
    assert field_record(dataset, "text")["model"] == "agglo-lite"
    with pytest.raises(ConfigError, match=r"field 'text' was computed by agglo-lite with another .*text True"):
        similarity(dataset, embeddings="text", model=load_model("agglo-lite"))


def test_text_with_an_unknown_model_object_is_for_this_session(dataset, colours, tmp_path):
    import fiftyone.zoo as zoo

    paint(dataset, tmp_path, leaf=(20, 200, 40), sky=(40, 60, 220))
    with pytest.warns(UserWarning, match="brain key 'text': text queries work in this session only"):
        index = similarity(dataset, embeddings="c", brain_key="text", model=zoo.load_zoo_model(colours, gain=1))
    assert names(index.sort_by_similarity("blue", k=1)) == ["sky"]
    assert not dataset.load_brain_results("text", cache=False).supports_prompts
