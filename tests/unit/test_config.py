"""Strict recipes: errors name the key and the nearest legal value."""

import pytest

from agglo import config, recipe
from agglo.types import ConfigError

TINY = {
    "name": "tiny",
    "claim": {"summary": "a test"},
    "student": {"kind": "vit", "width": 32, "depth": 1, "heads": 2, "max_grid": 8},
    "teachers": {"toy": {"kind": "toy"}},
    "data": {"sources": [{"kind": "photos"}]},
    "partitions": [{"sizes": [32], "batch": 4}],
    "train": {"steps": 2},
}


def test_resolved_recipe_round_trips() -> None:
    decoded = recipe.from_dict(TINY)
    assert decoded.student["registers"] == 4
    assert decoded.teachers["toy"].teacher["stride"] == 16
    again = recipe.from_dict(config.read_yaml(decoded.to_yaml()))
    assert again == decoded
    assert again.to_yaml() == decoded.to_yaml()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.step=3", r"train\.step: unknown key; did you mean 'steps'"),
        ("student.kind=vitt", r"student: no kind 'vitt' of students; did you mean 'vit'"),
        ("student.widht=8", r"student\.widht: unknown key; did you mean 'width'"),
        ("teachers.toy.strid=8", r"teachers\.toy\.strid: unknown key; did you mean 'stride'"),
        ("losses.summary.kind=angle", r"losses\.summary: no kind 'angle' of losses"),
        ("train.lr=fast", r"train\.lr: .*number.*'fast'"),
        ("train.precision=fp17", r"train\.precision"),
        ("data.views.flip=2", r"data\.views\.flip"),
        ("data.views.scale=[1.0, 0.5]", r"data\.views\.scale.*range"),
        ("partitions.0.batches=2", r"partitions\.0\.batches: unknown key; did you mean 'batch'"),
        ("partitions.3.batch=2", r"not an index of a list of 1"),
        ("train.steps.x=2", r"is a value"),
        ("nonsense", r"key\.path=value"),
        (
            "evals=[{kind: knn, train: {kind: scens}}]",
            r"evals\.0\.train: no kind 'scens' of sources; did you mean 'scenes'",
        ),
        ("evals=[{kind: agreement, sources: [{kind: photos, splt: 1}]}]", r"sources\.0\.splt: .*did you mean 'split'"),
    ],
)
def test_invalid_overrides_name_the_key(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.from_dict(config.override(TINY, [assignment]))


def test_overrides_copy_and_parse_yaml_values() -> None:
    changed = config.override(TINY, ["train.lr=1e-3", "partitions.0.sizes=[32, 64]", "train.clip=null"])
    assert changed["train"] == {"steps": 2, "lr": 1e-3, "clip": None}
    assert changed["partitions"][0]["sizes"] == [32, 64]
    assert TINY["train"] == {"steps": 2}


def test_replacing_a_kind_drops_its_keys() -> None:
    changed = config.override(TINY, ["student.kind=timm", "student.model=test_efficientnet"])
    assert changed["student"] == {"kind": "timm", "model": "test_efficientnet"}
    entry = {"kind": "hog", "cell": 4, "summary_weight": 0}
    assert config.override({"t": entry}, ["t.kind=toy"], keep={"summary_weight"})["t"] == {
        "kind": "toy",
        "summary_weight": 0,
    }


def test_constructor_errors_become_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"losses\.summary: .*beta"):
        config.build("losses", {"kind": "smooth_l1", "beta": -1.0}, where="losses.summary")


def test_duplicate_keys_and_broken_yaml_name_the_line() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        config.read_yaml("a: 1\na: 2\n", "x.yaml")
    with pytest.raises(ConfigError, match="line"):
        config.read_yaml("a: [1, 2\nb: 3", "x.yaml")
    with pytest.raises(ConfigError, match="mapping"):
        config.read_yaml("- 1\n- 2", "x.yaml")


def test_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        recipe.load("quikstart")


def test_import_paths_and_private_files_are_not_kinds() -> None:
    with pytest.raises(ConfigError, match="no kind"):
        config.find("losses", "os.path")
    with pytest.raises(ConfigError, match="no kind"):
        config.find("losses", "base")
    with pytest.raises(ConfigError, match="no kind"):
        config.find("losses", "_reduce")


def test_plugins_are_for_recipes_not_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> type:
            return dict

    monkeypatch.setattr(config, "_plugins", lambda point: {"mine": Entry()} if point == "losses" else {})
    config.find.cache_clear()
    assert "mine" in config.kinds("losses")
    assert config.find("losses", "mine") is dict
    with pytest.raises(ConfigError, match="no kind 'mine'"):
        config.find("losses", "mine", installed=False)
    config.find.cache_clear()


@pytest.mark.parametrize("value", ["foo", "0", "true", "-3", "2.5"])
def test_canvas_is_pixels_auto_or_null(value: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.views\.canvas: must be a positive number of pixels, auto, or null"):
        recipe.load("small", [f"data.views.canvas={value}"])
    assert recipe.load("small", ["data.views.canvas=auto"]).data.views.canvas == "auto"


def test_invalid_crop_ranges_are_refused() -> None:
    for changes, message in (("scale=[0.5, 1.5]", "as large as its image"), ("aspect=[2, 1]", "0 < low <= high")):
        with pytest.raises(ConfigError, match=message):
            recipe.load("small", [f"data.views.{changes}"])


def test_colon_without_a_space_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"YAML needs a space after the colon: kind: folder"):
        recipe.load("small", ["data.sources=[{kind:folder,path:x}]"])


def test_anchors_that_contain_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"loop\.yaml: not YAML"):
        config.read_yaml("a: &a [*a]\n", "loop.yaml")
    with pytest.raises(ConfigError, match="is not a YAML value"):
        config.override({}, ["a=&a {b: *a}"])
