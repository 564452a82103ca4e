"""Auxiliary heads on intermediate blocks: one pass, the right block, a decaying weight, never exported."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agglo.config import override
from agglo.model.artefact import WEIGHTS
from agglo.model.model import Model
from agglo.recipe import Auxiliary, from_dict
from agglo.students.vit import ViT
from agglo.training import loop
from agglo.training import step as step_module
from agglo.training.checkpoint import checkpoints
from agglo.training.step import Stopwatch
from agglo.types import ConfigError, Features
from support.training import started, tiny, trace, weights

pytestmark = pytest.mark.training

DEEP = "student.depth=4"


@pytest.mark.parametrize(
    ("options", "window"),
    [({}, None), ({"final_norm": True}, None), ({"pool": "avg", "cls_per_teacher": False}, 2), ({"window": 2}, None)],
)
def test_one_pass_returns_features_and_captured_blocks(options: dict, window: int | None) -> None:
    torch.manual_seed(0)
    student = ViT(("a", "b"), width=32, depth=4, heads=2, max_grid=4, pos_dropout=0.0, **options)
    images, calls = torch.rand(2, 3, 64, 64), []
    student.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    student.register_forward_pre_hook(lambda *_: calls.append("hook"))
    with torch.no_grad():
        expected = student(images, window=window)
        calls.clear()
        seen: dict[int, Features] = {}
        found = student(images, window=window, blocks={1, 2}, into=seen)
        assert calls == ["hook", "block"]  # one pass, with the module's hooks
        assert torch.equal(found.spatial, expected.spatial) and torch.equal(found.summary, expected.summary)
        single = {}
        student.visit(images, [1], single.__setitem__, norm=True, window=window)
    assert torch.equal(seen[1].spatial, single[1].spatial)
    assert not torch.equal(seen[1].spatial, seen[2].spatial)
    assert set(seen) == {1, 2, 3}
    assert "forward" not in vars(student)
    with pytest.raises(ValueError, match="multiple"):
        student(torch.rand(1, 3, 50, 50), blocks={1}, into={})
    assert "forward" not in vars(student)


def test_auxiliary_gradient_reaches_its_head_and_the_blocks_up_to_its_own(data: Path, tmp_path: Path) -> None:
    run = started(data, tmp_path, DEEP, "auxiliary={toy: {depth: 0.5}, dense: {depth: 2, weight: 0.1}}")
    assert run.objective.auxiliary.blocks == {"toy": 1, "dense": 2}
    torch.manual_seed(0)
    objective, real = run.objective, run.objective.balancer.forward
    # Nothing but the auxiliary terms: the balancer's are switched off.
    objective.balancer.forward = lambda terms, **given: 0 * real(terms, **given)
    result, _ = step_module.forward(run, run.loader.batch(0), Stopwatch())
    torch.testing.assert_close(
        result.loss.detach(), 0.25 * result.terms["toy/auxiliary"] + 0.1 * result.terms["dense/auxiliary"]
    )
    result.loss.backward()
    blocks = [block.mlp.fc2.weight.grad.abs().sum() > 0 for block in run.model.student.blocks]
    assert blocks == [True, True, True, False]
    for name in ("toy", "dense"):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.auxiliary.heads[name].parameters())
        assert all(float(p.grad.abs().sum()) == 0 for p in run.model.heads[name].spatial.parameters())


def test_auxiliary_weight_decays_to_zero_and_removes_the_term(data: Path, tmp_path: Path) -> None:
    entry = Auxiliary(depth=0, weight=0.4, until=0.5)
    assert [entry.weight_at(step, 10) for step in (0, 2, 4, 5, 9)] == pytest.approx([0.4, 0.24, 0.08, 0, 0])
    loop.train_model(tiny(data, "auxiliary={toy: {depth: 0, until: 0.5}}"), tmp_path / "run", quiet=True)
    lines = trace(tmp_path / "run")
    assert ["toy/auxiliary" in line["terms"] for line in lines] == [True] * 3 + [False] * 3
    assert all("toy/spatial" in line["terms"] for line in lines)


def test_auxiliary_heads_train_and_are_saved_in_checkpoints_only(data: Path, tmp_path: Path) -> None:
    made = tiny(data, "train.steps=40", "train.log_every=3", "auxiliary={dense: {depth: 0, until: 1.0}}")
    loop.train_model(made, tmp_path / "run", quiet=True)
    term = [line["terms"]["dense/auxiliary"] for line in trace(tmp_path / "run")]
    assert sum(term[-3:]) < 0.9 * sum(term[:3])
    loop.train_model(tiny(data, "train.steps=1"), tmp_path / "plain", quiet=True)
    for name in ("initial", "model"):
        one, other = (load_file(tmp_path / run / name / WEIGHTS) for run in ("run", "plain"))
        assert one.keys() == other.keys()
    kept = load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "objective.safetensors")
    assert any(key.startswith("auxiliary.heads.dense.") for key in kept)
    assert Model.load(tmp_path / "run" / "model")(torch.rand(1, 3, 32, 32)).heads.keys() == {"toy", "other", "dense"}


def test_empty_auxiliary_equals_no_auxiliary(data: Path, tmp_path: Path) -> None:
    loop.train_model(tiny(data, "auxiliary={}"), tmp_path / "off", quiet=True)
    loop.train_model(tiny(data), tmp_path / "without", quiet=True)
    for name, value in weights(tmp_path / "off").items():
        assert torch.equal(weights(tmp_path / "without")[name], value), name


def test_stages_keep_the_entries_of_their_teachers(data: Path) -> None:
    made = tiny(
        data, "auxiliary={toy: {depth: 1.0}, dense: {depth: 1}}",
        'stages=[{name: low, teachers: [toy]}, {name: high, set: ["auxiliary={}"]}]',
    )  # fmt: skip
    assert list(made.stage(0).auxiliary) == ["toy"]
    assert made.stage(0).auxiliary["toy"].depth == 1.0
    assert isinstance(made.stage(0).auxiliary["toy"].depth, float)
    assert made.stage(1).auxiliary == {}
    assert from_dict(made.to_dict()).auxiliary == made.auxiliary


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("auxiliary={toi: {depth: 1}}",), r"auxiliary\.toi: no teacher of that name; did you mean 'toy'"),
        (("auxiliary={toy: {depth: 2}}",), r"auxiliary\.toy\.depth: the student has the blocks 0 to 1, not 2"),
        (("auxiliary={toy: {depth: -1}}",), r"auxiliary\.toy\.depth.*from 0 on, or a fraction"),
        (("auxiliary={toy: {depth: 1.5}}",), r"auxiliary\.toy\.depth.*fraction in \(0, 1\], not 1\.5"),
        (("auxiliary={toy: {depht: 1}}",), "did you mean 'depth'"),
        (("auxiliary={toy: {depth: 0.5, until: 0}}",), r"auxiliary\.toy\.until"),
        (
            ("auxiliary={toy: {depth: 1}}", "teachers.toy.spatial_weight=0"),
            r"auxiliary\.toy: the weight of the teacher's map is 0: set teachers\.toy\.spatial_weight",
        ),
        (
            (
                "auxiliary={toy: {depth: 0.5}}", "student={kind: timm, model: test_efficientnet, stages: [2]}",
                "partitions=[{sizes: [64], batch: 4}]",
            ),
            r"auxiliary\.toy: a timm student is not a stack of equal blocks.*kind vit",
        ),
    ],
)  # fmt: skip
def test_invalid_auxiliary_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loop.train_model(tiny(data, *overrides), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_fractional_depth_selects_the_last_block_of_the_fraction(data: Path, tmp_path: Path) -> None:
    """``round(L share)`` blocks (docs/method.md, 10c): thirds of twelve end with blocks 3, 7 and 11."""
    tree = tiny(data, "student.depth=12").to_dict()
    for share, block in [(1 / 3, 3), (0.33, 3), (2 / 3, 7), (1.0, 11), (0.01, 0)]:
        made = from_dict(override(tree, [f"auxiliary={{toy: {{depth: {share}}}}}"]))
        run = loop.prepare(made, tmp_path / "run", torch.device("cpu"), resume=False)
        assert run.objective.auxiliary.blocks == {"toy": block}
