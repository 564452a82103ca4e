"""Feature matching: a student's blocks against a teacher's."""

from pathlib import Path

import pytest
import torch

from agglo import load, recipe
from agglo.config import build, override
from agglo.data.shifts import RenderedBatch
from agglo.nn.placement import Placement
from agglo.objectives.base import StepContext, Target
from agglo.objectives.feature_match import FeatureMatch
from agglo.recipe import from_dict
from agglo.training import loop
from agglo.training.checkpoint import checkpoints
from agglo.types import ConfigError, Features
from support.training import TINY, started, trace, weights, write_images

VIT = "{kind: timm, model: test_vit, weights: random}"
MATCH = (
    f"teachers={{vit: {VIT}}}", "heads={}", "objective={kind: feature_match, blocks: [1, 3]}",
    "partitions=[{sizes: [32], batch: 4}]", "train.steps=4", "train.save_every=2",
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def made(data: Path, *overrides: str) -> recipe.Recipe:
    tree = {**TINY, "data": {"sources": [{"kind": "folder", "path": str(data)}], "workers": 0}}
    return from_dict(override(tree, [*MATCH, *overrides]))


def view(features: Features, side: int = 32) -> Target:
    return Target(features, Placement.full(4, (1, 1), (side, side)))


def test_loss_is_zero_where_the_student_equals_the_targets(data: Path, tmp_path: Path) -> None:
    run = started(data, tmp_path, *MATCH, "targets.normalizer.kind=identity", "losses.spatial.kind=mse")
    run.model.eval()  # no random viewport of the position table
    objective: FeatureMatch = run.objective
    assert objective.student_blocks == {"vit:1": 0, "vit:3": 1}
    images, captured = torch.rand(4, 3, 32, 32), {}
    with torch.no_grad():
        run.model.encode(images, blocks={0, 1}, into=captured)
        wanted = {
            key: view(Features(None, objective.regressors[key](captured[block].spatial)))
            for key, block in objective.student_blocks.items()
        }
    exact = objective(run.model, images, wanted)
    assert float(exact.loss.detach()) == pytest.approx(0, abs=1e-10)
    # Targets that are off by 0.5 everywhere have a mean squared error of 0.25 per block.
    off = {key: view(Features(None, target.features.spatial + 0.5)) for key, target in wanted.items()}
    result = objective(run.model, images, off)
    assert {name: float(term) for name, term in result.terms.items()} == pytest.approx(
        {"vit:1/spatial": 0.25, "vit:3/spatial": 0.25}, rel=1e-4
    )
    assert float(result.loss.detach()) == pytest.approx(0.5, rel=1e-4)


def test_gradient_reaches_the_matched_block_and_those_below(data: Path, tmp_path: Path) -> None:
    run = started(data, tmp_path, *MATCH, "objective={kind: feature_match, blocks: [2], student_blocks: [0]}")
    batch = run.loader.batch(0)
    targets = run.targets(batch, RenderedBatch(batch.images, batch.field))
    assert targets.keys() == {"vit:2"}
    run.objective(run.model, batch.images, targets).loss.backward()
    used = [block.mlp.fc2.weight.grad is not None and bool(block.mlp.fc2.weight.grad.any())
            for block in run.model.student.blocks]  # fmt: skip
    assert used == [True, False]
    assert all(p.grad is not None for p in run.objective.regressors.parameters())
    run.model.zero_grad()
    result = run.objective(run.model, batch.images, targets, StepContext(heads_only=True))
    result.loss.backward()
    assert all(p.grad is None for p in run.model.parameters())


def test_training_lowers_the_loss_and_the_exported_model_loads(data: Path, tmp_path: Path) -> None:
    loop.train_model(made(data, "train.steps=30", "train.log_every=1"), tmp_path / "run", quiet=True)
    lines = trace(tmp_path / "run")
    assert set(lines[0]["terms"]) == {"vit:1/spatial", "vit:3/spatial"}
    assert all(lines[-1]["terms"][name] < lines[0]["terms"][name] for name in lines[0]["terms"])
    model = load(str(tmp_path / "run" / "model"))
    out = model(torch.rand(1, 3, 32, 48))
    assert out.spatial.shape == (1, 32, 2, 3) and out.heads == {}


def test_resumed_run_equals_the_straight_one_bit_for_bit(data: Path, tmp_path: Path) -> None:
    loop.train_model(made(data), tmp_path / "straight", quiet=True)
    loop.train_model(made(data), tmp_path / "resumed", quiet=True)
    (checkpoints(tmp_path / "resumed" / "checkpoints")[-1] / "state.json").unlink()
    loop.train_model(made(data), tmp_path / "resumed", resume=True, quiet=True)
    for name, value in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "resumed")[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "objective={kind: feature_match, blocks: [9]}",
            r"objective\.blocks: teachers\.vit: .*9 is not a block.*0 to 5",
        ),
        (
            "objective={kind: feature_match, blocks: [1], student_blocks: [2]}",
            r"objective\.student_blocks: 2 is not a block.*0 to 1",
        ),
        (
            "objective={kind: feature_match, blocks: [1, 2], student_blocks: [1]}",
            r"objective\.student_blocks: has 1 entry, objective\.blocks has 2",
        ),
        ("objective={kind: feature_match, blocks: []}", r"objective\.blocks: is empty"),
        ("objective={kind: feature_match, blocks: [1, 1]}", r"objective\.blocks: \[1, 1\] has duplicates"),
        ("objective={kind: feature_match}", r"objective\.blocks: missing"),
        ("objective={kind: feature_match, blocks: [1], blcks: [1]}", "did you mean 'blocks'"),
        ("teachers.more={kind: toy}", "needs one teacher.*vit, more"),
        ("teachers={toy: {kind: toy}}", r"objective\.blocks: teachers\.toy: Toy is not a stack of blocks"),
        ("losses.mesa={kind: se_mesa}", r"losses\.mesa: objective feature_match does not use it: remove it"),
        ("losses.summary={kind: mse}", r"losses\.summary: objective feature_match does not use it"),
        ("heads.spatial={kind: mlp, hidden: 8}", r"heads: objective feature_match does not use it"),
        ("teachers.vit.summary_weight=1", r"teachers\.vit\.summary_weight: objective feature_match does not use it"),
        ("teachers.vit.spatial_weight=0.5", r"teachers\.vit\.spatial_weight: objective feature_match does not use it"),
        (
            "teachers.vit={kind: timm, model: test_vit, spatial_head: {kind: mlp}, summary_head: {kind: mlp}}",
            r"summary_head, teachers\.vit\.spatial_head: objective feature_match does not use them: remove them",
        ),
        ("student={kind: timm, model: test_efficientnet, stages: [3]}", "a timm student is not a stack of blocks"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(data: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loop.train_model(made(data, change), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_feature_cache_is_refused(data: Path, tmp_path: Path) -> None:
    from agglo.training.precompute import precompute

    crops = ("data.views.crops=2",)
    with pytest.raises(ConfigError, match="feature_match has targets that a feature cache does not store"):
        precompute(made(data, *crops), tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"data\.feature_cache: .*does not store the targets of objective feature_match"
    ):
        loop.train_model(made(data, *crops, "data.feature_cache=x"), tmp_path / "run", quiet=True)


def test_teachers_return_the_maps_after_their_blocks() -> None:
    teacher = build("teachers", {"kind": "timm", "model": "test_vit", "weights": "random", "norm": False})
    images = torch.rand(2, 3, 64, 32)
    with torch.inference_mode():
        last, first = teacher.intermediates(images, [5, 0])
        final = teacher(images).spatial
    assert torch.equal(last, final) and first.shape == final.shape and not torch.equal(first, last)
