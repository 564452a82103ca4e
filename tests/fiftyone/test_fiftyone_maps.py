"""Heatmaps: right for every aspect ratio, comparable over a dataset, of texts, patches, heads and norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from agglo.config import build
from agglo.integrations.fiftyone import load_model
from agglo.integrations.fiftyone.model import AggloModel
from agglo.integrations.fiftyone.options import parse
from agglo.types import ConfigError, FeatureSpec, Output


class Averages(nn.Module):
    """Stands for a model: each cell has the mean colour of its 16 x 16 pixels, and small noise in other channels."""

    preferred_size = 512
    head_configs: dict = {}
    student = nn.Identity()

    def __init__(self):
        super().__init__()
        self.spec = FeatureSpec(summary=3, spatial=8, stride=16, step=16)
        self.weight = nn.Parameter(torch.zeros(1))
        self.passes = 0

    def config(self):
        return {}

    def step(self, window=None):
        return 16

    def forward(self, images, heads=(), resize=True, window=None):
        self.passes += len(images)
        cells = nn.functional.avg_pool2d(images, 16)
        noise = torch.randn(len(images), 5, *cells.shape[2:], generator=torch.Generator().manual_seed(1)) * 0.01
        return Output(images.mean((2, 3)), torch.cat([cells, noise], 1), {})


def ramp(height: int, width: int, angle: float) -> np.ndarray:
    """``(H, W)`` from 0 to 1 along a direction."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    values = x * np.cos(angle) + y * np.sin(angle)
    return (values - values.min()) / np.ptp(values)


def shrunk(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BOX))


@pytest.mark.parametrize("options", [{}, {"use_external_preprocessor": True, "max_size": 256}])
def test_a_ramp_of_any_aspect_ratio_is_drawn_as_a_ramp(options):
    """The grid comes from the size of the input; one guessed from the number of tokens is wrong for many ratios."""
    model = AggloModel(Averages().eval(), "averages", parse({"output_type": "spatial", **options}))
    rng = np.random.default_rng(0)
    worst = 1.0
    for _ in range(250 if options else 1000):
        height, width = (int(n) for n in rng.integers(150, 600, 2))
        truth = ramp(height, width, rng.uniform(0, np.pi / 2))
        pixels = np.repeat((truth * 255).astype(np.uint8)[..., None], 3, 2)
        found = model.predict(pixels).map
        expected = shrunk(truth, found.shape)
        worst = min(worst, np.corrcoef(found.ravel(), expected.ravel())[0, 1])
    assert worst >= 0.99


@pytest.fixture
def ramps(dataset, tmp_path):
    """A dataset of six grey images of different brightness and size."""
    import fiftyone

    for index in range(6):
        values = ramp(64 + 16 * index, 96, 0.3) * 40 + 30 * index
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / f"{index}.png")
    dataset.add_samples([fiftyone.Sample(filepath=str(path)) for path in sorted(tmp_path.glob("*.png"))])
    return dataset


def test_one_scale_serves_a_dataset_and_later_calls(ramps):
    model = AggloModel(Averages().eval(), "averages", parse({"output_type": "spatial"}))
    ramps.apply_model(model, "heat", num_workers=0)
    assert model.model.passes == len(ramps), "the images of the scale are not encoded again"
    maps = [each.map for each in ramps.values("heat")]
    assert np.all(np.diff([each.mean() for each in maps]) > 20), "brighter images have higher values"
    assert len({(low, high) for low, high in zip(*ramps.values(["heat.low", "heat.high"]), strict=True)}) == 1
    assert ramps.first()["heat"].range == [0, 255]
    assert min(each.map.min() for each in ramps.values("heat")) == 1, "FiftyOne draws nothing at 0"
    other = AggloModel(Averages().eval(), "averages", parse({"output_type": "spatial"}))
    ramps[3:4].apply_model(other, "again", num_workers=0)
    ramps.apply_model(other, "twice", num_workers=0, batch_size=2)
    assert all(np.array_equal(each.map, before) for each, before in zip(ramps.values("twice"), maps, strict=True))
    assert np.array_equal(ramps[3:4].first()["again"].map, maps[3])
    assert other.model.passes == 1 + len(ramps), "the stored scale is read, not fitted again"


def test_one_pass_gives_summary_heads_and_heatmaps(ramps):
    model = load_model(
        "agglo-lite", output_type="all", heads=["lite2", "conse"], maps=["pca", "rgb", "norm", "heads"],
        text=["a cup", "grey"], patch=(0.5, 0.5),
    )  # fmt: skip
    ramps.apply_model(model, "m", num_workers=0)
    passes = []
    real = model.model.forward
    model.model.forward = lambda *args, **kwargs: (passes.append(len(args[0])), real(*args, **kwargs))[1]
    ramps.apply_model(model, "m", num_workers=0)
    assert sum(passes) == len(ramps)
    first = ramps.first()
    keys = [name for name in first.field_names if name.startswith("m_")]
    assert keys == [f"m_{key}" for key in model.result_keys()]
    assert first["m_summary"].shape == (1280,)
    assert first["m_lite2_summary"].shape == (1280,)
    assert first["m_conse_summary"].shape == (384,)
    for key in ("pca", "red", "green", "blue", "norm", "lite2", "patch", "a_cup", "grey"):
        assert first[f"m_{key}"].map.dtype == np.uint8
        assert first[f"m_{key}"].range == [0, 255]


@pytest.mark.parametrize(("left", "right"), [("coffee", "gravel"), ("chelsea", "coffee"), ("rocket", "chelsea")])
def test_a_text_is_found_where_it_is(left, right):
    """Two photographs side by side: each of the texts has its maximum in its own photograph."""
    photos = build("sources", {"kind": "photos", "split": "all"})
    index = {photos.name(i).rpartition("/")[2]: i for i in range(len(photos))}
    picture = Image.new("RGB", (512, 256))
    for name, x in ((left, 0), (right, 256)):
        picture.paste(photos.read(index[name]).convert("RGB").resize((256, 256)), (x, 0))
    texts = {"coffee": "a cup of coffee", "gravel": "stones", "chelsea": "a cat", "rocket": "a rocket"}
    model = load_model("agglo-lite", output_type="spatial", maps=[], text=[texts[left], texts[right]])
    first, second = (each.map.astype(float) for each in model.predict(np.asarray(picture)).values())
    middle = first.shape[1] // 2
    assert first[:, :middle].max() == 255 > first[:, middle:].max() + 25
    assert second[:, middle:].max() == 255 > second[:, :middle].max() + 25


def test_a_patch_is_most_similar_to_itself():
    model = load_model("agglo-lite", output_type="spatial", maps=[], patch=(0.9, 0.1))
    array = np.random.default_rng(0).integers(0, 255, (80, 120, 3)).astype(np.uint8)
    array[:, :60] = 0
    found = model.predict(array)
    height, width = found.map.shape
    assert found.map[int(0.1 * height), int(0.9 * width)] == 255
    assert found.high == pytest.approx(1, abs=1e-5)
    assert found.map[:, width * 3 // 4 :].mean() > found.map[:, : width // 4].mean() + 50


def test_a_patch_of_one_photograph_is_looked_for_in_others(tmp_path):
    """A red patch of one image is found at the red half of another."""
    one, other = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 128, 3), np.uint8)
    one[:, :32] = other[:, 64:] = (220, 30, 20)
    one[:, 32:] = other[:, :64] = (20, 40, 210)
    Image.fromarray(one).save(tmp_path / "one.png")
    options = {"output_type": "spatial", "maps": [], "patch": (0.25, 0.5), "patch_image": tmp_path / "one.png"}
    found = AggloModel(Averages().eval(), "averages", parse(options)).predict(other).map
    width = found.shape[1]
    assert found[:, width // 2 + 1 :].min() > 200 > 50 > found[:, : width // 2 - 1].max()
    with pytest.raises(ConfigError, match=r"patch_image: .*none\.png: .*no such file"):
        AggloModel(Averages().eval(), "averages", parse({**options, "patch_image": tmp_path / "none.png"}))


def test_maps_written_to_a_folder_keep_their_values(ramps, tmp_path):
    """FiftyOne drops the range of maps that it writes as PNG; ``low`` and ``high`` remain."""
    model = AggloModel(Averages().eval(), "averages", parse({"output_type": "spatial"}))
    ramps.apply_model(model, "inside", num_workers=0)
    ramps.apply_model(model, "outside", num_workers=0, output_dir=str(tmp_path / "maps"))
    for sample in ramps:
        assert sample["outside"].map is None
        assert np.array_equal(np.asarray(Image.open(sample["outside"].map_path)), sample["inside"].map)
        assert (sample["outside"].low, sample["outside"].high) == (sample["inside"].low, sample["inside"].high)


def test_features_that_are_not_finite_cost_one_sample(ramps):
    model = AggloModel(Averages().eval(), "averages", parse({"output_type": "spatial"}))
    real = model.model.forward

    def broken(images, **kwargs):
        out = real(images, **kwargs)
        dark = images.mean((1, 2, 3)) < 0.1
        return Output(out.summary, torch.where(dark[:, None, None, None], torch.nan, out.spatial), {})

    model.model.forward = broken
    ramps.apply_model(model, "heat", num_workers=0)
    assert [each is None for each in ramps.values("heat")] == [True] + [False] * 5
    assert ramps.first()["agglo_error"] == "its features are not finite"
