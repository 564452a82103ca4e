"""Incremental computation: what is missing, records, wrong collections, boxes pooled from the map."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from agglo.integrations.fiftyone import apply_model, compute_embeddings, compute_patch_embeddings, load_model
from agglo.integrations.fiftyone.records import field_record
from agglo.types import ConfigError


def add(dataset, paths):
    import fiftyone

    dataset.add_samples([fiftyone.Sample(filepath=str(path)) for path in paths])
    return dataset


class Counted:
    """Counts the images that a model encodes."""

    def __init__(self, model, monkeypatch):
        self.images = 0
        real = model.model.forward

        def forward(images, *args, **kwargs):
            self.images += len(images)
            return real(images, *args, **kwargs)

        monkeypatch.setattr(model.model, "forward", forward)


def test_only_missing_samples_are_embedded(dataset, photographs, monkeypatch):
    files = sorted(photographs.iterdir())
    model = load_model("agglo-lite")
    counted = Counted(model, monkeypatch)
    first = compute_embeddings(add(dataset, files[:6]), model, "e", num_workers=0)
    assert (first.computed, first.reused, first.skipped) == (6, 0, {})
    before = dataset.values("e")
    second = compute_embeddings(add(dataset, files[6:9]), model, "e", num_workers=0)
    assert (second.computed, second.reused, counted.images) == (3, 6, 9)
    assert all(np.array_equal(a, b) for a, b in zip(before, dataset.values("e"), strict=False))
    assert compute_embeddings(dataset, model, "e").computed == 0
    assert compute_embeddings(dataset, model, "e", overwrite=True, num_workers=0).computed == 9


def test_a_stopped_call_continues(dataset, photographs, monkeypatch):
    model = load_model("agglo-lite", batch_size=2)
    add(dataset, sorted(photographs.iterdir())[:8])
    real, calls = model.embed_all, []

    def stopped(items):
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(items)

    monkeypatch.setattr(model, "embed_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        compute_embeddings(dataset, model, "e", num_workers=0)
    monkeypatch.setattr(model, "embed_all", real)
    report = compute_embeddings(dataset, model, "e", num_workers=0)
    assert (report.computed, report.reused) == (4, 4)
    assert all(each is not None for each in dataset.values("e"))


def test_the_record_says_what_a_field_holds(dataset, photographs):
    model = load_model("agglo-lite")
    compute_embeddings(add(dataset, sorted(photographs.iterdir())[:2]), model, "e", num_workers=0)
    record = field_record(dataset, "e")
    assert (record["model"], record["size"], record["dtype"]) == ("agglo-lite", "224x224 centre square", "float32")
    for options, what in (({"max_size": 256}, "size"), ({"text": True}, "head")):
        with pytest.raises(ConfigError, match=rf"'e' was computed by agglo-lite with another .*{what}.*overwrite=True"):
            compute_embeddings(dataset, load_model("agglo-lite", **options), "e")
    compute_embeddings(dataset, load_model("agglo-lite", text=True), "e", overwrite=True, num_workers=0)
    assert field_record(dataset, "e")["head"] == "conse"
    assert dataset.first()["e"].shape == (384,)


def test_heatmaps_are_drawn_where_they_are_missing(dataset, photographs, tmp_path):
    model = load_model("agglo-lite", output_type="spatial", maps=["pca", "norm"], max_size=224)
    files = sorted(photographs.iterdir())
    add(dataset, [*files[:2], tmp_path / "moved.jpg"])
    first = apply_model(dataset, model, "heat", num_workers=0)
    assert (first.computed, list(first.skipped)) == (2, [str(tmp_path / "moved.jpg")])
    second = apply_model(add(dataset, files[2:4]), model, "heat", num_workers=0)
    assert (second.computed, second.reused) == (2, 2)
    assert {each is not None for each in dataset.exists("heat_pca").values("heat_norm")} == {True}


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="ffmpeg and ffprobe are not installed")
def test_only_missing_frames_are_embedded(fo, dataset, tmp_path, monkeypatch):
    for index, seconds in enumerate((1, 2)):
        source = f"testsrc=size=96x64:rate=3:duration={seconds}"
        command = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", source, str(tmp_path / f"{index}.mp4")]
        subprocess.run(command, check=True)
    model = load_model("agglo-lite")
    counted = Counted(model, monkeypatch)
    compute_embeddings(add(dataset, [tmp_path / "0.mp4"]), model, "e")
    report = compute_embeddings(add(dataset, [tmp_path / "1.mp4"]), model, "e")
    assert (report.computed, report.reused, counted.images) == (1, 1, 9)
    assert field_record(dataset, "e")["model"] == "agglo-lite"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="ffmpeg and ffprobe"):
        compute_embeddings(dataset, model, "e")


def test_wrong_collections_are_refused(fo, dataset, photographs, tmp_path):
    model = load_model("agglo-lite")
    with pytest.raises(ConfigError, match=r"no samples; add some"):
        compute_embeddings(dataset, model, "e")
    add(dataset, [tmp_path / "moved_1.jpg", tmp_path / "moved_2.jpg"])
    with pytest.raises(ConfigError, match=r"none of the 2 images can be read; .*moved_1.*If the files moved"):
        compute_embeddings(dataset, model, "e", num_workers=0)
    dataset.set_values("filepath", [str(tmp_path / "moved_1.jpg")] * 2)
    with pytest.raises(ConfigError, match="none of the 2 images"):
        compute_embeddings(dataset, model, "e", num_workers=0)
    group = fo.Group()
    mixed = fo.Dataset()
    mixed.add_group_field("group", default="photo")
    mixed.add_samples(
        [
            fo.Sample(filepath=str(next(photographs.iterdir())), group=group.element("photo")),
            fo.Sample(filepath=str(tmp_path / "film.mp4"), group=group.element("film")),
        ]
    )
    with pytest.raises(ConfigError, match=r"several media types: .*select_group_slices"):
        compute_embeddings(mixed, model, "e")
    mixed.delete()


@pytest.fixture
def boxed(fo, dataset, photographs):
    """Three photographs: two boxes, none, one polyline's worth of a box."""
    add(dataset, sorted(photographs.glob("ch*"))[:3])
    boxes = [[0.1, 0.1, 0.5, 0.4], [0.5, 0.5, 0.5, 0.5]]
    for sample, found in zip(dataset, [boxes, [], boxes[:1]], strict=True):
        sample["boxes"] = fo.Detections(detections=[fo.Detection(label="x", bounding_box=box) for box in found])
        sample.save()
    return dataset


@pytest.mark.parametrize("text", [False, True])
def test_boxes_share_one_pass_per_image(boxed, text, monkeypatch):
    model = load_model("agglo-lite", text=text)
    counted = Counted(model, monkeypatch)
    found = compute_patch_embeddings(boxed, model, "boxes")
    assert counted.images == 2, "an image without boxes is not encoded"
    ids = boxed.values("id")
    assert [None if found[each] is None else found[each].shape for each in ids] == [
        (2, 384 if text else 472), None, (1, 384 if text else 472),
    ]  # fmt: skip
    if text:
        assert np.linalg.norm(found[ids[0]], axis=1) == pytest.approx([1, 1], abs=1e-5)
    compute_patch_embeddings(boxed, model, "boxes", "vector")
    stored = boxed.first()["boxes"].detections
    assert np.array_equal(np.stack([each["vector"] for each in stored]), found[ids[0]])


def test_a_box_of_the_whole_image_is_the_mean_of_the_map(fo, boxed):
    model = load_model("agglo-lite", output_type="spatial")
    sample = boxed.first()
    sample["whole"] = fo.Detections(detections=[fo.Detection(label="x", bounding_box=[0, 0, 1, 1])])
    sample.save()
    found = compute_patch_embeddings(boxed[:1], model, "whole")[sample.id]
    expected = model.features([sample.filepath])[0]["spatial"].mean((1, 2))
    assert np.allclose(found[0], expected, rtol=1e-4, atol=1e-5)


def test_fiftyones_own_patch_embeddings_work(boxed):
    """One pass per box: the vectors have the width of the summary."""
    model = load_model("agglo-lite")
    boxed.compute_patch_embeddings(model, "boxes", embeddings_field="own", num_workers=0)
    assert [each["own"].shape for each in boxed.first()["boxes"].detections] == [(1280,)] * 2


def test_views_of_patches_are_refused_and_of_frames_work(fo, boxed, dataset, photographs):
    model = load_model("agglo-lite")
    with pytest.raises(ConfigError, match=r"a view of patches: .*compute_patch_embeddings"):
        compute_embeddings(boxed.to_patches("boxes"), model, "e")
    video = fo.Sample(filepath="film.mp4")
    for number, path in enumerate(sorted(photographs.iterdir())[:2], 1):
        video.frames[number] = fo.Frame(filepath=str(path))
    films = fo.Dataset()
    films.add_sample(video)
    frames = films.to_frames()
    assert compute_embeddings(frames, model, "e", num_workers=0).computed == 2
    assert [each.shape for each in frames.values("e")] == [(1280,)] * 2
    assert [frame["e"].shape for frame in films.first().frames.values()] == [(1280,)] * 2
    films.delete()


def test_wrong_patches_are_refused(boxed):
    model = load_model("agglo-lite")
    with pytest.raises(ConfigError, match="no field 'bxes'"):
        compute_patch_embeddings(boxed, model, "bxes")
    with pytest.raises(ConfigError, match="without dots"):
        compute_patch_embeddings(boxed, model, "boxes", "a.b")
