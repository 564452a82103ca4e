"""Recipes that inherit from others, the forms in which a recipe is named, and values that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from agglo import recipe
from agglo.types import ConfigError

BASE = """
name: parent
claim: {summary: about the parent}
student: {kind: vit, width: 32, depth: 1, heads: 2, max_grid: 8}
teachers:
  toy: {kind: toy, channels: 8, summary_weight: 2}
  other: {kind: toy, seed: 1}
data: {sources: [{kind: scenes}], workers: 0, views: {mixup: 0.1}}
partitions: [{sizes: [32], batch: 4}]
train: {steps: 2, ema: 0.5}
smoke: [train.steps=1]
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "parent.yaml").write_text(BASE)
    return tmp_path


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_base_is_merged_key_by_key(base: Path) -> None:
    found = recipe.load(written(base, "base: shared/parent.yaml\ntrain: {lr: 0.01}\ndata: {views: {flip: 0}}\n"))
    parent = recipe.load(base / "shared" / "parent.yaml")
    assert found.train == parent.train.model_copy(update={"lr": 0.01})
    assert (found.data.views.mixup, found.data.views.flip) == (0.1, 0)
    assert found.student == parent.student and found.teachers == parent.teachers
    assert found.smoke == ["train.steps=1"]
    assert found.name == "mine"  # of the file: two recipes must not share a run folder
    assert found.claim.summary == ""  # the claim is about the parent
    assert recipe.from_dict(found.to_dict()) == found and "base" not in found.to_dict()


def test_lists_are_replaced_kinds_drop_their_keys_and_null_leaves_out(base: Path) -> None:
    text = """
base: shared/parent.yaml
name: child
student: {kind: timm, model: tf_efficientnet_lite0, stages: [2, 3, 4]}
teachers: {toy: {kind: hog}, other: null}
partitions: [{sizes: [48], batch: 2}]
"""
    found = recipe.load(written(base, text))
    assert found.name == "child"
    assert "width" not in found.student
    assert list(found.teachers) == ["toy"] and "channels" not in found.teachers["toy"].teacher
    assert found.teachers["toy"].summary_weight == 2  # of the entry, not of the kind
    assert [p.sizes for p in found.partitions] == [[48]]


def test_base_may_be_a_bundled_recipe_a_run_folder_or_a_chain(base: Path) -> None:
    found = recipe.load(written(base, "base: quickstart\ntrain: {steps: 7}\n", "quickstart.yaml"))
    assert found.train.steps == 7 and found.teachers == recipe.load("quickstart").teachers
    (base / "run").mkdir()
    written(base / "run", BASE, "recipe.yaml")
    written(base, "base: run\ntrain: {steps: 3}\n", "second.yaml")
    assert recipe.load(written(base, "base: second.yaml\ntrain: {seed: 5}\n")).train.steps == 3


@pytest.mark.parametrize("first", ["mine.yaml", "second.yaml"])
def test_cycles_are_refused(base: Path, first: str) -> None:
    written(base, "base: second.yaml\n")
    written(base, f"base: {first}\n", "second.yaml")
    with pytest.raises(ConfigError, match=r"inherit from each other \(.*second\.yaml.*\): remove one `base:`"):
        recipe.load(base / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: quikstart\n", "mine.yaml, base: no recipe 'quikstart'; did you mean 'quickstart'"),
        ("base: none.yaml\n", "mine.yaml, base: no recipe 'none.yaml'"),
        ("base: [a]\n", "mine.yaml, base: must be the name of a recipe"),
        ("base: shared\n", "mine.yaml, base: .*shared is a folder without recipe.yaml"),
    ],
)
def test_bad_base_is_refused(base: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.load(written(base, text))


def test_first_recipe_needs_neither_name_nor_claim(base: Path) -> None:
    lines = [line for line in BASE.splitlines() if not line.startswith(("name", "claim"))]
    assert recipe.load(written(base, "\n".join(lines))).name == "mine"


def test_overrides_may_be_a_mapping(base: Path) -> None:
    path = base / "shared" / "parent.yaml"
    changes = {"train.steps": 5, "data.views": {"flip": 0.0}, "partitions.0.batch": 8, "teachers.toy.kind": "hog"}
    found = recipe.load(path, changes)
    assert (found.train.steps, found.data.views.flip, found.partitions[0].batch) == (5, 0, 8)
    assert found.teachers["toy"].teacher["kind"] == "hog"
    assert recipe.changed(recipe.load(path), {"train.steps": 5}, smoke=True).train.steps == 5
    assert recipe.changed(recipe.load(path), (), smoke=True).train.steps == 1
    with pytest.raises(ConfigError, match="is one string"):
        recipe.load(path, "train.steps=5")


@pytest.mark.parametrize("value", ["inf", ".inf", "-.inf", "1e999", ".nan"])
@pytest.mark.parametrize(
    "key", ["train.lr", "train.clip", "data.views.mixup", "partitions.0.weight", "teachers.toy.seed"]
)
def test_infinite_values_are_refused(base: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        recipe.load(base / "shared" / "parent.yaml", [f"{key}={value}"])


@pytest.mark.parametrize("key", ["train.seed", "train.steps", "teachers.toy.seed", "partitions.0.sizes.0"])
def test_numbers_beyond_64_bits_are_refused(base: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key.replace('.', '[.]')}: a number of 101 bits is too large"):
        recipe.load(base / "shared" / "parent.yaml", [f"{key}={2**100}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: é".encode("latin-1"), r"mine\.yaml: not UTF-8 text \(byte 0xe9 at 6\)"),
        ("name: x\n".encode("utf-16"), r"mine\.yaml: not UTF-8 text"),
        (b"train: {steps: " + b"9" * 5000 + b"}", r"mine\.yaml: not YAML"),
        (b"name: \x00", r"mine\.yaml: not YAML"),
        (b"[" * 5000, r"mine\.yaml"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        recipe.load(tmp_path / "mine.yaml")


def test_byte_order_mark_is_ignored(base: Path) -> None:
    (base / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert recipe.load(base / "mine.yaml").name == "parent"


def test_bundled_names_win_over_run_folders(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "quickstart").mkdir()
    written(base / "quickstart", BASE, "recipe.yaml")
    monkeypatch.chdir(base)
    assert recipe.load("quickstart").name == "quickstart" and recipe.run_of("quickstart") is None
    assert recipe.load("./quickstart").name == "parent" and recipe.run_of("./quickstart") == Path("quickstart")
