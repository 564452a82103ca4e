"""The command line: output, refusals, exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from agglo import config, recipe
from agglo.model.model import HeadConfig, Model
from agglo.results.records import read
from support.commands import agglo
from support.training import COMMAND_RECIPE

pytestmark = pytest.mark.processes

RECIPE = (
    COMMAND_RECIPE
    + """\
evals: [{{kind: agreement, sources: [{{kind: folder, path: {folder}}}]}}]
smoke: [train.steps=1]
"""
)


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that is refused."""
    result = agglo(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("agglo: "), result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tiny = Model({"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8}, {}, preferred_size=64)
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    root.mkdir()
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(root / f"{index}.png")
    return root


@pytest.fixture
def bad(folder: Path) -> Path:
    """A truncated image beside the good ones."""
    path = folder / "3b.png"
    path.write_bytes((folder / "3.png").read_bytes()[:200])
    return path


@pytest.fixture
def yaml(tmp_path: Path, folder: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return path


# --- help and refused commands ----------------------------------------------------------------------------------------


def test_help_lists_every_command_without_importing_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom agglo.cli.main import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'timm') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("train", "eval", "compare", "embed", "search", "view", "models", "kinds", "recipes", "report"):
        assert f" {command} " in out
    assert out.strip().endswith("[]")


def test_unknown_command_suggests_the_nearest() -> None:
    result = agglo("serch")
    assert result.exit_code == 2
    assert "Did you mean 'search'" in result.stderr


def test_version() -> None:
    import agglo as package

    assert agglo("--version").stdout.strip() == f"agglo {package.__version__}"


def test_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGGLO_TRACEBACK", "1")
    assert isinstance(agglo("train", "nothing").exception, config.ConfigError)


# --- lists ------------------------------------------------------------------------------------------------------------


def test_kinds_lists_every_kind_of_every_point() -> None:
    out = agglo("kinds").stdout
    for point in config.POINTS:
        assert point in out
        assert all(kind in out for kind in config.kinds(point))


def test_kinds_shows_keys_types_and_defaults() -> None:
    out = agglo("kinds", "students", "vit").stdout
    for line in (("width", "int", "192"), ("cls_per_teacher", "bool", "true"), ("mlp_ratio", "float", "4.0")):
        assert any(row.split() == list(line) for row in out.splitlines()), line
    assert "2312.06709" in out  # the docstring follows


def test_unknown_points_and_kinds_suggest_the_nearest() -> None:
    assert "did you mean 'losses'" in refused("kinds", "lossess")
    assert "did you mean 'cosine'" in refused("kinds", "losses", "cosin")


def test_recipes_and_models_are_listed() -> None:
    out = agglo("recipes").stdout
    assert all(name in out for name in recipe.names())
    assert "agglo train quickstart" in agglo("recipes", "quickstart").stdout
    assert "did you mean 'quickstart'" in refused("recipes", "quikstart")
    models = " ".join(agglo("models").stdout.split())
    assert "agglo-lite" in models
    assert "c-radio_v4-h 652.0 M about 1.3 GB NVIDIA" in models
    assert "radio_v2.5-h 652.0 M about 2.6 GB" in models
    assert "2 bytes per weight if the name of the torch.hub file contains half or bf16, else 4" in models


# --- embed ------------------------------------------------------------------------------------------------------------


def test_embed_skips_and_names_unreadable_images(model: Path, folder: Path, bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    result = agglo("embed", folder, "-o", out, "--model", model, "--size", 32)
    assert result.exit_code == 0, result.output
    assert "wrote 6 images" in result.stdout
    assert "skipped 1 image:" in result.stderr
    assert str(bad) in result.stderr
    with np.load(out) as file:
        assert file["path"].tolist() == [str(folder / f"{i}.png") for i in range(6)]
        assert file["summary"].shape == (6, 32)
        assert json.loads(str(file["metadata"]))["agglo.model"] == str(model)


def test_embed_refuses_bad_options_before_encoding(model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(b"mine")
    assert "--overwrite" in refused("embed", folder, "-o", out, "--model", model)
    assert out.read_bytes() == b"mine"
    assert agglo("embed", folder, "-o", out, "--model", model, "--overwrite").exit_code == 0
    assert out.read_bytes() != b"mine"
    assert ".parquet or .npz" in refused("embed", folder, "-o", tmp_path / "x.csv", "--model", model)
    assert "64 or 80" in refused("embed", folder, "-o", tmp_path / "x.npz", "--model", model, "--size", 70)
    assert "no text tower" in refused("embed", folder, "-o", tmp_path / "x.npz", "--model", model, "--head", "clip")
    assert "nowhere' does not exist" in refused(
        "embed", tmp_path / "nowhere", "-o", tmp_path / "x.npz", "--model", model
    )
    assert "no model" in refused("embed", folder, "-o", tmp_path / "x.npz", "--model", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no image in" in refused("embed", tmp_path / "empty", "-o", tmp_path / "x.npz", "--model", model)
    assert not (tmp_path / "x.npz").exists()


# --- search -----------------------------------------------------------------------------------------------------------


class OneText(nn.Module):
    def __init__(self, vector: torch.Tensor) -> None:
        super().__init__()
        self.vector = vector

    def encode(self, texts: list[str]) -> torch.Tensor:
        assert texts == ["a cup of coffee"]
        return self.vector[None]


def test_search_ranks_the_right_image_first(folder: Path, bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = HeadConfig({"kind": "mlp", "hidden": 16}, None, 8, None, text={"kind": "minilm"})
    speaking = Model(
        {"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8}, {"say": head}, preferred_size=64
    )
    from agglo import embedding

    wanted = embedding.embed([folder / "4.png"], speaking).aligned
    speaking._towers["say"] = OneText(torch.from_numpy(wanted[0]))
    monkeypatch.setattr("agglo.zoo.loading.load", lambda name, **_: speaking)
    for words in (["a cup of coffee"], ["a", "cup", "of", "coffee"]):  # quotes forgotten
        result = agglo("search", folder, *words, "-k", 2)
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert len(lines) == 2
        assert lines[0].split() == ["1.000", str(folder / "4.png")]
        assert str(bad) in result.stderr
    photos = agglo("search", "--photos", "a cup of coffee", "-k", 3)
    assert photos.exit_code == 0, photos.output
    assert all("photos/" in line for line in photos.stdout.splitlines())


def test_search_refuses_missing_arguments(model: Path, folder: Path) -> None:
    assert "needs a folder and a text" in refused("search", "cat", "--model", model)
    assert "is empty" in refused("search", folder, " ", "--model", model)
    assert "at least 1" in refused("search", folder, "cat", "-k", 0, "--model", model)
    assert "no text tower" in refused("search", folder, "cat", "--model", model)


# --- view -------------------------------------------------------------------------------------------------------------


def test_view_writes_a_picture_of_all_readable_images(model: Path, folder: Path, bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "view.png"
    result = agglo("view", folder / "0.png", folder / "1.png", bad, "-o", out, "--model", model, "--size", 64)
    assert result.exit_code == 0, result.output
    assert str(bad) in result.stderr
    with Image.open(out) as picture:
        assert picture.width > 2 * 448
        assert picture.height > 2 * 373
        right = np.asarray(picture.convert("RGB"))[:373, 460:]
    assert right.reshape(-1, 3).std(0).min() > 10  # there is something to see, in all three colours


def test_view_refuses_bad_arguments(model: Path, folder: Path, bad: Path, tmp_path: Path) -> None:
    image, out = folder / "0.png", tmp_path / "v.png"
    before = image.read_bytes()
    assert "--overwrite" in refused("view", image, "-o", image, "--model", model)
    assert "is one of the images" in refused("view", image, "-o", image, "--overwrite", "--model", model)
    assert image.read_bytes() == before
    assert "none of the images" in refused("view", bad, "-o", out, "--model", model)
    assert "64 or 80" in refused("view", image, "-o", out, "--model", model, "--size", 70)
    assert "no.png' does not exist" in refused("view", tmp_path / "no.png", "-o", out, "--model", model)
    assert ".png" in refused("view", image, "-o", tmp_path / "v.txt", "--model", model)
    assert not out.exists()


# --- eval, train, report ----------------------------------------------------------------------------------------------


def test_eval_suggests_the_nearest_eval(model: Path, tmp_path: Path) -> None:
    assert "did you mean 'knn'" in refused("eval", model, "--evals", "kn")
    assert ".json" in refused("eval", model, "--json", tmp_path / "x.txt")
    assert "try --device cpu" in refused("eval", model, "--device", "gpu")


def test_print_writes_a_recipe_that_reads_back(yaml: Path, tmp_path: Path) -> None:
    result = agglo("train", yaml, "train.lr=0.5", "--print")
    assert result.exit_code == 0, result.output
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout, encoding="utf-8")
    assert recipe.load(str(again)) == recipe.load(str(yaml), ["train.lr=0.5"])


def test_train_refuses_invalid_recipes(yaml: Path, tmp_path: Path) -> None:
    assert "did you mean 'steps'" in refused("train", yaml, "train.step=3", "--print")
    assert "did you mean 'cosine'" in refused("train", yaml, "losses.summary.kind=cosin", "--print")
    assert "did you mean 'quickstart'" in refused("train", "quickstat", "--print")
    assert "exclude each other" in refused("train", yaml, "--resume", "--overwrite", "--out", tmp_path / "run")
    assert "4 is not a multiple of 16 px" in refused("train", yaml, "partitions.0.sizes=[4]", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_train_measures_and_refuses_to_overwrite(yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    result = agglo("train", yaml, "--smoke", "--out", run, "--device", "cpu", "--no-report")
    assert result.exit_code == 0, result.output
    rows = {(result.model["name"], result.name): result for result in read(run)}
    assert {name for name, _ in rows} == {"student", "untrained"}  # `toy` is not compared with itself
    assert rows["student", "agreement"].metrics
    assert "untrained" in result.stdout
    assert "agglo search" not in result.stdout  # the model has no text head
    assert result.stdout.count(f"--model '{run}'") == 2
    before = (run / "model" / "model.safetensors").read_bytes()
    line = refused("train", yaml, "--smoke", "--out", run)
    assert "--resume" in line
    assert "--overwrite" in line
    assert (run / "model" / "model.safetensors").read_bytes() == before
    assert (
        agglo("view", next(iter((tmp_path / "images").iterdir())), "-o", tmp_path / "v.png", "-m", run).exit_code == 0
    )


def test_failed_eval_after_training_is_printed_and_exits_1(yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    source = f"{{kind: folder, path: {tmp_path / 'images'}}}"
    evals = f"evals=[{{kind: knn, train: {{kind: cifar, path: nowhere}}}}, {{kind: rank, size: 32, source: {source}}}]"
    result = agglo("train", yaml, evals, "--out", run, "--device", "cpu")
    assert result.exit_code == 1
    assert "student: knn failed: source cifar: 'nowhere' does not exist" in result.stderr
    assert [r.name for r in read(run) if r.model["name"] == "student"] == ["rank"]
    assert (run / "report.html").is_file()
    (run / "recipe.yaml").write_text("name: [")  # results are reported even if the recipe is damaged
    assert agglo("report", run).exit_code == 0


def test_interruption_during_evals_names_the_saved_model(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agglo.harness.runs.measure_run", interrupt)
    run = tmp_path / "run"
    result = agglo("train", yaml, "--smoke", "--out", run)
    assert result.exit_code == 130
    assert f"the model is saved in {run / 'model'}" in result.stderr
    assert f"agglo report {run}" in result.stderr
    assert (run / "model" / "model.safetensors").is_file()


def test_report_measures_a_run_without_results_first(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert agglo("train", yaml, "--smoke", "--out", run, "--no-evals", "--no-report").exit_code == 0
    assert not (run / "evals").exists()
    seen: list[bool] = []

    def write(folder: Path, progress: object) -> Path:
        seen.append((folder / "evals" / "results.jsonl").is_file())
        return folder / "report.html"

    monkeypatch.setattr("agglo.report.run_page.write_run", write)
    result = agglo("report", run)
    assert result.exit_code == 0, result.output
    assert seen == [True]
    assert str(run / "report.html") in result.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_saves_a_checkpoint_and_exits_130(yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "agglo.cli.main", "train", str(yaml), "train.steps=100000", "train.log_every=1"]
    command += ["--out", str(run), "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        metrics, deadline = run / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err
    assert list((run / "checkpoints").iterdir())


def test_info_shows_widths_sizes_and_cost(model: Path) -> None:
    shown = agglo("info", model, "--size", "64x96").output
    for fact in ("kind vit", "width 32", "multiples of 16 pixels; best at 64", "cost at 64x96", "GFLOPs"):
        assert fact in shown
    released = agglo("info", "c-radio_v4-h", "--window", 16, "--size", 512).output
    for fact in ("NVIDIA Open Model License", "2560 (2 class tokens)", "7 registers", "head sam3", "651.6 M"):
        assert fact in released
    assert "did you mean 'c-radio_v4-h'" in refused("info", "c-radio_v4h")
    assert "give a side in pixels" in refused("info", model, "--size", "wide")


def test_export_writes_a_layout_and_refuses_unfit_models(model: Path, tmp_path: Path) -> None:
    result = agglo("export", model, "--to", "transformers", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "wrote" in result.output
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert "kind vit" in agglo("info", tmp_path / "out").output  # and back
    assert "did you mean 'timm'" in refused("export", model, "--to", "tim", "-o", tmp_path / "other")
    assert "RadioModel" in refused("export", "agglo-lite", "--to", "transformers", "-o", tmp_path / "third")
    assert not (tmp_path / "third").exists()
    text = " ".join(agglo("export", "--help").output.replace("│", " ").split())
    assert "an official file or folder, or owner/name on the hub" in text


def test_push_refuses_a_bad_repository_name(model: Path) -> None:
    assert "owner/name" in refused("push", model, "justaname")


def test_full_disk_names_the_next_step(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("agglo.zoo.loading.list_models", full)
    assert "No space left on device: free some space" in refused("models")


# --- one rule for all commands ----------------------------------------------------------------------------------------


def test_app_is_exported_without_importing_torch() -> None:
    code = "import sys; from agglo.cli import app; assert app and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", ["train", "cache", "eval", "embed", "search", "view", "report"])
def test_devices_are_refused_alike(command: str, model: Path, folder: Path, yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.read_text())
    words: dict[str, list[object]] = {
        "train": [yaml, "--out", tmp_path / "out"],
        "cache": [yaml, "data.views.crops=2", "--out", tmp_path / "out"],
        "eval": [model, "--evals", "rank", "-o", tmp_path / "out"],
        "embed": [folder, "-o", tmp_path / "out.npz", "-m", model],
        "search": [folder, "a cup", "-m", model],
        "view": [folder / "0.png", "-o", tmp_path / "out.png", "-m", model],
        "report": [run],
    }
    line = refused(command, *words[command], "--device", "cuda:77" if torch.cuda.is_available() else "cuda")
    assert "--device cuda" in line and "cannot be used here" in line and "try --device cpu" in line
    assert "by default cuda if available, else cpu" in " ".join(
        agglo(command, "--help").stdout.replace("│", " ").split()
    )


def test_train_resumes_a_run_folder(yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    assert agglo("train", yaml, "--out", run, "--device", "cpu", "--no-report", "--no-evals").exit_code == 0
    assert "--resume" in refused("train", run, "--device", "cpu")
    (run / "checkpoints").rename(run / "gone")
    result = agglo("train", run, "--resume", "--device", "cpu", "--no-report", "--no-evals")
    assert result.exit_code == 0, result.output
    assert (run / "checkpoints").is_dir() and not (tmp_path / "runs").exists()
    assert "started with another recipe (train.steps)" in refused("train", run, "train.steps=3", "--resume")


def test_print_shows_what_is_inherited(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text(f"base: {yaml.name}\ntrain: {{steps: 9}}\n")
    printed = config.read_yaml(agglo("train", tmp_path / "child.yaml", "--print").stdout)
    assert printed["name"] == "child" and printed["train"]["steps"] == 9
    assert printed["student"]["width"] == 32 and "base" not in printed


def test_recipes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff")
    assert "not UTF-8 text" in refused("train", tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["embed", "FOLDER", "-o", "OUT.npz", "-m", "MODEL", "--size", "1600000"],
        ["embed", "FOLDER", "-o", "OUT.npz", "-m", "MODEL", "--size", "16" + "0" * 30],
        ["embed", "FOLDER", "-o", "OUT.npz", "-m", "MODEL", "--batch", "-1"],
        ["search", "FOLDER", "a cup", "-m", "MODEL", "-k", "0"],
        ["view", "FOLDER/0.png", "-o", "OUT.png", "-m", "MODEL", "--size", "16" + "0" * 30],
        ["info", "MODEL", "--size", "9" * 5000],
        ["eval", "MODEL", "--evals", "knn", "--sizes", "9" * 5000],
        ["eval", "MODEL", "--evals", "knn", "knn.k=" + "9" * 40],
        ["eval", "MODEL", "--evals", "knn", "knn.temperature=.inf"],
        ["train", "YAML", "train.lr=1e999"],
        ["train", "YAML", "train.steps=" + "9" * 5000],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_numbers_that_are_too_large_are_refused(
    words: list[str], model: Path, folder: Path, yaml: Path, tmp_path: Path
) -> None:
    for name, value in (("FOLDER", folder), ("MODEL", model), ("YAML", yaml), ("OUT", tmp_path / "out")):
        words = [word.replace(name, str(value)) for word in words]
    refused(*words)


def test_warnings_are_notes_without_lines_of_code(tmp_path: Path) -> None:
    code = (
        "import sys, warnings, agglo.cli.main as main\n"
        "main.app = lambda: warnings.warn('two\\nlines', stacklevel=1)\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "note: two lines\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory (MemoryError): use a smaller size or batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory (DefaultCPUAllocator"),
        (OverflowError("Python int too large to convert to C long"), "a number is too large (Python int"),
    ],
)
def test_missing_memory_is_one_line(
    error: Exception, words: str, folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agglo.embedding import encoding

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(encoding, "encode", fail)
    result = agglo("embed", folder, "-o", tmp_path / "out.npz", "-m", model, "--device", "cpu")
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_embed_continues(number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "many"
    images.mkdir()
    for index in range(24):
        Image.new("RGB", (64, 64), (index * 10, 0, 0)).save(images / f"{index:02d}.png")
    out = tmp_path / "out.npz"
    words = ["embed", str(images), "-o", str(out), "-m", str(model), "--batch", "2", "--device", "cpu"]
    slow = (
        "import sys, time, agglo.embedding.encoding as e; real = e.encode\n"
        "def slowly(*a):\n    time.sleep(0.4); return real(*a)\n"
        "e.encode = slowly; from agglo.cli.main import main; main()"
    )
    journal = tmp_path / "out.npz.partial"
    with subprocess.Popen([sys.executable, "-c", slow, *words], stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not (journal.is_file() and journal.stat().st_size > 1000) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"finished rows are kept in {journal}. The same command continues" in stderr
    assert not out.exists() and journal.is_file()
    from agglo.embedding import encoding

    encoded, real = [], encoding.encode
    monkeypatch.setattr(encoding, "encode", lambda m, x, h: encoded.append(len(x)) or real(m, x, h))
    result = agglo(*words)
    assert result.exit_code == 0, result.output
    assert 0 < sum(encoded) < 24 and not journal.exists()
    with np.load(out) as arrays:
        assert len(arrays["path"]) == 24


def test_report_of_the_user_is_not_replaced(yaml: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert agglo("train", yaml, "--out", run, "--device", "cpu", "--no-report", "--no-evals").exit_code == 0
    (run / "report.html").write_text("mine")
    assert "is not a report of agglo" in refused("report", run, "--device", "cpu")
    assert (run / "report.html").read_text() == "mine"


def test_export_keeps_a_readme_of_the_user(model: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert "README.md, which agglo did not write" in refused("export", model, "--to", "transformers", "-o", tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
