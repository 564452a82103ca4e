"""Fitting a recipe to its student and teachers before a run, and the messages about changes."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from agglo import recipe
from agglo.config import read_yaml
from agglo.data.shifts import max_shift
from agglo.model.creation import create, snap_sizes
from agglo.teachers.toy import Toy
from agglo.training import loop
from agglo.training.loop import Progress, Run
from agglo.training.precompute import precompute
from agglo.training.targets import render_sizes
from agglo.types import ConfigError
from support.training import tiny, trace

pytestmark = pytest.mark.training

STRIDE_32 = "student={kind: timm, model: test_convnext}"
ONE = "teachers={toy: {kind: toy}}"


def prepared(data: Path, folder: Path, *overrides: str) -> Run:
    return loop.prepare(tiny(data, *overrides), folder / "run", torch.device("cpu"), resume=False)


def messages_at_start(run: Run) -> list[str]:
    messages: list[str] = []
    run.folder.mkdir(exist_ok=True)
    with Progress(run.folder, 1, quiet=True) as progress:
        progress.message = messages.append  # type: ignore[method-assign]
        loop.start(run, progress, [])
    return messages


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [14, 16, 32])
@pytest.mark.parametrize("name", [name for name in recipe.names() if not name.startswith("featsharp")])
def test_bundled_recipes_have_legal_sizes_for_any_stride(name: str, step: int) -> None:
    whole = recipe.load(name, ["data.sources=[{kind: photos, split: train}]"])
    for made in [whole, *(whole.stage(index) for index in range(len(whole.stages)))]:
        fitted, messages = snap_sizes(made, step)
        for before, after in zip(made.partitions, fitted.partitions, strict=True):
            assert after.sizes
            assert all(size % step == 0 for size in after.sizes)
            assert len(set(after.sizes)) == len(after.sizes)
            assert all(min(abs(size - legal) for legal in after.sizes) <= step / 2 for size in before.sizes)
        assert bool(messages) == any(size % step for partition in made.partitions for size in partition.sizes)


def test_sizes_snap_to_the_nearest_legal_size_without_duplicates(data: Path) -> None:
    made = tiny(data, "partitions=[{sizes: [64, 70, 432, 440], batch: 4}, {sizes: [96], batch: 4}]")
    fitted, messages = snap_sizes(made, 32)
    assert [partition.sizes for partition in fitted.partitions] == [[64, 416, 448], [96]]
    assert messages == ["partitions.0.sizes: the student takes multiples of 32 px: 70 -> 64, 432 -> 416, 440 -> 448"]
    assert made.partitions[0].sizes == [64, 70, 432, 440]
    assert snap_sizes(made, 2) == (made, [])
    assert snap_sizes(tiny(data, "partitions=[{sizes: [16], batch: 4}]"), 32)[0].partitions[0].sizes == [32]
    with pytest.raises(
        ConfigError, match=r"partitions\.0\.sizes: .*15 is not a multiple of 32 px, .*the nearest is 32"
    ):
        snap_sizes(tiny(data, "partitions=[{sizes: [15], batch: 4}]"), 32)


def test_run_trains_at_snapped_sizes_and_saves_the_recipe_unchanged(data: Path, tmp_path: Path) -> None:
    sizes = "partitions=[{sizes: [56, 72], batch: 4}]"
    model = loop.train_model(tiny(data, STRIDE_32, sizes, "train.spectral=false"), tmp_path / "run", quiet=True)
    assert {line["size"] for line in trace(tmp_path / "run")} == {64}
    assert read_yaml((tmp_path / "run" / "recipe.yaml").read_text())["partitions"][0]["sizes"] == [56, 72]
    assert model.preferred_size == 64
    run = prepared(data, tmp_path, STRIDE_32, sizes)
    lines = [line for line in messages_at_start(run) if "multiples" in line]
    assert lines == ["partitions.0.sizes: the student takes multiples of 32 px: 56 -> 64, 72 -> 64"]


def test_cache_uses_the_sizes_of_training(data: Path, tmp_path: Path) -> None:
    made = (STRIDE_32, ONE, "partitions=[{sizes: [56], batch: 4}]", "data.views.crops=1", "train.steps=1")
    messages: list[str] = []
    precompute(tiny(data, *made), tmp_path / "cache", message=messages.append)
    assert messages[0] == "partitions.0.sizes: the student takes multiples of 32 px: 56 -> 64"
    loop.train_model(tiny(data, *made, f"data.feature_cache={tmp_path / 'cache'}"), tmp_path / "run", quiet=True)
    assert trace(tmp_path / "run")[0]["size"] == 64


def test_untrained_model_prefers_a_legal_size(data: Path) -> None:
    assert create(tiny(data, STRIDE_32, "partitions=[{sizes: [432], batch: 4}]")).preferred_size == 416


# --- windows ----------------------------------------------------------------------------------------------------------


def test_unused_windows_are_reported_once_with_the_legal_ones(data: Path, tmp_path: Path) -> None:
    messages = messages_at_start(prepared(data, tmp_path, "train.windows=[2, 5, 7]"))
    lines = [line for line in messages if "window" in line]
    assert len(lines) == 1
    assert lines[0].startswith("train.windows: 5, 7 fit no size of the recipe and will not be used")
    assert lines[0].endswith("32 px: none; 48 px: none; 64 px: 2")
    assert not [line for line in messages_at_start(prepared(data, tmp_path, "train.windows=[2]")) if "window" in line]


# --- render size ------------------------------------------------------------------------------------


def test_auto_renders_at_the_largest_input_of_any_teacher(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of twice the student's pixels, up to 96, in one of the partitions."""
    wanted = lambda self, size, stride: tuple(min(2 * side, 96) if self.spec.spatial == 8 else side for side in size)  # noqa: E731
    monkeypatch.setattr(Toy, "input_size", wanted)
    shown: list[tuple[str, int]] = []
    real = Toy.forward

    def forward(self, images):
        shown.append(("other" if self.spec.spatial == 8 else "toy", images.shape[-1]))
        return real(self, images)

    monkeypatch.setattr(Toy, "forward", forward)
    made = (
        "partitions=[{sizes: [32, 64, 128], batch: 4}, {sizes: [32], batch: 4, teachers: [toy, dense]}]",
        "data.views.canvas=auto",
    )
    run = prepared(data, tmp_path, *made)
    assert render_sizes(run.recipe, 16, run.teachers) == [{32: 64, 64: 96, 128: 128}, {32: 32}]
    sides = {(batch.partition, batch.size[0]): batch.images.shape[-1] for batch in run.loader.iterate(0, 40)}
    assert sides == {(0, 32): 64, (0, 64): 96, (0, 128): 128, (1, 32): 32}
    # With a margin the view in the middle has those pixels, and the margin is on its scale.
    shifted = prepared(data, tmp_path, *made, "data.views.shift=0.5").loader
    assert shifted.margin == 2 * 16
    batch = next(batch for batch in shifted.iterate(0, 40) if batch.partition == 0 and batch.size[0] == 32)
    assert batch.images.shape[-1] * batch.field[1] == pytest.approx(64)


def test_auto_is_refused_with_fixed_crops_and_other_values_always(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"canvas: auto depends on the teachers: fixed crops need a number, or null"):
        tiny(data, "data.views.canvas=auto", "data.views.crops=2")
    for wrong in ("0", "atuo", "-3"):
        with pytest.raises(ConfigError, match=r"data\.views\.canvas"):
            tiny(data, f"data.views.canvas={wrong}")
    for right in (None, 40, "auto"):
        assert tiny(data, f"data.views.canvas={json.dumps(right)}").data.views.canvas == right


def test_margin_follows_the_deviation_of_the_shifts(data: Path, tmp_path: Path) -> None:
    for shift in (0.5, 1.2):
        assert prepared(data, tmp_path, f"data.views.shift={shift}").loader.margin == max_shift(shift) * 16


# --- statistics -------------------------------------------------------------------------------------------------------


def test_notes_on_statistics_name_the_teacher(data: Path, tmp_path: Path) -> None:
    few = ("targets.estimate_images=4", "partitions=[{sizes: [32], batch: 4}]", "losses.spatial.kind=mse")
    run = prepared(data, tmp_path, *few, "teachers={toy: {kind: toy, channels: 9}, other: {kind: toy}}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        messages = [line for line in messages_at_start(run) if line.startswith("teachers.")]
    assert [line for line in messages if "teachers.toy: no Hadamard matrix of order 9" in line]
    assert not [line for line in messages if line.startswith("teachers.other: no Hadamard")]
    for name in ("toy", "other"):
        assert [line for line in messages if f"teachers.{name}: the dispersion was estimated from 4 targets" in line]
    assert len(messages) == len(set(messages))
