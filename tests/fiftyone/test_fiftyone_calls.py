"""What FiftyOne's own calls leave in the dataset, and how they end: records, failures, videos, workers, windows."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import agglo
from agglo.integrations.fiftyone import apply_model, compute_embeddings, load_model
from agglo.integrations.fiftyone.records import field_record
from agglo.types import ImageError
from support.checkpoints import ARGS, official_state

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffprobe"), reason="ffmpeg and ffprobe are not installed")


def add(dataset, paths):
    import fiftyone

    dataset.add_samples([fiftyone.Sample(filepath=str(path)) for path in paths])
    return dataset


def video(path, source, seconds=1):
    command = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", f"{source}:rate=5:duration={seconds}", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def plain():
    return load_model("agglo-lite")


# --- records ----------------------------------------------------------------------------------------------------------


def test_plain_calls_record_model_size_and_dtype(dataset, photographs, plain):
    add(dataset, sorted(photographs.iterdir())[:3])
    dataset.compute_embeddings(plain, embeddings_field="e", num_workers=0)
    record = field_record(dataset, "e")
    assert record == plain.record()
    assert (record["model"], record["size"], record["dtype"]) == ("agglo-lite", "224x224 centre square", "float32")
    several = load_model("agglo-lite", output_type="all", maps=["pca", "norm"], max_size=224)
    dataset.apply_model(several, "m", num_workers=0)
    dataset.apply_model(several, {"summary": "own", "pca": "first", "norm": "second"}, num_workers=0)
    for name in ("m_summary", "m_pca", "m_norm", "own", "first", "second"):
        assert field_record(dataset, name) == several.record(), name
    assert compute_embeddings(dataset, plain, "e").reused == 3, "the incremental function continues a plain call"
    assert dataset.compute_embeddings(plain, num_workers=0).shape == (3, 1280)


def test_a_view_of_another_size_is_reported(dataset, photographs, plain, caplog):
    add(dataset, sorted(photographs.iterdir())[:3])
    dataset.compute_embeddings(plain, embeddings_field="e", num_workers=0)
    dataset[:1].compute_embeddings(plain, embeddings_field="e", num_workers=0)
    assert "not comparable" not in caplog.text
    dataset[:1].compute_embeddings(load_model("agglo-lite", max_size=96), embeddings_field="e", num_workers=0)
    assert "field 'e': samples outside of this view keep results of agglo-lite with another size" in caplog.text


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_failures_that_must_not_be_skipped_are_raised(dataset, photographs, tmp_path, plain, workers):
    files = sorted(photographs.iterdir())[:4]
    bad = tmp_path / "bad.jpg"
    bad.write_text("not an image")
    add(dataset, [*files[:2], bad, *files[2:]])
    options = {"num_workers": workers, "batch_size": 2}
    with pytest.raises(ImageError, match=r"bad\.jpg: "):
        dataset.compute_embeddings(plain, embeddings_field="e", skip_failures=False, **options)
    assert [each is not None for each in dataset.values("e")] == [True, True, False, False, False]
    assert [each is not None for each in dataset.values("agglo_error")] == [False, False, True, False, False]
    with pytest.raises(ImageError, match=r"bad\.jpg: "):
        compute_embeddings(dataset, plain, "e", skip_failures=False, **options)
    assert list(compute_embeddings(dataset, plain, "e", **options).skipped) == [str(bad)]
    assert len(dataset.exists("e")) == 4


def test_other_errors_are_not_hidden(dataset, photographs, monkeypatch):
    """FiftyOne would log them and leave the samples empty."""
    model = load_model("agglo-lite")

    def fails(*_, **__):
        raise MemoryError("no memory left")

    monkeypatch.setattr(model.model, "forward", fails)
    add(dataset, sorted(photographs.iterdir())[:2])
    with pytest.raises(MemoryError):
        compute_embeddings(dataset, model, "e", num_workers=0)
    assert not model.always_skip


# --- videos -----------------------------------------------------------------------------------------------------------


@needs_ffmpeg
def test_frames_are_recorded_and_share_a_scale_of_all_videos(fo, dataset, tmp_path, plain):
    sources = ["color=c=black:size=96x64", "testsrc=size=96x64", "color=c=white:size=96x64"]
    paths = [video(tmp_path / f"{i}.mp4", source) for i, source in enumerate(sources)]
    other = add(fo.Dataset(), paths[::-1])
    add(dataset, paths)
    model = load_model("agglo-lite", output_type="spatial", maps="norm")
    dataset.apply_model(model, "frames.heat", batch_size=2)
    dataset.compute_embeddings(plain, embeddings_field="e", batch_size=2)
    assert field_record(dataset, "heat") == model.record() and field_record(dataset, "e") == plain.record()
    limits = {(f["heat"].low, f["heat"].high) for sample in dataset for f in sample.frames.values()}
    assert len(limits) == 1
    other.limit(1).apply_model(load_model("agglo-lite", output_type="spatial", maps="norm"), "heat", batch_size=2)
    first = other.first().frames[1]["heat"]
    assert (first.low, first.high) in limits, "the scale depends on which video came first"


@needs_ffmpeg
def test_a_broken_video_costs_one_sample(dataset, tmp_path, plain, caplog):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    good = video(tmp_path / "good.mp4", "testsrc=size=96x64")
    add(dataset, [tmp_path / "broken.mp4", good])
    apply_model(dataset, load_model("agglo-lite", output_type="spatial"), "heat", batch_size=2)
    compute_embeddings(dataset, plain, "e", batch_size=2)
    assert "no frames of" in caplog.text
    assert [len(sample.frames) for sample in dataset][1] == 5
    assert all(frame["e"] is not None and frame["heat"] is not None for frame in dataset.last().frames.values())


# --- workers ----------------------------------------------------------------------------------------------------------

IN_WORKERS = """
import multiprocessing, sys
import fiftyone as fo
from agglo.integrations.fiftyone import load_model

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1], force=True)  # importing FiftyOne sets fork
    dataset = fo.load_dataset(sys.argv[2])
    options = {"batch_size": 2, "num_workers": 1, "skip_failures": False}
    dataset.compute_embeddings(load_model("agglo-lite"), embeddings_field="e", **options)
    dataset.apply_model(load_model("agglo-lite", output_type="spatial", max_size=96), "m", **options)
    print(multiprocessing.get_start_method())
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_fiftyone_s_loop_works_with_workers_that_do_not_fork(dataset, photographs, tmp_path, method):
    """The defaults of macOS and Windows (spawn) and of Python 3.14 on Linux (forkserver)."""
    script = tmp_path / "workers.py"
    script.write_text(IN_WORKERS)
    files = sorted(photographs.iterdir())[:3]
    add(dataset, files)
    dataset.persistent = True  # another process would delete it at its end
    result = subprocess.run(
        [sys.executable, script, method, dataset.name], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert result.stdout.strip().endswith(method), result.stderr
    dataset.reload()
    np.testing.assert_allclose(np.stack(dataset.values("e")), agglo.embed(files, batch=2).summary, rtol=1e-5, atol=1e-5)
    assert len(dataset.exists("m")) == 3


# --- windows ----------------------------------------------------------------------------------------------------------


def test_window_reaches_the_student(dataset, photographs, tmp_path, monkeypatch):
    path = tmp_path / "c.pth.tar"
    torch.save({"state_dict": official_state(), "args": argparse.Namespace(**ARGS)}, path)
    add(dataset, sorted(photographs.iterdir())[:2])
    for options in ({"output_type": "spatial", "max_size": 96}, {"max_size": 64}):
        model = load_model(path, window=2, **options)
        real, seen = model.model.forward, []

        def forward(images, *args, real=real, seen=seen, **kwargs):
            seen.append((kwargs["window"], *images.shape[2:]))
            return real(images, *args, **kwargs)

        monkeypatch.setattr(model.model, "forward", forward)
        dataset.apply_model(model, "heat", num_workers=0) if len(options) == 2 else dataset.compute_embeddings(
            model, embeddings_field="e", num_workers=0
        )
        assert {window for window, *_ in seen} == {2}
        step = model.model.step(2)
        assert all(height % step == width % step == 0 for _, height, width in seen)
    assert field_record(dataset, "e")["window"] == 2 and len(dataset.exists("e")) == len(dataset.exists("heat")) == 2
