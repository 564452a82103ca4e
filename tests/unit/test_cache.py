"""The teacher-feature cache: cached features equal live ones, and a changed teacher or image is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from agglo import recipe
from agglo.cache import disk, identity
from agglo.cache.coding import DTYPES, Coding
from agglo.cache.reading import FeatureCache
from agglo.cache.records import ShardReader, key_of, shard_file
from agglo.config import build, override
from agglo.data.crops import CropLoader, crop_generator, draw_roam, outer_size
from agglo.data.shifts import RenderedBatch
from agglo.nn.placement import Placement, align_to_common_grid
from agglo.objectives.base import build_teachers
from agglo.teachers.toy import Toy
from agglo.training import loop, targets
from agglo.training.precompute import precompute
from agglo.training.targets import TargetSource, build_loader, load_teachers, slice_view, whole_crop_features
from agglo.types import AssetError, ConfigError, Features, FeatureSpec, StorageError
from support import training

pytestmark = pytest.mark.training

TINY = {
    **training.TINY,
    "teachers": {
        "toy": {"kind": "toy"},
        "other": {"kind": "toy", "seed": 1, "channels": 8, "stride": 8, "summary": 5},
        "dense": {"kind": "hog", "orientations": 8, "group": 1, "summary_weight": 0},
    },
    "partitions": [{"sizes": [32, 48], "batch": 4}],
    "train": {**training.TINY["train"], "steps": 4},
}
ONE = ("teachers={toy: {kind: toy}}", "partitions=[{sizes: [32], batch: 4}]")
"""Only what most tests need: one teacher, one size."""


def picture(path: Path, seed: int) -> None:
    training.picture(path, torch.Generator().manual_seed(seed))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        picture(folder / f"{index}.png", index)
    return folder


def tiny(data: Path, *overrides: str) -> recipe.Recipe:
    views = {"crops": 2, "shift": 0.5, "roam": 1}
    tree = {**TINY, "data": {"sources": [{"kind": "folder", "path": str(data)}], "workers": 0, "views": views}}
    return recipe.from_dict(override(tree, overrides))


def trace(folder: Path) -> list[dict]:
    return [json.loads(line)["terms"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(data: Path, run: Path, *overrides: str) -> list[dict]:
    loop.train_model(tiny(data, *overrides), run, quiet=True)
    return trace(run)


def opened(made: recipe.Recipe) -> TargetSource:
    """What a run does with a cache before its first step."""
    lesson = TargetSource(made, load_teachers(made), 16, torch.device("cpu"))
    build_loader(made, lesson)
    return lesson


def entries(folder: Path, name: str = "toy") -> dict[int, tuple[int, bytes]]:
    """Every record by key: the checksum of its crop and the payload."""
    shelf, found = ShardReader(folder / name), {}
    for key, place in shelf.locations.items():
        into = bytearray(place.bytes)
        found[key] = shelf.read(key, memoryview(into)).checksum, bytes(into)
    return found


# ---------------------------------------------------------------------------------------------------- training


def worst(one: list[dict], two: list[dict]) -> float:
    return max(abs(a[k] - b[k]) / abs(a[k]) for a, b in zip(one, two, strict=True) for k in a)


def test_cached_training_equals_live_training(data: Path, tmp_path: Path) -> None:
    """The whole run, so that the statistics, the updates and every step's views are the same too."""
    live = trained(data, tmp_path / "live")
    assert set(live[0]) == {"toy/summary", "toy/spatial", "other/summary", "other/spatial", "dense/spatial"}
    bound = {"fp32": 1e-6, "fp16": 5e-4, "bf16": 4e-3, "int8": 1e-2}
    found = {}
    for dtype in DTYPES:
        precompute(tiny(data), tmp_path / dtype, dtype=dtype, batch=5)
        cached = trained(data, tmp_path / f"run-{dtype}", f"data.feature_cache={tmp_path / dtype}", "data.workers=1")
        found[dtype] = worst(live, cached)
        assert found[dtype] <= bound[dtype]
    assert found["fp32"] < found["fp16"] < found["bf16"] < found["int8"]  # coarser is worse: each was really used


def test_cached_run_frees_teachers_and_does_not_depend_on_the_seed(data: Path, tmp_path: Path) -> None:
    precompute(tiny(data), tmp_path / "cache", dtype="fp32")
    made = tiny(data, f"data.feature_cache={tmp_path / 'cache'}", "train.seed=5", "data.workers=2")
    run = loop.prepare(made, tmp_path / "run", torch.device("cpu"), resume=False)
    assert not any([*teacher.parameters(), *teacher.buffers()] for teacher in run.teachers.values())
    with pytest.raises(RuntimeError, match="read from a feature cache"):
        run.teachers["toy"](torch.rand(1, 3, 32, 32))
    batches = [next(run.loader.iterate(step, step + 1)) for step in (0, 7)]
    real = build_teachers(made)
    for batch in batches:
        found = run.targets(batch, RenderedBatch(batch.images, batch.field))
        for name, teacher in real.items():
            expected = whole_crop_features(teacher, batch.images, outer_size(batch.size, made.data.views, 16), 16)[""]
            for a, b in (
                (expected.summary, found[name].features.summary),
                (expected.spatial, found[name].features.spatial),
            ):
                assert (a is None) == (b is None)
                assert a is None or torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_cached_run_resumes_like_the_straight_one(data: Path, tmp_path: Path) -> None:
    precompute(tiny(data), tmp_path / "cache")
    cached = (f"data.feature_cache={tmp_path / 'cache'}",)
    straight = trained(data, tmp_path / "straight", *cached)
    with training.interrupted_in(1), pytest.raises(KeyboardInterrupt):
        loop.train_model(tiny(data, *cached), tmp_path / "broken", quiet=True)
    loop.train_model(tiny(data, *cached), tmp_path / "broken", resume=True, quiet=True)
    assert worst(straight, trace(tmp_path / "broken")) < 1e-5


# ---------------------------------------------------------------------------------------------------- slices


def test_shifted_view_is_an_exact_slice_of_the_map() -> None:
    spatial = torch.randn(3, 4, 6, 6)
    corner = torch.tensor([[0, 0], [1, 2], [2, 1]])
    view = Placement(corner.double() / 6, (1 / 6 / 16, 1 / 6 / 16), (64, 64))  # 4 cells of 16 pixels in 6
    seen = slice_view(Features(None, spatial), view)
    assert seen.features.spatial.shape == (3, 4, 4, 4)
    for sample, (y, x) in enumerate(corner.tolist()):
        assert torch.equal(seen.features.spatial[sample], spatial[sample, :, y : y + 4, x : x + 4])
    mine, theirs, mask = align_to_common_grid(
        torch.randn(3, 4, 4, 4), view.with_grid((4, 4)), seen.features.spatial, seen.placement
    )
    assert mask is None and torch.equal(theirs, seen.features.spatial) and mine.shape == theirs.shape


def test_unaligned_view_gets_every_cell_it_touches() -> None:
    spatial = torch.arange(25.0).view(1, 1, 5, 5).expand(2, 1, 5, 5)
    view = Placement(torch.tensor([[0.0, 0.1], [0.5, 0.5]], dtype=torch.float64), (0.5 / 8, 0.5 / 8), (8, 8))
    seen = slice_view(Features(None, spatial), view)
    assert seen.placement.grid == (3, 3)  # half of the canvas is two and a half cells
    assert torch.equal(seen.placement.start * 5, torch.tensor([[0.0, 0.0], [2.0, 2.0]], dtype=torch.float64))
    assert torch.equal(seen.features.spatial[1, 0], spatial[1, 0, 2:, 2:])


@pytest.mark.parametrize("roam", [0, 2])
def test_slice_equals_the_features_of_the_view_for_a_patchwise_teacher(data: Path, roam: int) -> None:
    """The toy looks at each patch alone, so the geometry from pixels to cells is checked from end to end."""
    made = tiny(data, *ONE, f"data.views.roam={roam}")
    lesson = TargetSource(made, build_teachers(made), 16, torch.device("cpu"))
    batch = build_loader(made, lesson).batch(3)
    assert batch.images.shape[-1] == 32 + 2 * 16 * (2 + roam)
    canvas = RenderedBatch(batch.images, batch.field)
    places = draw_roam(0, 3, 4, 2 + roam)
    assert len(places.unique(dim=0)) > 1
    pixels, view = canvas.crop(batch.size, 16, places)
    seen = lesson(batch, canvas, view)["toy"]
    alone = build("teachers", {"kind": "toy"})(pixels)
    torch.testing.assert_close(seen.features.spatial, alone.spatial, rtol=1e-5, atol=1e-6)


def test_teachers_of_other_partitions_are_not_run(data: Path) -> None:
    made = tiny(data, "partitions=[{sizes: [32], batch: 4, teachers: [toy, dense]}, {sizes: [48], batch: 2}]")
    lesson = TargetSource(made, build_teachers(made), 16, torch.device("cpu"))
    loader = build_loader(made, lesson)
    rendered = [(batch, RenderedBatch(batch.images, batch.field)) for batch in loader.iterate(0, 4)]
    asked = {batch.size[0]: set(lesson(batch, images)) for batch, images in rendered}
    assert asked == {32: {"toy", "dense"}, 48: {"toy", "other", "dense"}}


def test_roam_is_in_range_and_pure() -> None:
    drawn = draw_roam(1, 2, 500, 3)
    assert sorted(drawn.unique().tolist()) == [-3, -2, -1, 0, 1, 2, 3]
    assert torch.equal(drawn, draw_roam(1, 2, 500, 3)) and not torch.equal(drawn, draw_roam(1, 3, 500, 3))


# ---------------------------------------------------------------------------------------------------- crops


def test_fixed_crops_do_not_depend_on_the_run(data: Path) -> None:
    views: dict[str, set] = {}
    for seed, workers in ((0, 0), (9, 2)):
        made = tiny(data, *ONE, f"train.seed={seed}", f"data.workers={workers}")
        loader = build_loader(made, TargetSource(made, build_teachers(made), 16, torch.device("cpu")))
        crops = CropLoader(loader.sources, None, loader.partitions, loader.policy, seed, workers, crops=3)
        for batch in crops.iterate(0, 9):  # 36 samples: six images, twice each of three crops
            planned = crops.planned(batch.step)
            for (source, index, crop), name, view in zip(planned, batch.names, batch.views, strict=True):
                assert crops.sources[source].name(index) == name
                views.setdefault(name, set()).add((crop, view))
    assert len(views) == 6 and all(len(found) == 3 for found in views.values())
    assert crop_generator("a", 0).random() != crop_generator("a", 1).random() != crop_generator("b", 1).random()


def test_precompute_writes_every_crop_once(data: Path, tmp_path: Path) -> None:
    written = precompute(tiny(data), tmp_path / "cache", batch=5)
    assert written.total == written.done == 6 * 2 * 2 and written.records == 3 * written.total
    keys = {key_of(f"images/{i}.png", crop, (s, s)) for i in range(6) for crop in (0, 1) for s in (32, 48)}
    for name in TINY["teachers"]:
        assert set(entries(tmp_path / "cache", name)) == keys


# ---------------------------------------------------------------------------------------------------- coding


def skewed(batch: int = 8) -> Features:
    """Features as teachers have them: unequal channels, a few large ones, a mean."""
    scales = torch.logspace(-2, 1, 20).view(1, -1, 1, 1)
    spatial = torch.randn(batch, 20, 5, 7) * scales + 3
    return Features(torch.randn(batch, 6) * 100, spatial)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 0), ("fp16", 3e-4), ("bf16", 3e-3), ("int8", 8e-3)])
def test_coding_error_is_as_measured(dtype: str, bound: float) -> None:
    coding = Coding(FeatureSpec(6, 20), dtype)
    features = skewed()
    coding.update(features)
    coding.freeze()
    rows = coding.encode(features)
    assert rows.shape == (8, coding.bytes((5, 7))) and rows.dtype == np.uint8
    back = coding.decode(torch.from_numpy(rows), (5, 7))
    assert torch.equal(back.summary, features.summary)
    assert dtype != "fp32" or torch.equal(back.spatial, features.spatial)
    wrong = (back.spatial - features.spatial).square().sum(1)
    spread = (features.spatial - features.spatial.mean((0, 2, 3), keepdim=True)).square().sum(1).mean()
    error = coding.measure(features)
    assert error.relative == pytest.approx(float((wrong.mean() / spread).sqrt()), rel=1e-2, abs=1e-9)
    assert error.worst == pytest.approx(float((wrong.max() / spread).sqrt()), rel=1e-2, abs=1e-9)
    assert (error.relative > 0) == (dtype != "fp32") and error.relative <= bound and error.images == 8


def test_int8_keeps_small_channels() -> None:
    """PHI-S makes one step width suit all channels; without it, channels of scale 0.01 would be erased."""
    features = skewed(64)
    coding = Coding(FeatureSpec(6, 20), "int8")
    coding.update(features)
    coding.freeze()
    z = coding.normalizer(features.spatial)
    back = coding.normalizer(coding.decode(torch.from_numpy(coding.encode(features)), (5, 7)).spatial)
    errors = (back - z).square().mean((0, 2, 3)).sqrt()
    assert float(errors.max() / errors.min()) < 1.5 and float(errors.max()) < 0.02


def test_zero_cell_stays_zero_in_int8() -> None:
    coding = Coding(FeatureSpec(None, 20), "int8")
    coding.update(skewed())
    coding.freeze()
    mean = coding.normalizer.mean.view(1, -1, 1, 1).expand(1, -1, 2, 2).clone()
    back = coding.decode(torch.from_numpy(coding.encode(Features(None, mean))), (2, 2))
    assert torch.equal(back.spatial, mean)


def test_teacher_without_map_is_coded_as_a_vector() -> None:
    coding = Coding(FeatureSpec(6, None), "int8")
    assert not coding.needs_statistics and coding.bytes((0, 0)) == 24
    summary = torch.randn(3, 6)
    back = coding.decode(torch.from_numpy(coding.encode(Features(summary, None))), (0, 0))
    assert torch.equal(back.summary, summary) and back.spatial is None


def test_unknown_dtype_lists_the_legal_ones(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp32, fp16, bf16, int8, not 'int4'"):
        precompute(tiny(data), tmp_path / "cache", dtype="int4")
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------- refusals


def test_weights_hash_covers_weights_and_ignores_caches() -> None:
    one, two = Toy(), Toy()
    two.register_buffer("_names_text", torch.zeros(3), persistent=False)
    assert identity.weights_hash(one) == identity.weights_hash(two)
    compiled = torch.nn.Module()
    compiled._orig_mod = two  # what torch.compile makes of it
    assert identity.weights_hash(compiled) == identity.weights_hash(one)
    two.patches[0, 0, 0, 0] += 1e-6
    assert identity.weights_hash(one) != identity.weights_hash(two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teachers.toy.seed=3", r"teachers\.toy \(seed was 0, now 3\).*OTHER_FOLDER"),
        ("teachers.toy.stride=8", r"stride was 16, now 8"),
        ("data.views.flip=0.1", r"data\.views\.flip was 0\.5, now 0\.1.*restore these keys"),
        ("data.views.scale=[0.5, 1.0]", r"data\.views\.scale"),
        ("data.views.aspect=[1.0, 1.0]", r"data\.views\.aspect was \[0\.75, 1\.33"),
        ("data.views.roam=3", r"data\.views\.roam was 48, now 80"),
        ("data.views.shift=0", r"margin"),
        ("data.views.canvas=200", r"data\.views\.canvas was None, now 200"),
        ("data.views.crops=3", r"lacks 6 of the 18 records.*crop 2 at 32 px.*`agglo cache RECIPE --out"),
        ("partitions.0.sizes=[32, 48]", r"lacks 12 of the 24 records.*48 px"),
        ("teachers.new={kind: toy, seed: 4}", r"has no features of teachers\.new \(it has: toy\)"),
    ],
)
def test_cache_with_other_settings_is_refused(data: Path, tmp_path: Path, change: str, message: str) -> None:
    precompute(tiny(data, *ONE), tmp_path / "cache")
    opened(tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}"))
    with pytest.raises(ConfigError, match=message):
        opened(tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}", change))


def test_another_stride_is_refused_without_margin(data: Path, tmp_path: Path) -> None:
    still = (*ONE, "data.views={crops: 2}")
    precompute(tiny(data, *still), tmp_path / "cache")
    made = tiny(data, *still, f"data.feature_cache={tmp_path / 'cache'}")
    TargetSource(made, load_teachers(made), 16, torch.device("cpu"))
    with pytest.raises(ConfigError, match="the student's stride was 16, now 8"):
        TargetSource(made, load_teachers(made), 8, torch.device("cpu"))


def test_loss_weight_does_not_change_the_teacher(data: Path, tmp_path: Path) -> None:
    precompute(tiny(data, *ONE), tmp_path / "cache")
    opened(tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}", "teachers.toy.summary_weight=0.3"))


def test_changed_weights_and_preprocessing_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(tiny(data, *ONE), tmp_path / "cache")
    cached = tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}")
    begin, forward = Toy.__init__, Toy.forward

    def heavier(self, **keys) -> None:
        begin(self, **keys)
        self.patches *= 1.001

    with monkeypatch.context() as patch:
        patch.setattr(Toy, "__init__", heavier)
        patch.setattr(targets, "build_teachers", lambda made: {"toy": Toy()})
        with pytest.raises(ConfigError, match=r"another teachers\.toy \(other weights\)"):
            opened(cached)

    monkeypatch.setattr(Toy, "forward", lambda self, images: forward(self, images * 0.9))
    with pytest.raises(ConfigError, match="its preprocessing changed"):
        opened(cached)
    with pytest.raises(ConfigError, match="its preprocessing changed"):
        precompute(tiny(data, *ONE), tmp_path / "cache")


def saved_dino(folder: Path, **changes) -> Path:
    """A tiny DINOv3, or DINOv2 with patches of 14, as the hub has it."""
    transformers = pytest.importorskip("transformers")
    net = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    if changes.get("patch") == 14:
        transformers.Dinov2Model(transformers.Dinov2Config(**net, patch_size=14, image_size=56)).save_pretrained(folder)
    else:
        config = transformers.DINOv3ViTConfig(**net, intermediate_size=64, patch_size=16, image_size=64)
        transformers.DINOv3ViTModel(config).save_pretrained(folder)
    stated = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    return folder


def with_dino(folder: Path) -> str:
    return f"teachers={{toy: {{kind: transformers, model: {folder}}}}}"


def restate(folder: Path, **changes) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 96, "width": 96}}, r"its processor changed: size was 64, now 96"),
        (
            {"image_mean": [0.4, 0.5, 0.5]},
            r"its processor changed: mean was \[0\.5, 0\.5, 0\.5\], now \[0\.4, 0\.5, 0\.5\]",
        ),
        ({"image_std": [0.2] * 3}, r"its processor changed: std was \[0\.5, 0\.5, 0\.5\], now"),
    ],
)
def test_changed_processor_key_is_named(data: Path, tmp_path: Path, change: dict, message: str) -> None:
    cache, dino = tmp_path / "cache", saved_dino(tmp_path / "dino")
    precompute(tiny(data, *ONE, with_dino(dino)), cache)
    cached = (*ONE, with_dino(dino), f"data.feature_cache={cache}")
    opened(tiny(data, *cached))
    restate(dino, **change)
    with pytest.raises(ConfigError, match=f"{cache} has features of another teachers\\.toy.*{message}.*OTHER_FOLDER"):
        opened(tiny(data, *cached))
    picture(data / "new.png", 9)
    before = entries(cache)
    with pytest.raises(ConfigError, match=f"has features of another teachers\\.toy.*{message}"):
        precompute(tiny(data, *ONE, with_dino(dino)), cache)
    assert entries(cache) == before


def test_changed_input_size_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, two = tmp_path / "cache", (*ONE, "partitions.0.sizes=[32, 48]")
    precompute(tiny(data, *ONE), cache)
    precompute(tiny(data, *two), cache)  # a size that was added is compared too
    before = Toy.input_size
    monkeypatch.setattr(
        Toy, "input_size", lambda self, size, stride: (160, 160) if size[0] == 144 else before(self, size, stride)
    )
    message = r"input for 48 px views was 144x144 pixels with a grid of 9x9, now 160x160 pixels with a grid of 10x10"
    for changes in (ONE, two):
        with pytest.raises(ConfigError, match=message):
            opened(tiny(data, *changes, f"data.feature_cache={cache}"))
        with pytest.raises(ConfigError, match=message):
            precompute(tiny(data, *changes), cache)


def test_another_model_is_refused_before_the_probe(data: Path, tmp_path: Path) -> None:
    """Patches of 14 do not divide the old test image: what differs must be found before it is shown."""
    cache, three, two = tmp_path / "cache", saved_dino(tmp_path / "three"), saved_dino(tmp_path / "two", patch=14)
    precompute(tiny(data, *ONE, with_dino(three)), cache)
    other = tiny(data, *ONE, with_dino(two), f"data.feature_cache={cache}")
    for action in (lambda: opened(other), lambda: precompute(other, cache)):
        with pytest.raises(ConfigError, match=rf"{cache}.*teachers\.toy.*model was '{three}', now '{two}'"):
            action()
    (tmp_path / "kept").mkdir()
    for file in three.iterdir():  # the same folder, with another model in it
        file.rename(tmp_path / "kept" / file.name)
    for file in two.iterdir():
        file.rename(three / file.name)
    same = tiny(data, *ONE, with_dino(three), f"data.feature_cache={cache}")
    for action in (lambda: opened(same), lambda: precompute(same, cache)):
        with pytest.raises(ConfigError, match=rf"{cache}.*teachers\.toy \(its output changed: step was 16, now 14"):
            action()


def test_changed_and_new_images_are_refused_and_removed_ones_accepted(data: Path, tmp_path: Path) -> None:
    precompute(tiny(data, *ONE), tmp_path / "cache")
    cached = tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}")
    (data / "5.png").unlink()
    opened(cached)
    picture(data / "new.png", 99)
    with pytest.raises(ConfigError, match=r"lacks 2 of the 12 records.*images/new\.png, crop 0.*teacher toy"):
        opened(cached)
    (data / "new.png").unlink()
    with Image.open(data / "2.png") as image:
        pixels = np.array(image)
    pixels[:, :, 0] //= 2
    Image.fromarray(pixels).save(data / "2.png")
    loader = build_loader(cached, opened(cached))
    with pytest.raises(ConfigError, match=r"images/2\.png is not the image that teachers\.toy saw.*OTHER_FOLDER"):
        list(loader.iterate(0, 5))


def test_unavailable_teacher_is_compared_by_its_keys_only(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(tiny(data, *ONE), tmp_path / "cache")

    def gone(made) -> dict:
        raise AssetError("toy.safetensors is missing")

    monkeypatch.setattr(targets, "build_teachers", gone)
    with pytest.warns(UserWarning, match=r"teachers\.toy cannot be loaded \(toy\.safetensors is missing\)"):
        opened(tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}"))
    with pytest.warns(UserWarning, match="cannot be loaded"), pytest.raises(ConfigError, match="seed was 0, now 3"):
        opened(tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}", "teachers.toy.seed=3"))


def test_uncacheable_recipes_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.views\.crops=2"):
        precompute(tiny(data, "data.views.crops=0", "data.views.roam=0"), tmp_path / "cache")
    with pytest.raises(ConfigError, match="objective upsample trains no student: cache a recipe that trains one"):
        precompute(recipe.load("featsharp_quick", ["data.views.crops=2"], smoke=True), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    for change, message in (
        ("data.views.mixup=0.1", r"set data\.views\.mixup=0"),
        ("data.views={crops: 0}", r"set data\.views\.crops"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(data, "data.feature_cache=somewhere", change)
    with pytest.raises(ConfigError, match=r"data\.views\.roam needs fixed crops"):
        tiny(data, "data.views={roam: 2}")
    with pytest.raises(ConfigError, match=r"feature cache .*nowhere does not exist.*agglo cache RECIPE --out"):
        opened(tiny(data, f"data.feature_cache={tmp_path / 'nowhere'}"))
    with pytest.raises(ConfigError, match=r"is not a feature cache: it has no manifest\.json"):
        opened(tiny(data, f"data.feature_cache={data}"))
    with pytest.raises(ConfigError, match="in use and is not a feature cache"):
        precompute(tiny(data), data)
    assert not list(data.glob(".*"))  # nothing was created in that folder


def test_duplicate_image_names_are_refused(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "images"
    other.mkdir(parents=True)
    picture(other / "3.png", 50)
    sources = f"data.sources=[{{kind: folder, path: {data}}}, {{kind: folder, path: {other}}}]"
    with pytest.raises(ConfigError, match=r"two images have the name 'images/3\.png'"):
        precompute(tiny(data, *ONE, sources), tmp_path / "cache")


@pytest.mark.parametrize(("fault", "message"), [(float("nan"), "its map is not finite"), (0.0, "equal at all")])
def test_broken_teacher_is_named(data: Path, tmp_path: Path, monkeypatch, fault: float, message: str) -> None:
    real = Toy.forward
    monkeypatch.setattr(Toy, "forward", lambda self, x: real(self, x).map(lambda part: part * 0 + fault))
    if fault != fault:
        monkeypatch.setattr(
            Toy, "forward", lambda self, x: Features(real(self, x).summary, real(self, x).spatial * fault)
        )
    with pytest.raises(ConfigError, match=rf"teachers\.toy: .*{message}"):
        precompute(tiny(data, *ONE), tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------- interruptions


def test_unreadable_images_are_counted_and_named(data: Path, tmp_path: Path) -> None:
    (data / "3.png").write_bytes(b"not an image")
    written = precompute(tiny(data, *ONE), tmp_path / "cache")
    assert written.unreadable == ["images/3.png"] and (written.done, written.total) == (10, 12)
    cached = tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}")
    loader = build_loader(cached, opened(cached))
    assert all("images/3.png" not in loader.batch(step).names for step in range(5))
    picture(data / "3.png", 3)  # it is whole again
    fresh = build_loader(cached, opened(cached))
    with pytest.raises(ConfigError, match=r"no features of teachers\.toy for images/3\.png"):
        list(fresh.iterate(0, 5))
    assert precompute(tiny(data, *ONE), tmp_path / "cache").records == 2
    assert len(list(build_loader(cached, opened(cached)).iterate(0, 5))) == 5


def test_only_missing_records_are_computed(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert precompute(tiny(data, *ONE), cache, batch=4).records == 12
    assert precompute(tiny(data, *ONE), cache, batch=4).records == 0
    picture(data / "6.png", 6)
    assert precompute(tiny(data, *ONE), cache, batch=4).records == 2  # another image
    assert precompute(tiny(data, *ONE, "data.views.crops=3"), cache, batch=4).records == 7  # another crop
    before = entries(cache)
    more = (*ONE, "partitions.0.sizes=[32, 48]", "teachers.other={kind: toy, seed: 1}")
    assert precompute(tiny(data, *more), cache, batch=4).records == 14 + 28  # another size, and another teacher
    after = entries(cache)
    assert all(after[key] == value for key, value in before.items())
    opened(tiny(data, *more, f"data.feature_cache={cache}"))
    with pytest.raises(ConfigError, match="dtype was fp16, now int8"):
        precompute(tiny(data, *ONE), cache, dtype="int8")


def test_full_disk_stops_cleanly_and_names_the_missing_bytes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = tmp_path / "straight"
    precompute(tiny(data, *ONE), straight, batch=4)
    real, left = os.pwrite, [5000]

    def small(file: int, chunk, offset: int) -> int:
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        count = real(file, chunk[: left[0]], offset)
        left[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", small)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        precompute(tiny(data, *ONE), tmp_path / "cache", batch=4)
    one = entries(straight)
    length = len(next(iter(one.values()))[1]) + 32
    whole = 5000 // length
    found = entries(tmp_path / "cache")
    assert len(found) == whole and all(found[key] == one[key] for key in found)
    missing = (12 - whole // 4 * 4) * length
    assert f"of 12 crops are complete; about {missing / 1e3:.1f} kB more are needed" in str(caught.value)
    monkeypatch.setattr(os, "pwrite", real)
    assert precompute(tiny(data, *ONE), tmp_path / "cache", batch=4).records == 12 - whole
    again = entries(tmp_path / "cache")
    assert {key: checksum for key, (checksum, _) in again.items()} == {
        key: checksum for key, (checksum, _) in one.items()
    }


@pytest.mark.parametrize("file", ["manifest.json", "teacher.json", "statistics.safetensors", ".lock"])
def test_disk_full_at_the_start_is_reported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    cache, real, opening = tmp_path / "cache", Path.write_bytes, os.open

    def full(path: Path, content: bytes) -> int:
        if path.name.startswith(f".{Path(file).stem}."):
            raise OSError(28, "No space left on device")
        return real(path, content)

    def locked(path, *arguments):
        if str(path).endswith(file):
            raise OSError(13, "Permission denied")
        return opening(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(os, "open", locked)
        with pytest.raises(StorageError, match="0 of 12 crops are complete; about") as caught:
            precompute(tiny(data, *ONE), cache)
    written = precompute(tiny(data, *ONE), cache)
    size = 12 * written.crop_bytes
    assert str(caught.value).startswith(f"{cache}: ") and f"about {size / 1e3:.1f} kB more are needed" in str(
        caught.value
    )
    why = "(Permission denied)" if file == ".lock" else "the disk is full"
    assert why in str(caught.value) and "run the same command again" in str(caught.value)
    assert written.done == 12

    monkeypatch.setattr(Path, "write_bytes", full)
    if file in ("manifest.json", "teacher.json"):  # what is there already is counted, not forgotten
        with pytest.raises(StorageError, match=r"12 of 24 crops are complete"):
            precompute(tiny(data, *ONE, "partitions.0.sizes=[32, 48]"), cache)
        monkeypatch.setattr(Path, "write_bytes", real)
        assert precompute(tiny(data, *ONE, "partitions.0.sizes=[32, 48]"), cache).records == 12


def test_insufficient_space_is_reported_before_writing(data: Path, tmp_path: Path, monkeypatch) -> None:
    messages: list[str] = []
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage)
    precompute(tiny(data, *ONE), tmp_path / "cache", message=messages.append)
    size = sum(len(payload) + 32 for _, payload in entries(tmp_path / "cache").values())
    assert f"{size / 1e3:.1f} kB to write, 1.0 kB free" in messages[0]
    assert f"{(size - 1000) / 1e3:.1f} kB more than is free" in messages[1]


def test_only_one_process_writes(data: Path, tmp_path: Path) -> None:
    from agglo.cache.disk import exclusive

    cache = tmp_path / "cache"
    with exclusive(cache), pytest.raises(ConfigError, match="another process is writing"):
        precompute(tiny(data, *ONE), cache)
    precompute(tiny(data, *ONE), cache)


def test_records_without_teacher_file_are_refused(data: Path, tmp_path: Path) -> None:
    precompute(tiny(data, *ONE), tmp_path / "cache")
    (tmp_path / "cache" / "toy" / "teacher.json").unlink()
    with pytest.raises(ConfigError, match=r"has records but no teacher\.json"):
        precompute(tiny(data, *ONE), tmp_path / "cache")


def test_changed_statistics_are_refused(data: Path, tmp_path: Path) -> None:
    precompute(tiny(data, *ONE), tmp_path / "cache")
    file = tmp_path / "cache" / "toy" / "statistics.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(AssetError, match="the records cannot be decoded without it"):
        opened(tiny(data, *ONE, f"data.feature_cache={tmp_path / 'cache'}"))


def test_damaged_record_stops_training_and_is_repaired_by_precompute(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    precompute(tiny(data, *ONE), cache)
    before = entries(cache)
    file = shard_file(cache / "toy", 0)
    content = bytearray(file.read_bytes())
    content[100] ^= 8
    file.write_bytes(content)
    cached = tiny(data, *ONE, f"data.feature_cache={cache}")
    loader = build_loader(cached, opened(cached))
    with pytest.raises(AssetError, match=r"000000\.shard.*delete that file"):
        list(loader.iterate(0, 5))
    file.unlink()
    with pytest.raises(ConfigError, match="lacks 12 of the 12"):
        opened(cached)
    assert precompute(tiny(data, *ONE), cache).records == 12
    assert entries(cache) == before  # the same batches: to the last bit


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from agglo import recipe
from agglo.training.precompute import precompute
made = recipe.from_dict(json.loads(sys.argv[1]))
folder, wanted, chance, kills = Path(sys.argv[2]), int(sys.argv[3]), random.Random(1), 0
def size():
    return sum(path.stat().st_size for path in folder.glob("*/*.shard"))
while True:
    child = os.fork()
    if not child:
        precompute(made, folder, dtype="fp32", batch=7, shard_bytes=30_000, progress=lambda *_: time.sleep(0.003))
        os._exit(0)
    start = size()
    while kills < wanted:
        done, _ = os.waitpid(child, os.WNOHANG)
        if done:
            sys.exit("it was faster than the kill")
        if size() > start + 5000:
            time.sleep(chance.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            break
        time.sleep(0.001)
    else:
        break
print(kills, os.waitpid(child, 0)[1])
"""


def test_kills_leave_no_wrong_and_no_missing_record(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(300):
        Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    changes = (*ONE, "partitions=[{sizes: [16], batch: 4}]", "data.views={crops: 1}", "teachers.toy.stride=8")
    made = tiny(folder, *changes)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(made.to_dict()), tmp_path / "cache", "4"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["4", "0"], done.stderr
    cached = tiny(folder, *changes, f"data.feature_cache={tmp_path / 'cache'}")
    lesson = opened(cached)
    assert len(ShardReader(tmp_path / "cache" / "toy")) == 300
    loader, toy, names = build_loader(cached, lesson), build_teachers(made)["toy"], set()
    for step in range(75):
        batch = loader.batch(step)
        found, expected = lesson(batch, RenderedBatch(batch.images, batch.field))["toy"].features, toy(batch.images)
        assert torch.allclose(found.summary, expected.summary, atol=1e-6)
        assert torch.allclose(found.spatial, expected.spatial, atol=1e-6)
        names.update(batch.names)
    assert len(names) == 300


def test_cache_is_readable_while_it_grows(data: Path, tmp_path: Path) -> None:
    """A cache that holds what a run needs is used while other things are added to it."""
    cache = tmp_path / "cache"
    precompute(tiny(data, *ONE), cache, dtype="fp32")
    cached = tiny(data, *ONE, f"data.feature_cache={cache}")
    lesson = opened(cached)
    reader, checked = FeatureCache(cache), []

    def look(done: int, total: int) -> None:
        loader = build_loader(cached, lesson)
        batch = loader.batch(done)
        toy = build_teachers(cached)["toy"]
        expected = whole_crop_features(toy, batch.images, outer_size(batch.size, cached.data.views, 16), 16)[""]
        found: Tensor = lesson(batch, RenderedBatch(batch.images, batch.field))["toy"].features.spatial
        assert torch.allclose(found, expected.spatial, atol=1e-6)
        reader.reader("toy").refresh()
        checked.append(len(reader.reader("toy")))

    precompute(tiny(data, *ONE, "partitions.0.sizes=[32, 48]"), cache, dtype="fp32", batch=3, progress=look)
    assert checked == sorted(checked) and checked[0] == 12 and checked[-1] == 24 and len(set(checked)) > 3
