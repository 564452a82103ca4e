"""``agglo fiftyone DIR``: results on more than 100 photographs, resuming, and bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import agglo
from agglo.integrations.fiftyone.pipeline import Settings, curate
from agglo.types import ConfigError
from support.fiftyone_app import server_version, wait_until
from support.network import free_port
from support.photographs import write_photographs

FAST = Settings(method="pca", max_size=224, num_workers=0, batch_size=4)


@pytest.fixture
def folder(tmp_path: Path, photographs: Path) -> Path:
    """Six photographs in a folder of a name of its own."""
    made = tmp_path / f"small_{tmp_path.name}"
    made.mkdir()
    for path in sorted(photographs.iterdir())[:6]:
        (made / path.name).write_bytes(path.read_bytes())
    return made


@pytest.fixture(autouse=True)
def _own_datasets(fo: Any) -> Iterator[None]:
    before = set(fo.list_datasets())
    yield
    for name in set(fo.list_datasets()) - before - {"photographs"}:
        fo.delete_dataset(name)


def stem(path: str) -> str:
    return Path(path).stem


# --- results ----------------------------------------------------------------------------------------------------------


def test_every_photograph_has_everything(curated, planted):
    dataset = curated.dataset
    assert len(dataset) == 116 + 12 and curated.failed == {} and dataset.persistent
    fields = ["radio", "radio_text", "radio_map", "radio_map_a_cup_of_coffee", "representativeness", "uniqueness"]
    assert {name: len(dataset.exists(name)) for name in fields} == dict.fromkeys(fields, 128)
    assert {"similarity", "text_similarity", "layout"} <= set(dataset.list_brain_runs())
    assert dataset.load_brain_results("layout").points.shape == (128, 2)
    assert set(dataset.list_saved_views()) == {"near duplicates", "unique first", "representative first"}


def test_embeddings_equal_agglo_embed(curated):
    paths, summary, text = curated.dataset.values(["filepath", "radio", "radio_text"])
    expected = agglo.embed(paths, "agglo-lite")
    assert np.array_equal(np.stack(summary), expected.summary)
    assert np.array_equal(np.stack(text), expected.aligned)


def test_planted_near_duplicates_are_found_and_nothing_else(curated, planted):
    _, copies = planted
    found = curated.dataset.exists("near_duplicate_of")
    pairs = {
        frozenset((stem(path), stem(original)))
        for path, original in zip(*found.values(["filepath", "near_duplicate_of"]), strict=True)
    }
    assert pairs == {frozenset((copy.stem, original.stem)) for copy, original in copies.items()}
    assert len(found) == 12
    assert all(0 <= distance <= 0.1 for distance in found.values("near_duplicate_distance"))
    view = curated.dataset.load_saved_view("near duplicates")
    shown = [stem(path).removesuffix("_again") for path in view.values("filepath")]
    assert shown[::2] == shown[1::2], "the two of a pair are neighbours"


def test_similarity_by_image(curated, planted):
    _, copies = planted
    ids = dict(zip(*curated.dataset.values(["filepath", "id"]), strict=True))
    for copy, original in copies.items():
        nearest = curated.dataset.sort_by_similarity(ids[str(copy)], k=2, brain_key="similarity").values("filepath")
        assert set(nearest) == {str(copy), str(original)}


@pytest.mark.parametrize(("text", "subject"), [("a cup of coffee", "coffee"), ("a motorcycle", "motorcycle_left")])
def test_similarity_by_text(curated, text, subject):
    best = curated.dataset.sort_by_similarity(text, k=3, brain_key="text_similarity").values("filepath")
    assert [stem(path)[: len(subject)] for path in best] == [subject] * 3


def test_heatmap_of_a_text(curated):
    names, maps = curated.dataset.values(["filepath", "radio_map_a_cup_of_coffee.map"])
    peaks = np.array([each.max() for each in maps], float)
    coffee = np.array([stem(name).startswith("coffee") for name in names])
    assert peaks[coffee].mean() > peaks[~coffee].mean() + 10


# --- again ------------------------------------------------------------------------------------------------------------


def computed(result: Any) -> dict[str, int]:
    return {step.name: step.done for step in result.steps if step.done}


def test_a_second_run_computes_only_what_is_new(folder, photographs):
    first = computed(curate(folder, settings=FAST))
    assert first["photographs"] == first["embeddings"] == first["heatmaps"] == 6 and len(first) == 9
    assert computed(curate(folder, settings=FAST)) == {}
    (folder / "new.jpg").write_bytes((photographs / "coffee_0_0.jpg").read_bytes())
    again = computed(curate(folder, settings=FAST))
    assert again["photographs"] == again["embeddings"] == again["heatmaps"] == 1 and again["uniqueness"] == 7


def test_a_changed_photograph_is_computed_again(folder, photographs):
    result = curate(folder, settings=FAST)
    path = sorted(folder.iterdir())[0]
    before = result.dataset[str(path)].radio
    path.write_bytes((photographs / "coffee_0_0.jpg").read_bytes())
    os.utime(path, ns=(1, 1))
    again = curate(folder, settings=FAST)
    assert computed(again)["embeddings"] == 1
    again.dataset.reload()
    assert not np.array_equal(again.dataset[str(path)].radio, before)


@pytest.mark.parametrize("step", ["embeddings", "heatmaps"])
def test_an_interrupted_run_continues(folder, step):
    def stop(name: str, done: int, total: int) -> None:
        if name == step and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate(folder, settings=FAST, progress=stop)
    again = computed(curate(folder, settings=FAST))
    assert again[step] <= 2, "the finished batch was kept"


def test_the_dataset_follows_a_moved_folder(folder, tmp_path):
    curate(folder, name="moving", settings=FAST)
    moved = folder.rename(tmp_path / "elsewhere")
    result = curate(moved, name="moving", settings=FAST)
    assert computed(result) == {} and "moved" in result.notes[0]
    assert all(Path(path).parent == moved for path in result.dataset.values("filepath"))


def test_photographs_that_were_deleted_are_reported(folder):
    curate(folder, settings=FAST)
    gone = sorted(folder.iterdir())[0]
    gone.unlink()
    assert any(str(gone) in note for note in curate(folder, settings=FAST).notes)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_files_cost_one_sample_each(folder):
    (folder / "cut.jpg").write_bytes(sorted(folder.iterdir())[0].read_bytes()[:800])
    (folder / "text.jpg").write_text("not an image")
    ramp = np.add.outer(np.arange(90), np.arange(120))
    Image.fromarray(ramp.astype(np.uint8)).save(folder / "grey.png")
    Image.fromarray((ramp * 300).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.dstack([ramp] * 4).astype(np.uint8), "RGBA").save(folder / "alpha.png")
    (folder / "notes.txt").write_text("left out")
    result = curate(folder, settings=FAST)
    assert sorted(Path(path).name for path in result.failed) == ["cut.jpg", "text.jpg"]
    assert len(result.dataset) == 11 and len(result.dataset.exists("radio")) == 9
    assert "truncated" in result.failed[str(folder / "cut.jpg")]
    assert computed(curate(folder, settings=FAST)) == {}, "bad files are not tried again"
    (folder / "cut.jpg").write_bytes((folder / "grey.png").read_bytes())
    assert sorted(Path(path).name for path in curate(folder, settings=FAST).failed) == ["text.jpg"]


def test_datasets_that_do_not_fit_are_refused(fo, folder, photographs, tmp_path):
    fo.Dataset("by_hand", persistent=True)
    with pytest.raises(ConfigError, match=r"'by_hand' exists and was not made.*--name"):
        curate(folder, name="by_hand", settings=FAST)
    fo.Dataset("films").add_sample(fo.Sample(filepath=str(tmp_path / "film.mp4")))
    with pytest.raises(ConfigError, match=r"'films' holds media of type video"):
        curate(folder, name="films", settings=FAST)
    curate(folder, name="taken", settings=FAST)
    with pytest.raises(ConfigError, match=r"belongs to the folder .*small_"):
        curate(photographs, name="taken", settings=FAST)
    with pytest.raises(ConfigError, match=r"has embeddings of agglo-lite, not of other"):
        curate(folder, name="taken", settings=Settings(model="other"))
    with pytest.raises(ConfigError, match=r"has heatmaps of max_size 224, not None"):
        curate(folder, name="taken", settings=Settings())


def test_results_of_other_weights_are_not_mixed_in(folder, photographs):
    result = curate(folder, settings=FAST)
    field = result.dataset.get_field("radio")
    field.info = {"agglo": {**field.info["agglo"], "hash": "0000"}}
    field.save()
    (folder / "new.jpg").write_bytes((photographs / "coffee_0_0.jpg").read_bytes())
    with pytest.raises(ConfigError, match=r"'radio' .* computed with another hash of agglo-lite"):
        curate(folder, settings=FAST)


def test_settings_and_folders_that_are_wrong_are_refused(tmp_path, folder):
    with pytest.raises(ConfigError, match="does not exist"):
        curate(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        curate(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"method: 'umpa' is not one of umap, tsne, pca"):
        curate(folder, settings=Settings(method="umpa"))
    with pytest.raises(ConfigError, match=r"threshold: 3 is not a cosine distance"):
        curate(folder, settings=Settings(threshold=3))
    with pytest.raises(ConfigError, match="agglo-lite"):
        curate(folder, settings=Settings(model="agglo-litte"))


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agglo", "fiftyone", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_the_command_serves_the_app_until_it_is_interrupted(fo, tmp_path):
    write_photographs(tmp_path / "command", 6)
    port = free_port()
    options = ("--method", "pca", "--max-size", 224, "--workers", 0, "--remote", "--port", port)
    process = command(tmp_path / "command", *options)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    reader.start()
    try:
        wait_until(lambda: process.poll() is not None or server_version(port), "the App's start", 180)
        wait_until(lambda: process.poll() is not None or any("Ctrl-C" in line for line in lines), "the message")
        process.send_signal(signal.SIGINT)
        assert process.wait(180) == 0, process.stderr and process.stderr.read()
    finally:
        process.kill()
        reader.join()
        if process.stderr:
            process.stderr.close()
        if process.stdout:
            process.stdout.close()
    text = "".join(lines)
    assert "6 in dataset 'command', 6 new" in text and f"http://127.0.0.1:{port}/datasets/command" in text
    wait_until(lambda: server_version(port) is None, "the end of the App's server", 30)


NO_FIFTYONE = """
import sys
sys.modules['fiftyone'] = None
from agglo.cli.main import app
app(['fiftyone', sys.argv[1], '--no-app'])
"""


def test_a_missing_fiftyone_is_named(photographs):
    result = subprocess.run(
        [sys.executable, "-c", NO_FIFTYONE, str(photographs)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert "fiftyone" in result.stderr and "[fiftyone]" in result.stderr and "Traceback" not in result.stderr


def test_an_unreachable_database_is_named(folder):
    uri = f"mongodb://127.0.0.1:{free_port()}/?serverSelectionTimeoutMS=500"
    process = command(folder, "--no-app", FIFTYONE_DATABASE_URI=uri)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 2, errors
    assert "cannot be reached" in errors and "Traceback" not in errors
