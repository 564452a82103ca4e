"""A run folder has one writer, and files that agglo did not write are never replaced."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agglo import recipe
from agglo.exports.base import export
from agglo.files import LOCK, exclusive
from agglo.model.artefact import write_tensors
from agglo.model.model import Model
from agglo.report.page import check_page
from agglo.training import loop
from agglo.training.folder import locked_run
from agglo.training.run import train
from agglo.types import ConfigError
from support.training import tiny

pytestmark = pytest.mark.training

HOLD = "import sys, time, pathlib; from agglo.training.folder import locked_run\n"
HOLD += "with locked_run(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@contextlib.contextmanager
def other_process(folder: Path):
    """Another process that holds the lock of a run folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_live_run_is_neither_resumed_nor_overwritten(data: Path, tmp_path: Path, flag: str) -> None:
    run, made = tmp_path / "run", tiny(data, "train.steps=2", "train.save_every=1")
    loop.train_model(made, run, quiet=True)
    before = files(run)
    with other_process(run) as process:
        with pytest.raises(ConfigError, match=rf"another process is writing to .*run \(process {process.pid}\): wait"):
            loop.train_model(made, run, quiet=True, **{flag: True})
        assert files(run) == before
        process.send_signal(signal.SIGKILL)  # the lock goes with the process
        process.wait()
        loop.train_model(made, run, quiet=True, **{flag: True})
    assert not (run / LOCK).exists()


def test_lock_is_held_until_the_stack_is_closed(data: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as held:
        loop.train_model(tiny(data, "train.steps=1"), tmp_path / "run", quiet=True, held=held)
        with pytest.raises(ConfigError, match="another process is writing"), locked_run(tmp_path / "run"):
            pass
    with locked_run(tmp_path / "run"):
        pass


def test_refused_recipe_leaves_no_folder(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        loop.train_model(tiny(data, "partitions.0.sizes=[7]"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match="not a run folder"):
        loop.train_model(tiny(data), tmp_path / "photos", overwrite=True, quiet=True)
    assert files(tmp_path / "photos") == {"a.jpg": b"x"}


def test_lock_is_passed_from_writer_to_writer(tmp_path: Path) -> None:
    """Many short writers: two of them never hold it at once, although each removes the file."""
    code = (
        "import sys, pathlib, time; from agglo.files import exclusive; from agglo.types import ConfigError\n"
        "folder, taken = pathlib.Path(sys.argv[1]), 0\n"
        "while taken < 40:\n"
        "    try:\n"
        "        with exclusive(folder, ''):\n"
        "            taken += 1; (folder / 'one').open('x').close(); (folder / 'one').unlink()\n"
        "    except ConfigError: pass\n"
    )
    (tmp_path / "shared").mkdir()
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "shared")]) for _ in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]


def test_folder_that_exists_is_kept_when_nothing_is_written(tmp_path: Path) -> None:
    with exclusive(tmp_path, ""):
        assert (tmp_path / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []


def test_run_folder_is_a_recipe(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(data, "train.steps=1"), run, evals=False, report=False, quiet=True)
    with pytest.raises(ConfigError, match="--resume"):
        train(run, quiet=True)
    assert train(str(run), resume=True, evals=False, report=False, quiet=True).spec.summary
    recipe_file = tmp_path / "mine.yaml"
    recipe_file.write_text(recipe.load(run).to_yaml())
    made = train(recipe_file, tmp_path / "two", overrides={"train.steps": 2}, evals=False, report=False, quiet=True)
    assert made.provenance["steps"] == 2
    assert train(tiny(data), tmp_path / "three", overrides=["train.steps=1"], evals=False, report=False, quiet=True)
    assert recipe.load(tmp_path / "three").train.steps == 1


def test_overwriting_a_run_of_stages_removes_its_stages(data: Path, tmp_path: Path) -> None:
    stages = "stages=[{name: one}, {name: two}]"
    for overwrite in (False, True):
        loop.train_model(tiny(data, "train.steps=1", stages), tmp_path / "run", overwrite=overwrite, quiet=True)


# --- files of others --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model({"kind": "vit", "width": 64, "depth": 1, "heads": 2, "max_grid": 8}, {}, preferred_size=64).eval()


WRITERS = {
    "save": lambda model, folder: model.save(folder),
    "transformers": lambda model, folder: export(model, "transformers", folder),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_files_of_the_user_are_not_replaced(kind: str, name: str, model: Model, tmp_path: Path) -> None:
    if name == "model.safetensors":
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    else:
        (tmp_path / name).write_text('{"my": "own"}')
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=r"did not write|another layout"):
        WRITERS[kind](model, tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", WRITERS)
def test_own_files_are_replaced_unless_they_were_edited(kind: str, model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    WRITERS[kind](model, folder)
    (folder / "notes.txt").write_text("mine")
    first = files(folder)
    WRITERS[kind](model, folder)
    assert files(folder) == first  # the same tensors give the same bytes
    (folder / "README.md").write_text("my own words")
    with pytest.raises(ConfigError, match=r"holds README\.md, which agglo did not write \(or which was edited since\)"):
        WRITERS[kind](model, folder)
    assert (folder / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("kind", [*WRITERS, "timm"])
def test_weights_have_the_same_bytes_in_every_folder(kind: str, model: Model, tmp_path: Path) -> None:
    write = WRITERS.get(kind, lambda model, folder: export(model, "timm", folder))
    folders = [tmp_path / name for name in ("a", "another name", "s1")]
    for folder in folders:
        write(model, folder)
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    write(model, folders[0].rename(tmp_path / "renamed"))


def test_folders_of_earlier_versions_are_replaced(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path)
    write_tensors(model.state_dict(), tmp_path / "model.safetensors")  # without hashes of the texts
    (tmp_path / "README.md").write_text("another card")
    model.save(tmp_path)


def test_equal_tensors_give_equal_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, torch; from agglo.model.artefact import write_tensors\n"
        "tensors = {'b': torch.arange(3.), 'a': torch.zeros(2, dtype=torch.int64)}\n"
        "write_tensors(tensors, pathlib.Path(sys.argv[1]), {'z.md': '1', 'a.json': '2'})"
    )
    found = set()
    for index in range(4):
        path = tmp_path / f"{index}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        found.add(path.read_bytes())
    assert len(found) == 1
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) and file.get_tensor("b").tolist() == [0, 1, 2]


def test_page_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>mine")
    with pytest.raises(ConfigError, match="is not a report of agglo"):
        check_page(tmp_path / "report.html")
    check_page(tmp_path / "none.html")
