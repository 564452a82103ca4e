"""A plain ``pip install agglo`` loads, embeds and evaluates; features that need an extra name it in their error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agglo.model.model import HeadConfig, Model
from support.bare import optional_modules, run_bare
from support.training import tiny, write_images

pytestmark = pytest.mark.processes

WORK = """
import agglo, torch
from agglo.cli.main import main

def command(*arguments):
    sys.argv = ["agglo", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (arguments, stop.code)

home = sys.argv[1]
model = agglo.load(home + "/model")
assert model(torch.rand(1, 3, 64, 64)).summary.shape == (1, 32)
assert agglo.embed(home + "/images", model).summary.shape == (6, 32)
assert "top1" in str(agglo.evaluate(model, [{"kind": "knn"}]))
command("embed", home + "/images", "-o", home + "/out.npz", "--model", home + "/model")
command("eval", home + "/model", "--evals", "knn", "--out", home + "/results")
command("train", home + "/tiny.yaml", "--out", home + "/run")
command("kinds")
command("models")
command("info", home + "/model")
"""

OPTIONAL_FEATURES: dict[str, tuple[str, str]] = {
    "a bundled model with a timm student": ("agglo.load('agglo-lite')", "timm"),
    "a timm student": ("build('students', {'kind': 'timm', 'model': 'test_efficientnet'}, ())", "timm"),
    "a timm teacher": ("build('teachers', {'kind': 'timm', 'model': 'tf_efficientnet_lite0'})", "timm"),
    "a conse teacher": ("build('teachers', {'kind': 'conse', 'model': 'tf_efficientnet_lite0'})", "timm"),
    "a transformers teacher": (
        "build('teachers', {'kind': 'transformers', 'model': home + '/dinov3', 'weights': 'random'})",
        "teachers",
    ),
    "an OpenCLIP teacher": (
        "build('teachers', {'kind': 'open_clip', 'model': 'ViT-B-32', 'weights': 'random'})",
        "teachers",
    ),
    "the bundled text tower": ("build('text', {'kind': 'minilm'})", "quickstart"),
    "an OpenCLIP text tower": ("build('text', {'kind': 'open_clip', 'model': 'ViT-B-32'})", "teachers"),
    "a SigLIP 2 text tower": ("build('text', {'kind': 'siglip2', 'repo': home})", "teachers"),
    "OpenCLIP's prompts": ("build('evals', {'kind': 'zero_shot', 'templates': 'openai'}).run(model)", "teachers"),
    "SAM's decoder": ("build('evals', {'kind': 'promptable', 'decoder': home + '/sam'}).run(model)", "teachers"),
    "the photographs": ("build('sources', {'kind': 'photos'})", "quickstart"),
    "a data set of the hub": ("build('sources', {'kind': 'huggingface', 'dataset': 'cifar10'})", "data"),
    "Parquet output": (
        "command('embed', home + '/images', '-o', home + '/a.parquet', '--model', home + '/model')",
        "quickstart",
    ),
}
"""Feature → Python that uses it, and the extra that its error names."""

RUN_FEATURES = """
import traceback
import agglo
from agglo.cli.main import app
from agglo.config import build

home, found = sys.argv[1], {}
model = agglo.load(home + "/model")

def command(*arguments):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code:
        raise agglo.types.MissingExtraError(result.output)

for code in json.loads(sys.argv[2]):
    try:
        eval(code)
    except Exception as error:
        found[code] = [type(error).__name__, str(error), traceback.format_exc()]
    else:
        found[code] = ["nothing raised", "", ""]
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, images, a recipe and a teacher's configuration."""
    folder = tmp_path_factory.mktemp("bare")
    head = HeadConfig({"kind": "mlp", "hidden": 8}, {"kind": "mlp", "hidden": 8}, 5, 6)
    student = {"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8}
    Model(student, {"one": head}, preferred_size=64).save(folder / "model")
    images = write_images(folder / "images")
    (folder / "tiny.yaml").write_text(json.dumps(tiny(images, "train.steps=2").to_dict()))
    (folder / "dinov3").mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "dinov3_vit", **sizes, "patch_size": 16, "image_size": 64}
    (folder / "dinov3" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def errors(home: Path) -> dict[str, list[str]]:
    """Feature → its error without optional packages; one process runs all of them."""
    result = run_bare(RUN_FEATURES, str(home), json.dumps([code for code, _ in OPTIONAL_FEATURES.values()]))
    assert "FOUND" in result.stdout, result.stdout + result.stderr
    return json.loads(result.stdout.rsplit("FOUND", 1)[1])


def test_optional_packages_are_really_absent() -> None:
    assert {"timm", "transformers", "torchvision", "sklearn", "scipy"} <= optional_modules()
    assert not {"torch", "numpy", "PIL", "safetensors", "huggingface_hub", "typer", "rich"} & optional_modules()
    code = "import importlib.util\nprint(importlib.util.find_spec('timm'))\nimport timm"
    result = run_bare(code)
    assert result.stdout.strip() == "None" and "ModuleNotFoundError: No module named 'timm'" in result.stderr


def test_load_embed_evaluate_and_train_need_no_extra(home: Path) -> None:
    result = run_bare(WORK, str(home), AGGLO_CACHE=str(home / "cache"))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    with np.load(home / "out.npz") as arrays:
        assert arrays["summary"].shape == (6, 32)
    assert (home / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("feature", OPTIONAL_FEATURES)
def test_missing_extras_are_named(feature: str, errors: dict[str, Any]) -> None:
    code, extra = OPTIONAL_FEATURES[feature]
    kind, message, trace = errors[code]
    assert kind == "MissingExtraError", trace or f"{code}: {kind}"
    assert re.search(rf'pip install (-e )?"[^"]+\[{extra}\]"', message), message
