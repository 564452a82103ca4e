"""The Hugging Face hub without a network: cache, errors, upload."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import errors

import agglo
from agglo import hub
from agglo.model.model import HeadConfig, Model
from agglo.types import AssetError, ConfigError
from agglo.zoo import loading as zoo

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    head = HeadConfig({"kind": "mlp", "hidden": 8}, None, 5, None)
    return Model({"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8}, {"one": head}, preferred_size=64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the client, offline."""
    folder = tmp_path / "cache"
    for name, value in {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    return folder


def downloaded(cache: Path, repo: str) -> Path:
    """The cache folder of a repository's only commit."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    return home / "snapshots" / COMMIT


def test_cached_model_loads_offline(cache: Path, model: Model) -> None:
    model.save(downloaded(cache, "someone/student"))
    found = agglo.load("someone/student")
    assert torch.equal(found.student.patch_generator.token, model.student.patch_generator.token)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("c-radio_v4-h", "nvidia/C-RADIOv4-H.*config.json, model.safetensors.*agglo.load"),
        ("C-RADIO_v4-H", "nvidia/C-RADIOv4-H"),
        ("nvidia/C-RADIOv3-B", "nvidia/C-RADIOv3-B.*config.json"),
        ("radio_v2.5-g", r"nvidia/RADIO .*radio_v2\.5-g\.pth\.tar"),
        ("someone/else", "someone/else"),
    ],
)
def test_offline_error_names_the_files_to_download(cache: Path, name: str, files: str) -> None:
    with pytest.raises(AssetError, match=files):
        agglo.load(name)


def test_unreachable_hub_is_tried_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The client retries for half a minute per file."""
    requested: list[str] = []

    def dead(repo: str, file: str, revision: str | None = None) -> str:
        requested.append(file)
        raise errors.LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", dead)
    with pytest.raises(AssetError, match=r"config\.json, model\.safetensors on another machine"):
        agglo.load("c-radio_v4-so400m")
    assert requested == ["config.json"]


def test_sharded_repository_is_fetched_by_its_index(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    remote_folder = tmp_path / "remote" / COMMIT
    remote_folder.mkdir(parents=True)
    (remote_folder / "config.json").write_text("{}")
    (remote_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    (remote_folder / "one.safetensors").touch()

    def remote(repo: str, file: str, revision: str | None = None) -> str:
        if not (remote_folder / file).is_file():
            raise errors.EntryNotFoundError(f"404 {file}")
        return str(remote_folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", remote)
    assert hub.fetch_model("someone/sharded") == remote_folder


def test_index_with_files_outside_its_folder_is_refused(cache: Path) -> None:
    folder = downloaded(cache, "evil/shards")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    outside = r"names files outside its folder \(\.\./\.\./secret\.safetensors\)"
    invalid = "no weight_map of tensor names to files"
    cases = (({"a": "../../secret.safetensors"}, outside), ({}, invalid), ("no map", invalid), ({"a": 3}, invalid))
    for names, message in cases:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(AssetError, match=message):
            hub.fetch_model("evil/shards")


def test_push_uploads_weights_configuration_and_card(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def upload(*, repo_id: str, folder_path: str, commit_message: str) -> str:
        seen.update(
            repo=repo_id, files=sorted(p.name for p in Path(folder_path).iterdir()), loads=Model.load(folder_path)
        )
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **options: seen.update(options))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    assert zoo.push(model, "me/student", private=True) == "https://hub/me/student"
    assert seen["repo"] == "me/student"
    assert seen["private"]
    assert seen["files"] == ["README.md", "config.json", "model.safetensors"]
    assert seen["loads"].spec == model.spec


def test_push_refuses_incomplete_models(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="owner/name"):
        zoo.push(model, "student")
    folder = model.save(tmp_path / "whole")
    (folder / "README.md").unlink()
    with pytest.raises(ConfigError, match=r"README\.md missing"):
        zoo.push(folder, "me/student")

    for error in (OSError("no route to host"), RuntimeError("no route to host")):  # httpx has errors of its own

        def refused(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "create_repo", refused)
        with pytest.raises(AssetError, match=r"no route to host.*hf auth login.*by hand"):
            zoo.push(model, "me/student")


def test_push_offline_names_the_variable(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "create_repo", offline)
    with pytest.raises(AssetError, match=r"HF_HUB_OFFLINE is set\): unset it, or upload the folder that Model\.save"):
        zoo.push(model, "me/student")
    folder = model.save(tmp_path / "mine")
    with pytest.raises(AssetError, match=re.escape(f"upload the folder {folder} by hand")):
        zoo.push(folder, "me/student")  # not the temporary copy with another card
