"""Finding models by name, folder and run; damaged releases are refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agglo.model.model import Model
from agglo.types import AssetError, ConfigError
from agglo.zoo import loading as zoo
from agglo.zoo.loading import ReleasedModel, list_models, load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Model({"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8}, {}, preferred_size=64)
    return model.save(tmp_path_factory.mktemp("zoo") / "tiny")


@pytest.fixture
def released(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ReleasedModel:
    """A release whose folder is a copy that a test may damage."""
    folder = tmp_path / "asset"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    sums = [hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("model.safetensors", "config.json")]
    entry = ReleasedModel("tiny-test", "Apache-2.0", 0.1, "tests", *sums, folder)
    monkeypatch.setitem(zoo.RELEASED, entry.name, entry)
    return entry


def weights(model: Model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_name_folder_and_run_give_one_model(saved: Path, released: ReleasedModel, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(saved)
    models = [load(released.name), load(saved), load(str(saved)), load(run)]
    assert all(torch.equal(weights(model), weights(models[0])) for model in models)
    assert not any(model.training for model in models)


def test_flipped_bit_is_refused(released: ReleasedModel) -> None:
    file = released.folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(AssetError, match=r"corrupt.*reinstall"):
        load(released.name)


def test_release_without_a_recorded_sha256_is_refused(released: ReleasedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.RELEASED, released.name, replace(released, sha256=""))
    with pytest.raises(AssetError, match="not recorded"):
        load(released.name)


@pytest.mark.parametrize("damage", ["unlink", "garbage"])
def test_damaged_configuration_is_refused(released: ReleasedModel, damage: str) -> None:
    file = released.folder / "config.json"
    file.unlink() if damage == "unlink" else file.write_text("{", encoding="utf-8")
    with pytest.raises(AssetError, match=r"config\.json.*reinstall"):
        load(released.name)


def test_missing_release_says_how_to_get_a_model(released: ReleasedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(released, folder=released.folder / "nowhere")
    monkeypatch.setitem(zoo.RELEASED, released.name, gone)
    assert not gone.bundled
    assert gone.megabytes is None
    with pytest.raises(AssetError, match="agglo train quickstart"):
        load(released.name)


def test_list_has_every_release_bundled_first(released: ReleasedModel) -> None:
    found = list_models()
    assert {model.name for model in found} == {*zoo.RELEASED, *zoo.HUB} >= {"agglo-lite", "c-radio_v4-h", released.name}
    assert all(model.licence and model.what_for and model.params for model in found)
    flags = [model.bundled for model in found]
    assert flags == sorted(flags, reverse=True)
    assert released.megabytes == pytest.approx((released.folder / "model.safetensors").stat().st_size / 1e6)


def test_bundled_releases_are_complete() -> None:
    for model in list_models():
        if model.bundled:
            assert model.megabytes is not None
            assert model.megabytes <= 12
            assert load(model.name).spec.summary


def test_unknown_names_suggest_the_nearest(saved: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'agglo-lite'"):
        load("agglo-light")
    with pytest.raises(ConfigError, match=f"did you mean '{saved}'"):
        load(saved.parent / "tinny")


@pytest.mark.parametrize(
    ("written", "meant"),
    [("C-RADIOv4-H", "c-radio_v4-h"), ("c-radiov3-b", "c-radio_v3-b"), ("C-RADIOv4-SO400", "c-radio_v4-so400m"),
     ("AGGLO-LITE", "agglo-lite"), ("E-Radio-v2", "e-radio_v2")],
)  # fmt: skip
def test_suggestions_ignore_case_and_include_repositories(written: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"no model '{written}'; did you mean '{meant}'"):
        load(written)


def test_invalid_heads_are_refused(saved: Path) -> None:
    for heads in (3, [3], [None]):
        with pytest.raises(ConfigError, match=r"heads: must be None, 'all', 'text', or names of .*got .*(3|None)"):
            load(saved, heads=heads)  # type: ignore[arg-type]


def test_folder_of_several_checkpoints_is_refused(tmp_path: Path) -> None:
    for name in ("b.pth.tar", "a.pth"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"holds 2 checkpoints \(a\.pth, b\.pth\.tar\): use one"):
        load(tmp_path)


def test_sharded_folder_has_no_single_sha256(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"in shards, without a single sha256: leave sha256 out.*sha256sum"):
        load(tmp_path, sha256="0" * 64)


def test_download_size_follows_the_precision_in_the_file_name() -> None:
    sizes = {name: zoo.HUB[name].megabytes / zoo.HUB[name].params for name in zoo.HUB}
    halves = {"c-radio_v4-h", "c-radio_v4-so400m", "c-radio_v3-b", "c-radio_v3-l", "c-radio_v3-h", "c-radio_v3-g",
              "c-radio_v2-g", "radio_v2.5-b", "radio_v2.5-l", "radio_v2.1"}  # fmt: skip
    assert {name for name, size in sizes.items() if size == 2} == halves
    assert {size for name, size in sizes.items() if name not in halves} == {4}


def test_other_folders_say_what_is_missing(saved: Path, tmp_path: Path) -> None:
    assert torch.equal(weights(load(saved / "model.safetensors")), weights(load(saved)))  # its config lies beside it
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "model.safetensors").symlink_to(saved / "model.safetensors")
    with pytest.raises(ConfigError, match="is a file: use the folder"):
        load(lone / "model.safetensors")
    with pytest.raises(ConfigError, match=r"needs config\.json and model\.safetensors"):
        load(tmp_path)
    (tmp_path / "upsampler.json").touch()
    with pytest.raises(ConfigError, match=r"trained upsampler.*upsampler: \{kind: featsharp"):
        load(tmp_path)
    (tmp_path / "upsampler.json").unlink()
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ConfigError, match=r"unfinished run.*--resume"):
        load(tmp_path)
