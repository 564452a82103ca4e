"""Every kind of objective keeps the contract: it builds, fits, computes a loss, trains, resumes and exports."""

from pathlib import Path
from typing import Any

import pytest
import torch

from agglo import recipe
from agglo.config import find, kinds, override, schema
from agglo.data.shifts import RenderedBatch
from agglo.objectives.base import Objective, StepContext, Trainable, objective_kind
from agglo.training import loop
from agglo.training.loop import Progress, Run
from support.training import TINY, write_images


def made(kind: str, folder: Path) -> recipe.Recipe:
    """A small recipe with the changes of the class's ``example``, if it needs any."""
    images, example = write_images(folder / "images"), find("objectives", kind).example
    tree = {
        **TINY, "partitions": [{"sizes": [32], "batch": 4}], "objective": {"kind": kind},
        "data": {"sources": [{"kind": "folder", "path": str(images)}], "workers": 0},
    }  # fmt: skip
    return recipe.from_dict(override(tree, [*example, "train.steps=2", "train.save_every=1"]))


@pytest.fixture(params=kinds("objectives", installed=False))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(kind: str, tmp_path: Path) -> Run:
    """A run with fitted statistics, before its first step."""
    run = loop.prepare(made(kind, tmp_path), tmp_path / "run", torch.device("cpu"), resume=False)
    run.folder.mkdir()
    with Progress(run.folder, 1, quiet=True) as progress:
        loop.start(run, progress, [])
    return run


def result(run: Run) -> Any:
    batch = run.loader.batch(0)
    rendered = RenderedBatch(batch.images, batch.field)
    targets = run.targets(batch, rendered) if run.objective.needs_targets else {}
    return run.objective(run.model, batch.images, targets, StepContext(step=0, total=2))


def test_recipe_reads_back_with_its_keys(kind: str, tmp_path: Path) -> None:
    first = made(kind, tmp_path)
    assert first.objective.keys() == {"kind", *schema(objective_kind(first)).model_fields}
    assert recipe.from_dict(first.to_dict()) == first
    assert issubclass(objective_kind(first), Objective)


def test_loss_is_a_finite_scalar_with_detached_terms(run: Run) -> None:
    found = result(run)
    assert found.loss.ndim == 0 and bool(torch.isfinite(found.loss))
    assert found.terms and all(term.ndim == 0 and not term.requires_grad for term in found.terms.values())


def test_gradient_reaches_the_model_and_not_the_teachers(run: Run) -> None:
    result(run).loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in run.model.parameters())
    assert all(not p.requires_grad for teacher in run.teachers.values() for p in teacher.parameters())
    held = {id(module) for module in run.objective.modules()}
    assert not held & {id(teacher) for teacher in run.teachers.values()}, "teachers are not part of the state"


def test_statistics_are_fitted_once(run: Run) -> None:
    normalizers = [module for name, module in run.objective.named_modules() if hasattr(module, "unwhiten")]
    assert all(bool(module.get_buffer("frozen")) for module in normalizers)


def test_folding_returns_the_model_that_is_saved(run: Run, tmp_path: Path) -> None:
    model = loop.exportable(run, run.model)
    assert isinstance(model, Trainable)
    assert type(model) is type(run.model) and model is not run.model and not model.training
    model.save(tmp_path / "saved")
    assert any((tmp_path / "saved").iterdir())


def test_next_steps_name_the_run(kind: str, tmp_path: Path) -> None:
    assert "runs/mine" in objective_kind(made(kind, tmp_path)).next_steps("runs/mine")


def test_resumed_run_equals_the_straight_one(kind: str, tmp_path: Path) -> None:
    config = made(kind, tmp_path)
    straight = loop.train_model(config, tmp_path / "run", quiet=True)
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    (newest / "state.json").unlink()
    assert any((tmp_path / "run" / "checkpoints").glob("*/state.json"))
    resumed = loop.train_model(config, tmp_path / "run", resume=True, quiet=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
