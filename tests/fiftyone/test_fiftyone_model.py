"""The model in FiftyOne's loops: equal to agglo.embed, batched, tolerant of bad files, picklable."""

from __future__ import annotations

import argparse
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import agglo
from agglo.integrations.fiftyone import load_model
from agglo.integrations.fiftyone.reading import InputSize, ReadSample, read
from agglo.types import ConfigError
from support.checkpoints import ARGS, TEACHERS, official_state, tiny_siglip2

TEXT_WIDTH = 40


def add(dataset, paths):
    import fiftyone

    dataset.add_samples([fiftyone.Sample(filepath=str(path)) for path in paths])
    return dataset


@pytest.fixture(scope="module")
def plain():
    return load_model("agglo-lite")


@pytest.fixture(scope="module")
def spatial():
    return load_model("agglo-lite", output_type="spatial")


def test_embeddings_equal_agglo_embed_bit_for_bit(dataset, photographs, tmp_path, plain):
    files = sorted(photographs.iterdir())[:40]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(files[0].read_bytes()[:200])
    add(dataset, [*files[:5], bad, *files[5:]])
    dataset.compute_embeddings(plain, embeddings_field="e", num_workers=2)
    found = dataset.values("e")
    expected = agglo.embed([*files[:5], bad, *files[5:]])
    assert found[5] is None
    assert list(expected.skipped) == [str(bad)]
    assert np.array_equal(np.stack(found[:5] + found[6:]), expected.summary)


def test_text_embeddings_equal_agglo_embed_bit_for_bit(dataset, photographs):
    files = sorted(photographs.iterdir())[:12]
    model = load_model("agglo-lite", text=True)
    add(dataset, files).compute_embeddings(model, embeddings_field="t", num_workers=0)
    assert np.array_equal(np.stack(dataset.values("t")), agglo.embed(files).aligned)
    assert model.can_embed_prompts
    assert np.linalg.norm(model.embed_prompts(["a cup", "a dog"]), axis=1) == pytest.approx([1, 1])


def test_a_bad_file_costs_one_sample_and_leaves_its_reason(dataset, photographs, tmp_path, plain):
    files = sorted(photographs.iterdir())[:6]
    late = tmp_path / "late.jpg"
    add(dataset, [*files[:3], tmp_path / "moved.jpg", late, *files[3:]])
    dataset.compute_embeddings(plain, embeddings_field="e", num_workers=0)
    assert [each is None for each in dataset.values("e")] == [False] * 3 + [True] * 2 + [False] * 3
    reasons = dataset.values("agglo_error")
    assert all("no such file" in reason for reason in reasons[3:5])
    assert [reason for reason in reasons if reason is not None] == reasons[3:5]
    shutil.copy(files[0], late)
    dataset.compute_embeddings(plain, embeddings_field="e", num_workers=0)
    assert [reason is not None for reason in dataset.values("agglo_error")] == [i == 3 for i in range(8)]


def test_embeddings_without_a_field_need_readable_images(dataset, photographs, tmp_path, plain):
    add(dataset, [*sorted(photographs.iterdir())[:2], tmp_path / "moved.jpg"])
    with pytest.raises(ConfigError, match=r"1 images cannot be read .*no such file.*embeddings_field"):
        dataset.compute_embeddings(plain, num_workers=0)
    assert dataset.exists("agglo_error", False).compute_embeddings(plain, num_workers=0).shape == (2, 1280)


def test_every_kind_of_image_is_read_upright(dataset, tmp_path, spatial):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    add(dataset, [tmp_path / name for name in ("grey.png", "alpha.png", "sixteen.png", "turned.jpg")])
    dataset.apply_model(spatial, "heat", num_workers=0)
    shapes = [each.map.shape for each in dataset.values("heat")]
    assert shapes[:3] == [(14, 32)] * 3
    assert shapes[3] == (32, 14)
    dataset.compute_metadata()
    width, height = dataset.last().metadata.width, dataset.last().metadata.height
    assert (height > width) == (shapes[3][0] > shapes[3][1]), "FiftyOne measures the upright image, as the map"


def test_batches_of_mixed_sizes_equal_single_images(tmp_path, spatial):
    rng = np.random.default_rng(1)
    sizes = [(40, 60), (60, 40), (40, 60), (50, 50), (60, 40), (30, 90), (40, 60)]
    arrays = [rng.integers(0, 255, (*size, 3)).astype(np.uint8) for size in sizes]
    together = spatial.features(arrays)
    for array, found in zip(arrays, together, strict=True):
        (alone,) = spatial.features([array])
        for name, values in alone.items():
            assert np.abs(found[name] - values).max() <= 1e-5 * np.abs(values).max()


def test_feature_format_nlc_is_the_transposed_map(spatial):
    array = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    (first,) = spatial.features([array])
    model = load_model("agglo-lite", output_type="spatial", feature_format="NLC")
    (second,) = model.features([array])
    channels = first["spatial"].shape[0]
    assert np.array_equal(second["spatial"], first["spatial"].reshape(channels, -1).T)
    assert model.predict(array).map.shape == first["spatial"].shape[1:]


def test_the_default_batch_is_not_one_image(fo, dataset, photographs):
    model = load_model("agglo-lite", batch_size=4)
    sizes = []
    real = model.embed_all
    model.embed_all = lambda items: (sizes.append(len(items)), real(items))[1]
    add(dataset, sorted(photographs.iterdir())[:10]).compute_embeddings(model, embeddings_field="e", num_workers=0)
    assert sizes == [4, 4, 2]
    assert fo.config.default_batch_size is None, "the setting is restored"


def test_no_result_is_missing_from_a_batch(plain):
    array = np.zeros((30, 30, 3), np.uint8)
    found = plain.embed_all([array, "no-such-file.jpg", array])
    assert len(found) == 3
    assert found[1] is None
    assert np.array_equal(found[0], found[2])


def test_workers_unpickle_the_reader(photographs):
    reader = pickle.loads(pickle.dumps(ReadSample(InputSize(64, 32, square=True))))
    item = reader({"filepath": str(next(photographs.iterdir())), "id": "1", "_dataset_id": "2"})
    assert item.pixels.shape == (3, 64, 64)
    assert (item.sample, item.dataset) == ("1", "2")


def test_the_loader_works_with_spawned_workers(photographs, tmp_path):
    """The default on macOS, Windows and (forkserver) Python 3.14; importing FiftyOne sets fork, hence a new process."""
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing, sys, torch\n"
        "from agglo.integrations.fiftyone.reading import InputSize, ReadSample, collate\n"
        "class Paths(torch.utils.data.Dataset):\n"
        "    def __init__(self, paths): self.paths, self.get = paths, ReadSample(InputSize(64, 32, True))\n"
        "    def __len__(self): return len(self.paths)\n"
        "    def __getitem__(self, i): return self.get({'filepath': self.paths[i]})\n"
        "if __name__ == '__main__':\n"
        "    loader = torch.utils.data.DataLoader(Paths(sys.argv[1:]), 2, num_workers=1, collate_fn=collate,\n"
        "        multiprocessing_context='spawn')\n"
        "    print([tuple(item.pixels.shape) for batch in loader for item in batch])\n"
    )
    files = [str(path) for path in sorted(photographs.iterdir())[:3]]
    result = subprocess.run([sys.executable, script, *files], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == str([(3, 64, 64)] * 3), result.stderr


def test_wrong_keywords_of_a_call_are_refused(dataset, photographs, plain, spatial):
    add(dataset, sorted(photographs.iterdir())[:1])
    with pytest.raises(ConfigError, match=r"unknown keyword 'smoothing'.*load_model"):
        dataset.apply_model(spatial, "heat", smoothing=True)
    with pytest.raises(ValueError, match="Unknown key 'smoothing'"):
        dataset.compute_embeddings(plain, embeddings_field="e", smoothing=True)


def test_another_field_can_hold_the_path(dataset, photographs, plain):
    files = sorted(photographs.iterdir())[:2]
    add(dataset, files[:1])
    dataset.set_values("thumbnail", [str(files[1])])
    dataset.compute_embeddings(plain, embeddings_field="e", num_workers=0, filepath="thumbnail")
    assert np.array_equal(dataset.first()["e"], agglo.embed(files[1:]).summary[0])


def test_a_model_without_text_refuses_prompts(plain, tmp_path):
    with pytest.raises(ConfigError, match="loaded without text=True"):
        plain.embed_prompt("a cup")
    model = agglo.load("agglo-lite")
    model.keep_heads(["lite2"])
    folder = model.save(tmp_path / "plain")
    with pytest.raises(ConfigError, match="no text tower"):
        load_model(folder, text=True)
    with pytest.raises(ConfigError, match="no text tower"):
        load_model(folder, output_type="spatial", text="a cup")


def test_what_a_model_lacks_is_named():
    with pytest.raises(ConfigError, match="device: 'cuda:99' is not available; use cpu"):
        load_model("agglo-lite", device="cuda:99")
    with pytest.raises(ConfigError, match=r"did you mean 'agglo-lite'"):
        load_model("agglo-lit")
    with pytest.raises(ConfigError, match=r"did you mean 'nv_labs/c-radio_v4-h'"):
        load_model("nv_labs/c-radio_v4-hh")
    with pytest.raises(ConfigError, match=r"heads: no head 'lite3'; did you mean 'lite2'"):
        load_model("agglo-lite", heads="lite3")
    with pytest.raises(ConfigError, match=r"size 100: .*multiple of 32"):
        load_model("agglo-lite", max_size=100)
    with pytest.raises(ConfigError, match=r"maps: 'heads' needs heads"):
        load_model("agglo-lite", output_type="spatial", maps="heads", heads="conse")


def test_the_published_processor_keeps_the_whole_image():
    model = load_model("agglo-lite", use_external_preprocessor=True)
    item = read(np.zeros((100, 200, 3), np.uint8), model.size)
    assert item.pixels.shape == (3, 224, 448)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A small C-RADIOv4 in NVIDIA's layout, whose first teacher has a text tower in a local folder."""
    folder = tmp_path_factory.mktemp("official")
    (folder / "tower").mkdir()
    tiny_siglip2(folder / "tower", "siglip")
    state = official_state()
    torch.manual_seed(1)
    for key in ("weight", "bias"):
        name = f"_heads.0.final.2.{key}"
        state[name] = torch.randn(TEXT_WIDTH, *state[name].shape[1:])
    teachers = [{**TEACHERS[0], "model": str(folder / "tower")}, *TEACHERS[1:]]
    torch.save(
        {"state_dict": state, "args": argparse.Namespace(**{**ARGS, "teachers": teachers})}, folder / "c.pth.tar"
    )
    return folder / "c.pth.tar"


def test_an_official_checkpoint_has_text_and_heads(dataset, photographs, official):
    files = sorted(photographs.iterdir())[:4]
    add(dataset, files)
    text = load_model(official, text=True, max_size=64)
    dataset.compute_embeddings(text, embeddings_field="t", num_workers=0)
    assert np.array_equal(np.stack(dataset.values("t")), agglo.embed(files, official, size=64).aligned)
    assert text.embed_prompt("a cat").shape == (TEXT_WIDTH,)
    names = [each["name"] for each in TEACHERS]
    every = load_model(official, output_type="all", heads=names, maps=["pca", "heads"], text="a cat", max_size=96)
    dataset.apply_model(every, "m", num_workers=0)
    assert dataset.first()["m_a_cat"].map.shape == dataset.first()["m_pca"].map.shape
    assert {f"m_{key}" for key in every.result_keys()} <= set(dataset.first().field_names)
    plain = load_model(official, max_size=64)
    assert plain.hash == load_model(official, output_type="spatial", heads=names[:1]).hash


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="ffmpeg and ffprobe are not installed")
@pytest.mark.parametrize("batch_size", [None, 3])
def test_frames_of_videos(dataset, tmp_path, plain, spatial, batch_size):
    video = tmp_path / "moving.mp4"
    subprocess.run(
        ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=size=96x64:rate=5:duration=1", str(video)],
        check=True,
    )
    add(dataset, [video])
    dataset.compute_embeddings(plain, embeddings_field="e", batch_size=batch_size)
    dataset.apply_model(spatial, "heat", batch_size=batch_size)
    frames = [dataset.first().frames[n] for n in range(1, 6)]
    assert {frame["e"].shape for frame in frames} == {(1280,)}
    assert {frame["heat"].map.shape for frame in frames} == {(22, 32)}
    assert len(dataset.info["agglo"]["scales"]) == 1


def test_the_dtype_is_float32_on_the_cpu(plain):
    assert plain.record()["dtype"] == "float32" or torch.cuda.is_available()
