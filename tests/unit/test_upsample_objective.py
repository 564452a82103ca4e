"""Training an upsampler: views and their maps agree, the loss equals its formula, and the loop trains it."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agglo import recipe
from agglo.config import build
from agglo.data.loader import Batch
from agglo.data.shifts import RenderedBatch
from agglo.nn.homography import CORNERS, cell_centres, inside_mask, warp
from agglo.objectives._wrapping import Upsampled
from agglo.objectives.base import StepContext, Target, build_teachers
from agglo.objectives.upsample import CONSISTENCY, Downsampler, Upsample, _seams
from agglo.preprocess import resize
from agglo.teachers.base import Teacher
from agglo.training.loop import train_model
from agglo.training.targets import TargetSource
from agglo.types import ConfigError, Features, FeatureSpec
from agglo.upsamplers.featsharp import BIAS_GAIN, FeatSharp
from agglo.upsamplers.tiles import Tiles

pytestmark = pytest.mark.training

SIZE, GRID = (32, 32), (8, 8)
STILL = {"rotation": 0.0, "perspective": (1e-9, 1e-9), "zoom": (1.0, 1.0)}


class Smooth(Teacher):
    """Colours, averaged over each cell, times a matrix; and a pattern of its own. No summary."""

    def __init__(self, pattern: float = 0.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(8, 3, generator=draw)
        self.pattern = pattern * torch.randn(8, *GRID, generator=draw)
        self.spec = FeatureSpec(summary=None, spatial=8, stride=4, step=32)

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        return SIZE

    def forward(self, images: Tensor) -> Features:
        cells = F.avg_pool2d(images, 4)
        return Features(None, torch.einsum("cd,bdhw->bchw", self.matrix, cells) + self.pattern)


def blobs(count: int, side: int = 64, seed: int = 0) -> Tensor:
    """Smooth images in [0, 1]."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1)


def config(seed: int = 0, side: int = 64) -> recipe.Recipe:
    """A recipe that trains the upsampler of a teacher of 32 pixels."""
    loaded = recipe.load("featsharp_quick", [*QUICK, f"train.seed={seed}"], smoke=True)
    partition = loaded.partitions[0].model_copy(update={"sizes": [side]})
    return loaded.model_copy(update={"partitions": [partition]})


def make(upsampler: FeatSharp, teacher: Teacher, seed: int = 0, **keys: Any) -> Upsample:
    return build(
        "objectives", {"kind": "upsample", **keys}, config(seed, upsampler.larger[0]), upsampler, {"t": teacher}
    )


def targets_of(teacher: Teacher, images: Tensor) -> dict[str, Target]:
    """The targets of the pre-pass."""
    source = TargetSource(config(), {"t": teacher}, 4, torch.device("cpu"))
    count = len(images)
    batch = Batch(images, [], [""] * count, 0, 0, [], (images.shape[-2], images.shape[-1]))
    return source(batch, RenderedBatch(images, (1.0, 1.0)))


def drawn(seed: int, step: int, count: int, **keys: Any) -> Tensor:
    """Homographies of an objective with these keys."""
    teacher = Smooth()
    return make(FeatSharp(teacher.spec, SIZE), teacher, seed, **keys).draw_views(step, count)


def at_step(step: int) -> StepContext:
    return StepContext(step=step)


def parts(teacher: Teacher, factor: int = 2, **keys: Any) -> tuple[FeatSharp, Upsample]:
    """An upsampler and its objective with statistics."""
    torch.manual_seed(0)
    upsampler = FeatSharp(teacher.spec, SIZE, factor=factor)
    objective = make(upsampler, teacher, **{"views": 2, **keys})
    assert objective.needs_statistics
    objective.fit([targets_of(teacher, blobs(16, 32 * factor))])
    assert not objective.needs_statistics and upsampler.trained
    return upsampler, objective


# --- views ---


def test_views_are_a_pure_function_of_seed_and_step() -> None:
    assert torch.equal(drawn(1, 2, 6), drawn(1, 2, 6))
    assert not torch.equal(drawn(1, 2, 6), drawn(1, 3, 6))
    assert not torch.equal(drawn(1, 2, 6), drawn(2, 2, 6))


def test_views_without_motion_are_the_image() -> None:
    found = drawn(0, 0, 3, **STILL)
    torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64).expand(3, 3, 3), atol=1e-6, rtol=0)


def test_zoomed_views_lie_inside_and_cover_the_image() -> None:
    matrix = drawn(0, 0, 200, **{**STILL, "zoom": (2.0, 2.0)})
    assert bool(inside_mask(matrix, (4, 4)).all())
    corners = torch.tensor(CORNERS, dtype=torch.float64)
    centre, extent = matrix[:, :2, 2], (matrix[:, :2, :2] @ (corners[2] - corners[0])).abs()
    torch.testing.assert_close(extent, torch.ones_like(extent), atol=1e-6, rtol=0)
    assert centre.min() < -0.45 and centre.max() > 0.45 and centre.mean().abs() < 0.1


def test_views_never_fold_over() -> None:
    at = cell_centres(drawn(0, 0, 200, perspective=(5.0, 5.0), rotation=45.0), (16, 16))
    across, down = at[:, :-1, 1:] - at[:, :-1, :-1], at[:, 1:, :-1] - at[:, :-1, :-1]
    assert bool((across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0] > 0).all())


def test_warped_map_is_the_map_of_the_warped_image() -> None:
    """The heart of the objective, on a teacher that is a mean of colours: both ways round the square agree."""
    teacher, images = Smooth(), blobs(4)
    matrix = drawn(0, 0, 4)
    view = resize(warp(images, matrix, (64, 64)), SIZE)
    fine = torch.einsum("cd,bdhw->bchw", teacher.matrix, F.avg_pool2d(images, 4))
    moved = F.avg_pool2d(warp(fine, matrix, (16, 16)), 2)
    whole = F.avg_pool2d(inside_mask(matrix, (16, 16)).float(), 2) == 1
    error = ((moved - teacher(view).spatial) * whole).square().mean()
    still = ((F.avg_pool2d(fine, 2) - teacher(view).spatial) * whole).square().mean()
    assert error < 0.1 * still


# --- the parts of the loss ---


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_downsampler_starts_as_a_gaussian_around_the_cell(factor: int) -> None:
    down = Downsampler(4, factor).eval()
    ramp = torch.arange(6.0 * factor).expand(1, 4, 6 * factor, 6 * factor)
    found = down(ramp)[0, 0, 3]
    centres = (torch.arange(6) + 0.5) * factor - 0.5
    torch.testing.assert_close(found[2:4], centres[2:4], atol=0.05, rtol=0)  # the middle: no border is seen
    torch.testing.assert_close(down(torch.ones(1, 4, 6 * factor, 6 * factor)), torch.ones(1, 4, 6, 6))
    assert not torch.equal(down.train()(ramp), down(ramp)), "neighbours are left out in training"


def test_seams_are_the_cells_on_both_sides_of_a_border_between_tiles() -> None:
    seams = _seams((3, 3), 2, 2.0)[0, 0]
    assert float(seams.mean()) == pytest.approx(1.0)
    heavy = seams > 1
    assert heavy[0].tolist() == [False, False, True, True, False, False]
    assert bool(heavy[2].all()) and bool(heavy[3].all())


def test_loss_is_zero_if_the_finer_map_matches_every_view() -> None:
    """With the teacher on the larger image as the upsampler and identical views, the loss is 0."""
    teacher, images = Smooth(), blobs(2)
    upsampler, objective = parts(teacher, uncertainty=False, **STILL)
    fine = upsampler.normalizer(torch.einsum("cd,bdhw->bchw", teacher.matrix, F.avg_pool2d(images, 4)))
    upsampler.sharpen = lambda images, looks: fine  # type: ignore[method-assign]
    objective.downsampler = _Mean()  # type: ignore[assignment]
    exact = objective(upsampler, images, {})
    upsampler.sharpen = lambda images, looks: fine.flip(-1)  # type: ignore[method-assign]
    wrong = objective(upsampler, images, {})
    # Resizing and averaging are nearly the same thing on smooth images.
    assert float(exact.terms[CONSISTENCY]) < 0.02 * float(wrong.terms[CONSISTENCY])
    assert float(exact.loss.detach()) < 0.02 * float(wrong.loss.detach())


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


def test_loss_equals_the_documented_formula() -> None:
    teacher, images = Smooth(), blobs(2)
    upsampler, objective = parts(teacher, seam=3.0, **STILL)
    objective.eval()
    objective.downsampler = _Mean()  # type: ignore[assignment]
    fine = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(2))
    upsampler.sharpen = lambda images, looks: fine  # type: ignore[method-assign]
    assert objective.uncertainty is not None
    with torch.no_grad():
        objective.uncertainty[2].bias.fill_(0.7)
        upsampler.bias.normal_(0, 0.1)
        target = upsampler.clean(teacher(resize(images, SIZE)).spatial)
    error = (F.avg_pool2d(fine, 2) - target).square().mean(1, keepdim=True)
    weight = F.avg_pool2d(_seams(GRID, 2, 3.0), 2)
    found = objective(upsampler, images, {})
    wanted = (weight * (error * math.exp(-0.7) + 0.7 / 2)).mean()
    torch.testing.assert_close(found.loss.detach(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.terms[CONSISTENCY], error.mean(), rtol=1e-4, atol=1e-4)


def test_cells_outside_the_image_do_not_count() -> None:
    """Views twice as large as the image: only their centre affects the loss."""
    teacher, images = Smooth(), blobs(2)
    upsampler, objective = parts(teacher, uncertainty=False, seam=1.0, **{**STILL, "zoom": (0.5, 0.5)})
    objective.eval()
    before = objective(upsampler, images, {})
    # 16 of 64 cells count, and the sum is divided by 32: few cells do not weigh more than many.
    torch.testing.assert_close(before.loss.detach(), before.terms[CONSISTENCY] / 2)

    class Outside(Smooth):
        def forward(self, images: Tensor) -> Features:
            found = super().forward(images).spatial
            if len(images) == 4:  # the views; the image and its tiles are 2 + 8
                found = found.clone()
                found[..., :2], found[..., -2:], found[..., :2, :], found[..., -2:, :] = 9, 9, 9, 9
            return Features(None, found)

    objective._teacher = [Outside()]
    after = objective(upsampler, images, {})
    torch.testing.assert_close(after.terms[CONSISTENCY], before.terms[CONSISTENCY])
    torch.testing.assert_close(after.loss, before.loss)


def test_uncertainty_starts_at_zero_and_has_no_gradient_to_the_map() -> None:
    teacher, images = Smooth(), blobs(2)
    (upsampler, plain), (_, unsure) = parts(teacher, uncertainty=False), parts(teacher, uncertainty=True)
    unsure.load_state_dict({**unsure.state_dict(), **plain.state_dict()})
    one, other = plain.eval()(upsampler, images, {}), unsure.eval()(upsampler, images, {})
    torch.testing.assert_close(one.loss, other.loss)
    assert unsure.uncertainty is not None
    with torch.no_grad():
        unsure.uncertainty[2].bias.fill_(0.7)
    doubtful = unsure(upsampler, images, {})
    assert float(doubtful.terms[CONSISTENCY]) == pytest.approx(float(other.terms[CONSISTENCY]))
    assert float(doubtful.loss.detach()) != pytest.approx(float(other.loss.detach()))
    seen = []
    unsure.uncertainty.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    unsure(upsampler, images, {})
    assert seen == [False], "doubt would reshape the map"


def test_training_learns_the_fixed_pattern_and_lowers_the_loss() -> None:
    """A small run: the teacher's pattern, as strong as its signal, ends up in ``-b``."""
    teacher = Smooth(pattern=0.3)
    upsampler, objective = parts(teacher, views=3, uncertainty=False)
    optimizer = torch.optim.Adam([*upsampler.parameters(), *objective.parameters()], lr=1e-2)
    first = last = 0.0
    for step in range(40):
        result = objective(upsampler, blobs(2, seed=100 + step), {}, at_step(step))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        last = float(result.terms[CONSISTENCY])
        first = first or last
    assert last < 0.5 * first
    pattern = upsampler.normalizer.multiply(upsampler.normalizer.whiten, teacher.pattern[None])[0]
    pattern = pattern - pattern.mean((1, 2), keepdim=True)
    learned = -BIAS_GAIN * upsampler.bias.detach()
    learned = learned - learned.mean((1, 2), keepdim=True)
    left = (pattern - learned).square().sum() / pattern.square().sum()
    assert float(left) < 0.5


# --- in the loop ---

QUICK = [
    "data.sources=[{kind: photos, split: train}]", "train.log_every=1", "partitions=[{sizes: [64], batch: 2}]",
    "teachers.lite0.size=32", "targets.estimate_images=32", "data.workers=0", "train.save_every=2",
]  # fmt: skip


def quick(*changes: str) -> recipe.Recipe:
    return recipe.load("featsharp_quick", [*QUICK, *changes], smoke=True)


def test_loop_trains_an_upsampler_that_a_recipe_can_use(tmp_path: Path) -> None:
    straight = train_model(quick("train.steps=4"), tmp_path / "straight", quiet=True)
    assert isinstance(straight, FeatSharp) and straight.trained
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["terms"][CONSISTENCY] > 0 for line in lines)
    # Stopped after two steps and taken up again, it is the same.
    folder = tmp_path / "resumed"
    train_model(quick("train.steps=4"), folder, quiet=True)
    (folder / "checkpoints" / "step_00000004" / "state.json").unlink()
    resumed = train_model(quick("train.steps=4"), folder, quiet=True, resume=True)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)
    # In a recipe that distils, the teacher's map is twice as fine.
    lite0 = f"{{kind: timm, size: 32, summary: false, upsampler: {{kind: featsharp, weights: {folder}}}}}"
    student = recipe.load(
        "quickstart",
        [f"teachers={{lite0: {lite0}}}", "partitions=[{sizes: [64], batch: 4}]", "targets.estimate_images=32",
         "data.sources=[{kind: photos, split: train}]", "evals=[]"],
        smoke=True,
    )  # fmt: skip
    teacher = build_teachers(student)["lite0"]
    assert isinstance(teacher, Upsampled) and not any(p.requires_grad for p in teacher.parameters())
    with torch.inference_mode():
        assert teacher(torch.rand(1, 3, 64, 64)).spatial.shape == (1, 112, 4, 4)
    assert train_model(student, tmp_path / "student", quiet=True).heads["lite0"].spatial is not None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["partitions.0.sizes=[96]"], r"takes 64 px.*\[64\]"),
        (["teachers.lite0.upsampler.kind=tiles"], "of a trainable kind: featsharp"),
        (["teachers.lite0.upsampler=null"], r"needs teachers\.lite0\.upsampler"),
        (["teachers.more={kind: toy}"], "one teacher.*lite0, more"),
        (
            ["train.damp=0.1", "balancer={kind: adaloss}"],
            r"^balancer, train\.damp: objective upsample does not use them: remove them",
        ),
        (
            ["data.views.crops=2", "data.feature_cache=somewhere"],
            r"^data\.views\.crops, data\.feature_cache:",
        ),
        (
            ["evals=[{kind: knn}]", "losses.summary.kind=mse", "train.start_from=x"],
            r"^losses, train\.start_from, evals:",
        ),
        (["student={kind: timm}"], "remove `student:`"),
        (["stages=[{name: a}]"], "remove `stages:`"),
        (["objective.zoom=[2, 1]"], "low <= high"),
        (["objective.veiws=3"], "did you mean 'views'"),
        (["objective={kind: distill}"], "student"),
    ],
)
def test_invalid_recipes_are_refused(changes: list[str], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        train_model(quick(*changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_no_images_and_broken_teachers_are_refused() -> None:
    teacher = Smooth()
    upsampler = FeatSharp(teacher.spec, SIZE)
    objective = make(upsampler, teacher)
    with pytest.raises(ConfigError, match="had no image"):
        objective.fit([])
    broken = copy.deepcopy(teacher)
    broken.matrix = broken.matrix * float("nan")
    with pytest.raises(ConfigError, match=r"teachers\.t: .*NaN"):
        objective.fit([targets_of(broken, blobs(4))])
    plain = Upsampled(teacher, Tiles(teacher.spec, SIZE))
    with pytest.raises(ConfigError, match="a trainable kind"):
        Upsample.build_model(config(), {"t": plain})


def test_train_command_prints_how_to_use_the_upsampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from agglo.cli.main import app

    monkeypatch.setattr("agglo.training.loop.train_model", lambda *_, **__: None)
    result = CliRunner().invoke(app, ["train", "featsharp_quick", "--smoke", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "upsampler: {kind: featsharp, weights:" in result.output
    assert "agglo search" not in result.output
