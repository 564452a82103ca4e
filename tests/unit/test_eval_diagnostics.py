"""Evals without a task: resolution, fixed patterns, ranks, corruptions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from agglo.evals._augment import OPS, rand_augment, random_crop
from agglo.evals._corrupt import CORRUPTIONS, corrupt
from agglo.evals.base import EvalContext, FeatureError, ProbeError
from agglo.evals.fixed_pattern import FixedPattern, Locked
from agglo.evals.knn import Knn
from agglo.evals.mode_switch import ModeSwitch
from agglo.evals.rank import Rank, lidar, rank_me, smooth_rank, unit_views
from agglo.evals.robustness import Robustness
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec
from support.models import Broken, Noise, Oracle, Squares, Student

pytestmark = pytest.mark.evals


class Cells(Teacher):
    """Mean colours of cells of eight pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = FeatureSpec(summary=3, spatial=3, stride=8, step=8)

    def forward(self, images: Tensor) -> Features:
        return Features(images.mean((2, 3)), F.avg_pool2d(images, 8))


class Plain(nn.Module):
    """Colours as they are, and what is added to them by ``change``."""

    spec = FeatureSpec(summary=3, spatial=3, stride=1)

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> Features:
        found = images if self.change is None else self.change(images)
        return Features(images.mean((2, 3)), found)


# --- resolution -------------------------------------------------------------------------------------------------------


def modes(teachers: Any = None, **options: Any) -> ModeSwitch:
    return ModeSwitch(teachers, **{"sizes": [16, 32, 48], "source": Squares(5), **options})


def test_exact_head_has_maximal_fidelity_at_every_size() -> None:
    found = modes({"a": Cells()}).run(Student(a=Cells()))
    assert all(found[f"a/cosine@{size}"] == pytest.approx(1, abs=1e-6) for size in (16, 32, 48))
    assert all(found[f"a/fidelity@{size}"] >= 1e10 for size in (16, 32, 48))
    assert found["a/summary_cosine@32"] == pytest.approx(1, abs=1e-6)
    assert not any(key.startswith("self/") for key in found)
    assert modes({"a": Cells()}).run(Student(a=Cells())) == found


def test_switching_head_lowers_steadiness() -> None:
    def switching(images: Tensor) -> Features:
        out = Cells()(images)
        scale = 0.5 if images.shape[-1] <= 16 else -1.0
        return Features(out.summary, None if out.spatial is None else out.spatial * scale)

    found = modes({"a": Cells()}).run(Student(a=switching))
    # Each fidelity by hand: var(T) / mean((s - 1)^2 T^2).
    for size, factor in ((16, 0.25), (32, 4.0), (48, 4.0)):
        images = torch.stack([view(Squares(5).read(i), size) for i in range(5)])
        target = F.avg_pool2d(images, 8).double()
        assert found[f"a/fidelity@{size}"] == pytest.approx(float(target.var() / (factor * target.square().mean())))
    assert found["a/cosine@16"] == pytest.approx(1, abs=1e-6)
    assert found["a/cosine@32"] == pytest.approx(-1, abs=1e-6)
    assert found["a/steadiness"] == pytest.approx(
        min(found[f"a/fidelity@{s}"] for s in (32, 48)) / found["a/fidelity@16"], rel=1e-6
    )
    mean = np.mean([found[f"a/fidelity@{size}"] for size in (16, 32, 48)])
    assert found["a/fidelity"] == pytest.approx(mean)


def view(image: Image.Image, size: int) -> Tensor:
    small = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def test_teacher_map_is_resized_to_the_head_grid() -> None:
    coarse = lambda x: Features(None, F.avg_pool2d(x, 16))  # noqa: E731
    found = modes({"a": Cells()}, sizes=[32, 64]).run(Student(a=coarse))
    images = torch.stack([view(Squares(5).read(i), 64) for i in range(5)])
    theirs = F.interpolate(F.avg_pool2d(images, 8), size=(4, 4), mode="bilinear", align_corners=True)
    wanted = F.cosine_similarity(theirs.double(), F.avg_pool2d(images, 16).double(), dim=1).mean()
    assert found["a/cosine@64"] == pytest.approx(float(wanted), abs=1e-6)
    assert "a/summary_cosine@64" not in found  # the head has none


def test_without_teachers_model_is_compared_with_itself() -> None:
    found = modes().run(Cells())
    assert {key for key in found if "@" in key} == {
        f"self/{metric}@{size}" for metric in ("cosine", "fidelity", "summary_cosine") for size in (16, 32)
    }
    assert 0.9 < found["self/cosine@16"] < found["self/cosine@32"] <= 1
    # A teacher is given, but this model has no heads for it: it is compared with itself too.
    assert modes({"a": Cells()}).run(Cells()) == found
    assert "self/cosine@48" in modes(reference=32).run(Cells())


def test_mode_switch_refuses_bad_input() -> None:
    with pytest.raises(TypeError, match="has none"):
        modes().run(Noise(spatial=False))
    with pytest.raises(ConfigError, match="no head for teacher 'alpha'; did you mean 'alpha1'"):
        modes({"alpha": Cells()}).run(Student(alpha1=Cells()))
    with pytest.raises(FeatureError, match="'self' is constant everywhere"):
        modes().run(Broken(1.0, 0, spatial=True))
    with pytest.raises(FeatureError, match="'a': the student has 6 channels and the teacher 3"):
        modes({"a": Cells()}).run(Student(a=lambda x: Features(None, F.avg_pool2d(x, 8).repeat(1, 2, 1, 1))))
    with pytest.raises(FeatureError, match=r"a student's spatial features of squares/0/0 contain NaN"):
        modes({"a": Cells()}).run(Student(a=lambda x: Features(None, F.avg_pool2d(x, 8) * float("nan"))))
    with pytest.raises(ConfigError, match="at least two different sides"):
        ModeSwitch(sizes=[64])
    with pytest.raises(ConfigError, match="sizes must be a list"):
        ModeSwitch(sizes=[])


# --- fixed pattern ----------------------------------------------------------------------------------------------------


def pattern(model: nn.Module, count: int = 40, **options: Any) -> dict[str, float]:
    return FixedPattern(**{"size": 32, "source": Squares(count), **options}).run(model)  # type: ignore[arg-type]


def test_position_free_model_has_no_pattern() -> None:
    # Squares lie at random, but the background's ramp is locked to positions: without rolls it would show.
    found = pattern(Plain())
    assert abs(found["locked"]) < 0.01
    assert abs(found["locked_inner"]) < 0.01
    fixed = Locked((3, 32, 32))
    fixed.add(torch.stack([view(Squares(40).read(i), 32) for i in range(40)]))
    assert fixed.share() > 0.03
    assert pattern(Plain()) == found
    assert pattern(Plain(), seed=1) != found


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_planted_pattern_has_its_energy(strength: float) -> None:
    grid = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)) * strength
    grid = grid - grid.mean((1, 2), keepdim=True)
    found = pattern(Plain(lambda x: x + grid))
    images = torch.stack([view(Squares(40).read(i), 32) for i in range(40)])
    within = (images - images.mean((2, 3), keepdim=True)).square().sum(1).mean()
    energy = grid.square().sum(0).mean()
    assert found["locked"] == pytest.approx(float(energy / (energy + within)), rel=0.03)


def test_border_pattern_is_absent_inside() -> None:
    grid = torch.zeros(3, 32, 32)
    grid[:, 0], grid[:, :, -1] = 1, -1
    found = pattern(Plain(lambda x: x + grid))
    assert found["locked"] > 0.4
    assert abs(found["locked_inner"]) < 0.05


def test_share_is_independent_of_the_image_count() -> None:
    draw = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(300):
        locked = Locked((4, 3, 3))
        # A constant offset per image is not a pattern, however large.
        offset = 5 * torch.randn(3, 4, 1, 1, generator=draw)
        locked.add(torch.randn(3, 4, 3, 3, generator=draw) + offset)
        shares.append(locked.share())
    assert abs(np.mean(shares)) < 4 * np.std(shares) / 300**0.5
    assert np.mean(shares) < 0.03  # the plain ratio would be 1 / 3


def test_fixed_pattern_refuses_bad_input() -> None:
    with pytest.raises(ConfigError, match="rolls must be at least 1"):
        FixedPattern(rolls=0)
    with pytest.raises(ProbeError, match="at least two images"):
        pattern(Plain(), 1, rolls=1)
    with pytest.raises(ProbeError, match="no variance"):
        pattern(Plain(torch.zeros_like), 4)
    with pytest.raises(TypeError, match="has none"):
        pattern(Noise(spatial=False), 4)
    with pytest.raises(FeatureError, match="spatial features of squares/0/1 contain NaN"):
        pattern(Broken(float("nan"), 1, spatial=True), 4)


# --- rank -------------------------------------------------------------------------------------------------------------


def test_rank_of_equal_directions_is_their_number() -> None:
    x = torch.zeros(63, 20)
    for i in range(63):
        x[i, i % 7] = 3.0
    assert rank_me(x) == pytest.approx(7, rel=1e-6)
    assert rank_me(1000 * x) == pytest.approx(7, rel=1e-6)
    assert smooth_rank(torch.tensor([1.0, 1.0, 0.0, -1e-12])) == pytest.approx(2, rel=1e-5)
    with pytest.raises(ProbeError, match="all features are zero"):
        rank_me(torch.zeros(4, 3))


def test_rank_me_against_numpy_and_in_blocks() -> None:
    x = np.random.default_rng(0).standard_normal((9000, 6)) * [1, 5, 0.1, 2, 2, 30]
    values = np.linalg.svd(x, compute_uv=False)
    share = values / (values.sum() + 1e-7)
    assert rank_me(torch.tensor(x)) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)


def test_lidar_against_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((50, 4, 6)) + np.random.default_rng(1).standard_normal((50, 1, 6)) * 3
    means = x.mean(1)
    within = np.cov((x - means[:, None]).reshape(-1, 6).T) + 1e-8 * np.eye(6)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigen = np.linalg.eigvalsh(root @ np.cov(means.T) @ root + 1e-8 * np.eye(6))
    share = eigen / (eigen.sum() + 1e-7)
    assert lidar(torch.tensor(x)) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    with pytest.raises(ProbeError, match="two images and two views"):
        lidar(torch.zeros(5, 1, 3))


class Scaled(Noise):
    """More channels than there are images."""

    def __init__(self, scale: float, offset: float = 0.0) -> None:
        super().__init__(spatial=False)
        self.scale, self.offset = scale, offset

    def forward(self, images: Tensor) -> Features:
        draw = torch.randn(images[0].numel(), 100, generator=torch.Generator().manual_seed(0))
        return Features(self.scale * (images.flatten(1) @ draw) + self.offset, None)


def test_lidar_is_scale_free_and_bounded() -> None:
    def of(model: Any) -> float:
        return Rank(size=16, views=3, source=Squares(12)).run(model)["lidar"]  # type: ignore[arg-type]

    whole = of(Scaled(1.0))
    assert 1 < whole <= 11
    for scale in (2.0**-7, 2.0**-14, 2.0**10):
        assert of(Scaled(scale)) == pytest.approx(whole, rel=1e-9)
    same = torch.randn(12, 1, 100, generator=torch.Generator().manual_seed(1)).expand(12, 4, 100)
    assert lidar(unit_views(same)) == pytest.approx(lidar(unit_views(1e-3 * same)), rel=1e-5)
    assert lidar(1e-6 * same) <= 11
    with pytest.raises(ProbeError, match="all images are the same"):
        of(Scaled(0.0, offset=0.1))


def test_rank_of_a_model() -> None:
    found = Rank(size=32, views=2, source=Squares(12)).run(Oracle())  # type: ignore[arg-type]
    assert set(found) == {"rank_me", "rank_me_spatial", "lidar"}
    assert found["rank_me"] == pytest.approx(3, rel=0.02)  # one colour an image, four of each
    assert 1 <= found["rank_me_spatial"] <= 5
    assert Rank(size=32, views=2, source=Squares(12)).run(Oracle()) == found  # type: ignore[arg-type]
    assert set(Rank(size=32, views=0, source=Squares(12)).run(Noise(spatial=False))) == {"rank_me"}  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="views must be 0 or more"):
        Rank(views=-1)


def test_random_views() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    for seed in range(20):
        crop = random_crop(image, (24, 32), np.random.default_rng(seed))
        assert crop.size == (32, 24)
    whole = random_crop(image, (60, 90), np.random.default_rng(0), scale=(9.0, 9.0))  # none fits
    assert whole.size == (90, 60)
    for name, op in OPS.items():
        out = op(image, 0.3, 1.0)
        assert (out.size, out.mode) == (image.size, "RGB"), name
        if name not in ("autocontrast", "equalize"):  # at level 0 all others do nothing
            np.testing.assert_array_equal(np.asarray(op(image, 0.0, 1.0)), np.asarray(image), err_msg=name)
            assert name == "identity" or op(image, 1.0, 1.0).tobytes() != image.tobytes()
    one, same, other = (rand_augment(image, np.random.default_rng(s)).tobytes() for s in (1, 1, 2))
    assert one == same != other


# --- corruptions ------------------------------------------------------------------------------------------------------


def photo(side: int = 64) -> Image.Image:
    yy, xx = np.mgrid[:side, :side] / side
    stripes = 0.5 + 0.3 * np.sin(40 * xx) * np.cos(23 * yy)
    plane = np.stack((stripes, 0.2 + 0.6 * xx, 0.3 + 0.3 * yy), -1)
    return Image.fromarray((plane * 255).astype(np.uint8))


def changed(name: str, severity: int, image: Image.Image | None = None) -> np.ndarray:
    return np.asarray(corrupt(image or photo(), name, severity, np.random.default_rng(0)), np.float64) / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_increase_with_severity(name: str) -> None:
    clean = np.asarray(photo(), np.float64) / 255
    errors = [((changed(name, s) - clean) ** 2).mean() for s in range(1, 6)]
    assert errors[0] > 1e-6
    if name == "saturate":  # the paper's first two take colour away, the others add it
        assert errors[1] > errors[0]
        assert errors[4] > errors[3] > errors[2]
    else:
        assert all(later > 0.99 * earlier for earlier, later in pairwise(errors))
        assert errors[4] > 1.3 * errors[0]
    np.testing.assert_array_equal(changed(name, 3), changed(name, 3))
    for size in ((5, 7), (300, 20)):  # smaller than any kernel
        assert corrupt(photo().resize(size), name, 5, np.random.default_rng(0)).size == size


def test_corruptions_in_closed_form() -> None:
    clean = np.asarray(photo(), np.float64) / 255
    flat = Image.new("RGB", (64, 64), (100, 100, 100))
    mean = clean.mean((0, 1))
    np.testing.assert_allclose(changed("contrast", 2), mean + 0.3 * (clean - mean), atol=0.003)
    assert changed("gaussian_noise", 1, flat).std() == pytest.approx(0.08, rel=0.03)
    assert changed("shot_noise", 1, flat).std() == pytest.approx((100 / 255 / 60) ** 0.5, rel=0.03)
    noisy = changed("impulse_noise", 4, flat)
    assert ((noisy == 0) | (noisy == 1)).mean() == pytest.approx(0.17, abs=0.015)
    np.testing.assert_allclose(changed("brightness", 2, flat), 100 / 255 + 0.2, atol=0.003)
    for name in ("defocus_blur", "motion_blur", "zoom_blur", "pixelate", "jpeg"):
        np.testing.assert_allclose(changed(name, 5, flat), 100 / 255, atol=0.01)
    dot = Image.new("RGB", (64, 64))
    dot.putpixel((32, 32), (255, 255, 255))
    blurred = changed("defocus_blur", 5, dot)[..., 0]  # 10 * 64 / 224 pixels
    rows, _ = np.nonzero(blurred)
    assert (rows.min(), rows.max()) == (29, 35)
    grey = np.asarray(changed("saturate", 2), np.float64)
    value = clean.max(2)
    np.testing.assert_allclose(grey.max(2), value, atol=0.003)
    np.testing.assert_allclose(value - grey.min(2), 0.1 * (value - clean.min(2)), atol=0.005)


def test_robustness_of_a_model() -> None:
    options: dict[str, Any] = {"k": 3, "size": 32, "train": Squares(12), "test": Squares(9, 1)}
    made = Robustness(corruptions=["contrast", "jpeg"], severities=[5], **options)
    context = EvalContext()
    found = made.run(Noise(), context)
    assert found["top1"] == Knn(**options).run(Noise())["top1"]
    assert found["top1_corrupted"] == pytest.approx((found["top1/contrast"] + found["top1/jpeg"]) / 2)
    assert found["cosine"] == pytest.approx((found["cosine/contrast"] + found["cosine/jpeg"]) / 2)
    assert found["kept"] == pytest.approx(found["top1_corrupted"] / found["top1"] if found["top1"] else 0.0)
    own = context.records.images["top1_corrupted"]
    assert set(own) == {f"squares/1/{i}" for i in range(9)}
    assert np.mean(list(own.values())) == pytest.approx(found["top1_corrupted"])
    assert made.run(Noise()) == found


def test_invariant_model_is_fully_robust() -> None:
    class Colour(nn.Module):
        """Which channel is the brightest of the brightest pixel: contrast and blur leave it."""

        spec = FeatureSpec(summary=3, spatial=None)

        def forward(self, images: Tensor) -> Features:
            return Features(F.one_hot(images.amax((2, 3)).argmax(1), 3).float(), None)

    options: dict[str, Any] = {"k": 3, "size": 32, "train": Squares(12), "test": Squares(9, 1)}
    found = Robustness(corruptions=["contrast", "pixelate"], severities=[1, 5], **options).run(Colour())
    assert found["top1"] == found["top1_corrupted"] == found["kept"] == 1
    assert found["cosine"] == pytest.approx(1)


def test_robustness_refuses_bad_options() -> None:
    for options, message in (
        ({"corruptions": ["gausian_noise"]}, "did you mean 'gaussian_noise'.*choose from gaussian_noise, shot_noise"),
        ({"corruptions": []}, "corruptions is empty; choose from"),
        ({"severities": [0]}, "severities must be 1 to 5"),
        ({"severities": []}, "severities must be 1 to 5"),
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            Robustness(**options)
