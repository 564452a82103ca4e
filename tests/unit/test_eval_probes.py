"""Linear, segmentation, depth and normals probes beyond their defaults, against closed forms and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from agglo.evals import depth as depth_eval
from agglo.evals import knn as knn_eval
from agglo.evals import normals as normals_eval
from agglo.evals._dense import Dpt, Training, _rate
from agglo.evals._features import encode, layered
from agglo.evals._labels import class_names
from agglo.evals._pixels import PixelTraining
from agglo.evals._windows import Changed, Windows
from agglo.evals.base import EvalContext, FeatureError, ProbeError
from agglo.evals.depth import Depth
from agglo.evals.knn import Knn
from agglo.evals.linear import Linear
from agglo.evals.normals import Normals
from agglo.evals.retrieval import Retrieval
from agglo.evals.segmentation import Segmentation
from agglo.evals.zero_shot import ZeroShot, named_templates
from agglo.model.model import Model
from agglo.types import ConfigError, Features, FeatureSpec, ImageError
from support.models import Broken, Noise, Oracle, Squares

pytestmark = pytest.mark.evals

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these maps of a few cells."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tilted(Squares):
    """Squares whose normal is one of three unit vectors by colour; the background's is not known."""

    VECTORS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0.6, 0, -0.8]], np.float32)

    def annotation(self, index: int) -> Any:
        found = super().annotation(index)
        found.normals = np.ascontiguousarray(self.VECTORS[found.semantic].transpose(2, 0, 1))
        return found


class Coarse(Oracle):
    """Sees the truth in cells of four pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = FeatureSpec(summary=3, spatial=5, stride=4, step=4)

    def forward(self, images: Tensor) -> Features:
        out = super().forward(images)
        return Features(out.summary, None if out.spatial is None else torch.nn.functional.avg_pool2d(out.spatial, 4))


def splits(kind: Any, source: type[Squares] = Squares, count: int = 12, side: int = 32, **options: Any) -> Any:
    named = {name: source(count, seed, side) for seed, name in enumerate(("train", "val", "test"))}
    return kind(**{"size": side, **named, **options})


# --- linear -----------------------------------------------------------------------------------------------------------


def test_linear_of_oracle_is_perfect() -> None:
    assert splits(Linear).run(Oracle()) == {"top1": 1.0, "top5": 1.0}


@pytest.mark.parametrize("decay", [0.1, 0.003])
def test_linear_equals_scikit_learn(decay: float) -> None:
    model = Noise()
    eval_ = splits(Linear, count=60, decay=[decay])
    found = eval_.run(model)["top1"]
    context = EvalContext()
    train, test = (encode(model, source, 32, context, want="summary").summary for source in (eval_.train, eval_.test))
    assert train is not None
    assert test is not None
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    x, q = (((one.double() - mean) / std).numpy() for one in (train, test))
    y = np.arange(60) % 3
    reference = LogisticRegression(C=1 / (decay * 60), tol=1e-9, max_iter=1000).fit(x, y)
    assert found == pytest.approx((reference.predict(q) == y).mean(), abs=1e-9)


def test_linear_refuses_bad_options() -> None:
    for options, message in (({"decay": []}, "decay"), ({"decay": [-1.0]}, "decay"), ({"steps": 0}, "steps")):
        with pytest.raises(ConfigError, match=message):
            Linear(**options)
    with pytest.raises(FeatureError, match=r"summary features of squares/0/3 contain NaN"):
        splits(Linear).run(Broken(float("nan"), 3))

    class Wrong(Squares):
        classes = ("red", "green")  # but labels are 0, 1, 2

        def arrays(self, index: int) -> Any:
            return Squares(side=self.side).arrays(index)

    with pytest.raises(ConfigError, match=r"squares/0/2 has label 2, but the source has 2 classes: .* 0 to 1"):
        splits(Linear, Wrong).run(Oracle())


# --- knn --------------------------------------------------------------------------------------------------------------


def test_grouped_topk_equals_topk() -> None:
    scores = torch.tensor(RNG.standard_normal((5, 32 * 200)))
    scores[1, :40] += 10  # all winners in one or two groups
    values, index = knn_eval._largest(scores, 20)
    assert scores.shape[1] // knn_eval._GROUP >= 4 * 20  # the short way is taken
    wanted = torch.topk(scores, 20)
    assert torch.equal(values, wanted.values)
    assert torch.equal(scores.gather(1, index), wanted.values)


def test_majority_vote_equals_scikit_learn() -> None:
    model, k = Noise(), 5
    eval_ = Knn(k=k, vote="majority", size=32, train=Squares(60), test=Squares(60, 1))  # type: ignore[arg-type]
    context = EvalContext()
    bank, queries = (encode(model, source, 32, context, want="summary").summary for source in (eval_.train, eval_.test))
    labels = 2 - np.arange(60) % 3  # in the order of their names: blue, green, red; the first wins equal votes
    found = KNeighborsClassifier(k, metric="cosine").fit(bank, labels).predict(queries)
    assert eval_.run(model)["top1"] == pytest.approx((found == labels).mean(), abs=1e-9)
    with pytest.raises(ConfigError, match="weighted or majority"):
        Knn(vote="all")  # type: ignore[arg-type]


def test_classify_refuses_bad_labels_and_widths() -> None:
    bank, labels = torch.eye(3), torch.tensor([0, 1, 5])
    with pytest.raises(ConfigError, match="label 5 in the bank is outside 0 to 2"):
        knn_eval.classify(bank, labels, bank, 3, 1, 1.0)
    with pytest.raises(ConfigError, match="3 channels and the queries 2"):
        knn_eval.classify(bank, labels.clamp(max=2), bank[:, :2], 3, 1, 1.0)


# --- zero-shot templates ----------------------------------------------------------------------------------------------


def test_templates_by_name() -> None:
    assert named_templates("base") == ("an image of a {}.",)
    assert ZeroShot(templates="base").templates == ("an image of a {}.",)
    pytest.importorskip("open_clip")
    openai, simple = named_templates("openai"), named_templates("simple")
    assert (len(openai), len(simple)) == (80, 7)
    assert all(text.count("{}") == 1 for text in openai + simple)
    assert "a bad photo of a {}." in openai
    with pytest.raises(ConfigError, match="did you mean 'openai'"):
        ZeroShot(templates="opneai")


# --- segmentation -----------------------------------------------------------------------------------------------------


def test_adamw_probe_of_oracle_is_perfect() -> None:
    found = splits(Segmentation, probe="adamw", lr=0.3, steps=60, warmup=10, decay=[0.0]).run(Oracle())
    assert found["miou"] > 0.999
    again = splits(Segmentation, probe="adamw", lr=0.3, steps=60, warmup=10, decay=[0.0]).run(Oracle())
    assert again == found


def test_adamw_learning_rate_schedule() -> None:
    training = PixelTraining(steps=100, warmup=20, lr=1.0, decay=0.0, batch=1, seed=0)
    rates = [training.rate(step) for step in (0, 10, 20, 60, 100)]
    assert rates == pytest.approx([1e-6, 0.5, 1.0, 0.5, 0.0], abs=1e-6)


def test_diverging_probe_raises() -> None:
    with pytest.raises(ProbeError, match="segmentation probe diverged"):
        splits(Segmentation, probe="adamw", lr=1e30, steps=30, decay=[0.0]).run(Noise())
    with pytest.raises(ProbeError, match="depth probe diverged"):
        splits(Depth, probe="dpt", hidden=4, epochs=3, lr=1e30).run(Noise())


def test_single_window_equals_whole_image() -> None:
    whole = splits(Segmentation, decay=[0.01]).run(Noise())
    slid = splits(Segmentation, decay=[0.01], inference="slide", short=32, stride=32).run(Noise())
    assert slid == pytest.approx(whole, abs=1e-12)


def test_sliding_over_overlapping_windows() -> None:
    found = splits(Segmentation, side=48, size=32, short=48, decay=[0.01], inference="slide", stride=16).run(Oracle())
    assert found == {"miou": 1.0, "pixel_accuracy": 1.0}


def test_windows_cover_every_pixel_and_cut_their_masks() -> None:
    class Wide(Squares):
        def arrays(self, index: int) -> Any:
            image, semantic, depth = super().arrays(index)
            return np.concatenate([image] * 2, 1)[:, :50], np.concatenate([semantic] * 2, 1)[:, :50], depth

    source = Wide(2)
    windows = Windows(source, (16, 16), 10, 32)  # 32 x 50 at its own scale
    seen = np.zeros((2, 32, 50), int)
    for i, window in enumerate(windows.windows):
        x0, y0, x1, y1 = window.box
        assert windows.read(i).size == (16, 16)
        pixels, semantic, _ = source.arrays(window.image)
        np.testing.assert_array_equal(np.asarray(windows.read(i)), pixels[y0:y1, x0:x1])
        np.testing.assert_array_equal(windows.annotation(i).semantic, semantic[y0:y1, x0:x1])
        seen[window.image, y0:y1, x0:x1] += 1
    assert seen.min() >= 1
    assert len({windows.name(i) for i in range(len(windows))}) == len(windows)
    for stride, short, message in (
        (17, 32, "stride of 1 to 16, got 17"),
        (8, 12, "short 12 is less than .*at least 16"),
    ):
        with pytest.raises(ConfigError, match=message):
            Windows(source, (16, 16), stride, short)


def test_masks_of_another_size_and_classes_out_of_range() -> None:
    class Small(Squares):
        def annotation(self, index: int) -> Any:
            found = super().annotation(index)
            found.semantic = found.semantic[:20]
            return found

    with pytest.raises(
        ConfigError, match=r"none of \d+ images .* squares/0/0.*: is 32x32 pixels \(HxW\) and its semantic map 20x32"
    ):
        splits(Segmentation, Small).run(Oracle())
    for probe in ("logistic", "adamw"):
        slide = {"inference": "slide", "size": 16, "short": 32, "probe": probe}
        with pytest.raises(
            ConfigError,
            match=r"none of \d+ images .* squares/0/0.*: is 32x32 pixels \(HxW\) and its semantic map 20x32",
        ):
            splits(Segmentation, Small, **slide).run(Oracle())

    class Many(Squares):
        def annotation(self, index: int) -> Any:
            found = super().annotation(index)
            found.semantic = np.where(found.semantic == 1, 9, found.semantic)
            return found

    for probe in ("logistic", "adamw"):
        with pytest.raises(ConfigError, match=r"squares/0/0 contains class 9, but the source has 3"):
            splits(Segmentation, Many, probe=probe).run(Oracle())
    for options, message in (({"probe": "sgd"}, "logistic or adamw"), ({"inference": "tile"}, "whole or slide")):
        with pytest.raises(ConfigError, match=message):
            splits(Segmentation, **options)


def test_one_image_with_unusable_masks_is_skipped() -> None:
    class One(Squares):
        def annotation(self, index: int) -> Any:
            found = super().annotation(index)
            if index == 1:
                found.semantic = found.semantic[:20]
            if index == 2:
                raise ImageError("mask.png", "damaged")
            return found

    for options in ({}, {"inference": "slide", "size": 16, "short": 32}):
        with pytest.warns(
            UserWarning, match=r"skipped \d+ of \d+ images, whose ground truth .*map 20x32.*mask.png: damaged"
        ):
            found = splits(Segmentation, One, **options).run(Oracle())
        assert found["miou"] > 0.5


# --- depth ------------------------------------------------------------------------------------------------------------


def test_dpt_learns_depth_deterministically() -> None:
    options: dict[str, Any] = {
        "probe": "dpt",
        "hidden": 8,
        "epochs": 12,
        "lr": 2e-2,
        "batch": 2,
        "count": 16,
        "side": 16,
    }
    found = splits(Depth, **options).run(Coarse())
    guess = splits(Depth, count=16, side=16, ridge=[1e9]).run(Coarse())
    assert found["rmse"] < 0.6 * guess["rmse"]
    assert found["delta"] > guess["delta"]
    options["epochs"] = 2
    short = splits(Depth, **options).run(Coarse())
    assert splits(Depth, **options).run(Coarse()) == short != splits(Depth, **options, seed=1).run(Coarse())


@pytest.mark.parametrize(("kind", "source"), [(Depth, Squares), (Normals, Tilted)])
def test_dpt_probe_with_rising_loss_raises(kind: Any, source: type[Squares]) -> None:
    options: dict[str, Any] = {"probe": "dpt", "hidden": 8, "epochs": 2, "batch": 4, "side": 16}
    with pytest.raises(ProbeError, match=r"probe diverged"):
        splits(kind, source, lr=1e3, **options).run(Coarse())


def test_maps_are_stored_contiguously() -> None:
    class Last(Noise):
        def forward(self, images: Tensor) -> Features:
            out = super().forward(images)
            assert out.spatial is not None
            return Features(out.summary, out.spatial.to(memory_format=torch.channels_last))

    found = encode(Last(), Squares(3), 32, EvalContext(), want="spatial").spatial
    assert found is not None and found.is_contiguous()


@pytest.mark.parametrize("kind", [Depth, Normals])
def test_dpt_probe_options_are_checked(kind: Any) -> None:
    for options, message in (
        ({"probe": "mlp"}, "linear or dpt"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"ridge": [0.0]}, "ridge"),
    ):
        with pytest.raises(ConfigError, match=message):
            kind(**options)


def test_warm_up_and_cosine() -> None:
    training = Training(epochs=10, warmup=2)
    assert _rate(1, training) == pytest.approx(0.5, abs=1e-3)
    assert _rate(2, training) == pytest.approx(1)
    assert _rate(6, training) == pytest.approx(0.5)
    assert _rate(10, training) == pytest.approx(0, abs=1e-12)


def test_dpt_of_any_grid_gives_four_times_the_grid() -> None:
    for layers, grid in ((1, (1, 1)), (2, (3, 5)), (4, (4, 4))):
        head = Dpt(6, layers, 8, 5)
        assert head(torch.randn(2, 6 * layers, *grid)).shape == (2, 5, 4 * grid[0], 4 * grid[1])


def test_several_blocks_of_a_student() -> None:
    student = {"kind": "vit", "width": 16, "depth": 4, "heads": 2, "patch": 8, "max_grid": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(student, {}, tokens=("a",)).eval()
    seen, count = layered(model, 2)
    context, source = EvalContext(), Squares(2)
    first, second = (encode(layered(model, 2)[0], source, 32, context, want="spatial") for _ in range(2))
    assert first is second  # encoded once
    assert count == 2
    assert seen.spec.spatial == 32
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = seen(images).spatial
        wanted = [one.spatial for one in model.intermediates(images, [1, 3], norm=True)]
    assert found is not None
    assert torch.equal(found, torch.cat([one for one in wanted if one is not None], 1))
    assert layered(Oracle(), 4)[1] == 1  # has no blocks
    found = splits(Depth, probe="dpt", hidden=4, epochs=1, layers=2).run(model)
    assert math.isfinite(found["rmse"])


def test_depth_from_bins_is_the_expected_bin() -> None:
    logits = torch.tensor([[[-3.0]], [[1.0]], [[2.0]]])  # relu + 0.1: 0.1, 1.1, 2.1
    bins = torch.tensor([1.0, 2.0, 4.0])
    assert float(depth_eval.from_bins(logits, bins)) == pytest.approx((0.1 + 2.2 + 8.4) / 3.3)


def test_depth_loss_in_closed_form() -> None:
    depth = torch.full((4, 6), 2.0)
    depth[0, 0] = 0  # not valid
    # Off by one factor everywhere: SigLog keeps sqrt(1 - 0.85) of the log, and nothing slopes.
    loss = depth_eval.depth_loss(depth.clamp_min(1) * math.e, depth)
    assert loss is not None
    assert float(loss) == pytest.approx(10 * math.sqrt(0.15), rel=1e-5)
    ramp = depth * torch.exp(0.1 * torch.arange(6.0))
    loss = depth_eval.depth_loss(ramp, torch.full((4, 6), 2.0))
    g = np.array([[-np.inf if not v else np.log(v / 2) for v in row] for row in ramp.clamp_min(1e-6).numpy()])
    siglog = math.sqrt((g**2).mean() - 0.85 * g.mean() ** 2)
    slopes = 0.0
    for step in (1, 2, 4, 8):
        part = g[::step, ::step]
        both = np.concatenate((np.diff(part, axis=0).ravel(), np.diff(part, axis=1).ravel()))
        slopes += abs(both).mean() if both.size else 0.0
    assert loss is not None
    assert float(loss) == pytest.approx(10 * siglog + 0.5 * slopes, rel=1e-4)
    assert depth_eval.depth_loss(depth, torch.zeros(4, 6)) is None


def test_scale_and_shift_are_least_squares() -> None:
    found, depth = (torch.tensor(RNG.uniform(1, 5, (6, 7))) for _ in range(2))
    depth[0, :2] = float("nan")
    valid = torch.isfinite(depth)
    slope, shift = np.polyfit(found[valid].numpy(), depth[valid].numpy(), 1)
    np.testing.assert_allclose(depth_eval.scaled(found, depth).numpy(), slope * found.numpy() + shift, rtol=1e-9)
    exact = depth_eval.measure([(3 * depth.nan_to_num(1) + 1, depth)])
    assert exact["si_rmse"] == pytest.approx(0, abs=1e-9)
    assert exact["si_delta"] == 1
    assert exact["delta1"] < 1
    with pytest.raises(ProbeError, match="diverged"):
        depth_eval.measure([(depth, depth)])  # a prediction with NaN
    with pytest.raises(ProbeError, match="no valid depth"):
        depth_eval.measure([(found, torch.zeros(6, 7))])


def test_deltas_against_numpy() -> None:
    found, depth = (torch.tensor(RNG.uniform(1, 3, (2, 5, 6))) for _ in range(2))
    measured = depth_eval.measure(zip(found, depth, strict=True))
    ratio = torch.maximum(found / depth, depth / found).numpy()
    for k in (1, 2, 3):
        assert measured[f"delta{k}"] == pytest.approx((ratio < 1.25**k).mean(), abs=1e-12)
    assert measured["delta"] == pytest.approx(np.mean([measured[f"delta{k}"] for k in (1, 2, 3)]))
    assert measured["rmse"] == pytest.approx(np.sqrt(((found - depth) ** 2).mean().item()))


# --- normals ----------------------------------------------------------------------------------------------------------


def test_normals_of_oracle_are_exact() -> None:
    found = splits(Normals, Tilted, ridge=[1e-6]).run(Oracle())
    assert found["recall"] == 1
    assert found["mean_angle"] < 0.1
    options: dict[str, Any] = {"probe": "dpt", "hidden": 8, "epochs": 12, "lr": 2e-2, "batch": 2}
    dpt = splits(Normals, Tilted, 16, 16, **options).run(Coarse())
    constant = splits(Normals, Tilted, 16, 16, ridge=[1e9]).run(Coarse())
    assert dpt["mean_angle"] < 0.6 * constant["mean_angle"]


def test_normals_without_truth() -> None:
    with pytest.raises(ConfigError, match="has no normals"):
        splits(Normals).run(Oracle())
    with pytest.raises(TypeError, match="has none"):
        splits(Normals, Tilted).run(Noise(spatial=False))


def test_angles_are_accurate_at_zero_and_pi() -> None:
    small = torch.tensor([0.0, 1e-6, 0.3, math.pi / 2, math.pi - 1e-6], dtype=torch.float64)
    a = torch.stack((torch.ones_like(small), torch.zeros_like(small), torch.zeros_like(small)))
    b = 7 * torch.stack((small.cos(), small.sin(), torch.zeros_like(small)))
    torch.testing.assert_close(normals_eval.angle_between(a, b), small, atol=1e-12, rtol=1e-9)
    same = a.float().requires_grad_()
    normals_eval.angle_between(same, a.float()).sum().backward()
    assert same.grad is not None
    assert bool(torch.isfinite(same.grad).all())  # acos would be infinite here


def test_normal_metrics_against_numpy() -> None:
    truth, found = (torch.tensor(RNG.standard_normal((3, 9, 8))) for _ in range(2))
    truth = truth / torch.linalg.vector_norm(truth, dim=0)
    found = truth + 0.4 * found
    truth[:, 0, 0], truth[0, 1, 1] = 0, float("nan")
    measured = normals_eval.measure([(found, truth)])
    a, b = found.numpy().reshape(3, -1), truth.numpy().reshape(3, -1)
    keep = np.isfinite(b).all(0) & (abs(np.linalg.norm(b, axis=0) - 1) < 0.1)
    assert keep.sum() == 70
    cosine = (a * b).sum(0)[keep] / np.linalg.norm(a, axis=0)[keep]
    degrees = np.degrees(np.arccos(cosine))
    wanted = {
        **{f"within_{int(t)}": (degrees < t).mean() for t in (11.25, 22.5, 30.0)},
        "mean_angle": degrees.mean(),
        "median_angle": np.median(degrees),
        "rms_angle": np.sqrt((degrees**2).mean()),
    }
    assert {key: measured[key] for key in wanted} == pytest.approx(wanted, rel=1e-9)
    assert measured["recall"] == pytest.approx(np.mean([measured[f"within_{t}"] for t in (11, 22, 30)]))
    with pytest.raises(ProbeError, match="no valid normals"):
        normals_eval.measure([(found, torch.zeros(3, 9, 8))])
    with pytest.raises(ProbeError, match="diverged"):
        normals_eval.measure([(found / 0, truth)])


def test_normal_loss_in_closed_form() -> None:
    truth = torch.zeros(3, 2, 2)
    truth[0, 0, 0] = 1  # one valid pixel
    found = torch.zeros(4, 2, 2)
    found[1], found[3] = 2.0, 1.5  # a right angle, kappa = elu(1.5) + 1.01
    kappa, angle = 2.51, math.pi / 2
    wanted = kappa * angle - math.log(kappa**2 + 1) + math.log1p(math.exp(-kappa * math.pi))
    loss = normals_eval.normal_loss(found, truth)
    assert loss is not None
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert normals_eval.normal_loss(found, torch.zeros(3, 2, 2)) is None


def test_cell_normals_are_means_of_valid_pixels() -> None:
    normals = torch.zeros(3, 2, 4)
    normals[0, :, 0], normals[1, 0, 1] = 1, 1  # first cell: x, x, y and one that is not known
    y, share = normals_eval.cell_normals(normals, (1, 2))
    torch.testing.assert_close(y[0], torch.tensor([2 / 3, 1 / 3, 0]))
    torch.testing.assert_close(share, torch.tensor([0.75, 0.0]))


# --- records and changed sources --------------------------------------------------------------------------------------


def test_records_have_one_value_per_image() -> None:
    model = Noise()
    for eval_, metric, mean in (
        (splits(Linear), "top1", True),
        (Knn(k=3, size=32, train=Squares(12), test=Squares(12, 2)), "top1", True),  # type: ignore[arg-type]
        (splits(Segmentation, decay=[0.1]), "miou", False),
        (splits(Depth), "delta1", True),
        (splits(Normals, Tilted), "recall", False),
    ):
        context = EvalContext()
        found = eval_.run(model, context)
        own = context.records.images[metric]
        assert set(own) == {f"squares/2/{i}" for i in range(12)}
        if mean:
            assert np.mean(list(own.values())) == pytest.approx(found[metric], abs=1e-9)
        if metric == "top1":
            assert set(context.records.classes["top1"]) == {"red", "green", "blue"}
    context = EvalContext()
    found = Retrieval(size=32, source=Squares(8)).run(Oracle(), context)  # type: ignore[arg-type]
    assert set(context.records.images["mrr"]) == {"a red square", "a green square", "a blue square"}
    assert np.mean(list(context.records.images["mrr"].values())) == pytest.approx(found["mrr"])
    splits(Linear).run(model)
    assert not EvalContext().records.images  # a context starts empty


def test_classes_are_recorded_with_their_iou() -> None:
    context = EvalContext()
    splits(Segmentation, decay=[0.01]).run(Oracle(), context)
    assert context.records.classes["iou"] == {"background": 1.0, "red": 1.0, "green": 1.0, "blue": 1.0}


def test_changed_images_keep_labels() -> None:
    changed = Changed(Squares(6), lambda image, index: Image.new("RGB", image.size, (index, 0, 0)), "flat", [4, 2])
    assert len(changed) == 2
    assert [changed.name(i) for i in range(2)] == ["squares/0/4#flat", "squares/0/2#flat"]
    assert [changed.label(i) for i in range(2)] == [1, 2]
    assert changed.read(0).getpixel((0, 0)) == (4, 0, 0)
    assert class_names(changed, range(2)) == ["green", "blue"]


def test_unshared_images_are_not_cached() -> None:
    model, source = Noise(), Squares(4)
    context = EvalContext()
    first = encode(model, source, 32, context, want="summary", share=False)
    assert first.spatial is None
    encode(model, source, 32, context, want="summary")
    encode(model, source, 32, context, want="summary")
    assert model.calls == 2
