"""Several processes train one model: the same losses as one process, one run folder, a common end.

Two processes are started once and do all of :data:`JOBS`, one after the other; the tests look at what came of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from agglo import dist
from agglo.cli.main import app
from agglo.config import build
from agglo.nn.linalg import Moments
from agglo.nn.placement import Placement, align_to_common_grid, overlap_count
from agglo.training import loop, parallel
from agglo.training.checkpoint import checkpoints
from agglo.training.folder import resume_command
from agglo.types import ConfigError
from support.training import tiny, trace, weights, write_images

pytestmark = pytest.mark.processes

# All that is random a sample, and masks.
MANY = [
    "data.views.shift=0.5", "losses.mesa={kind: se_mesa, weight: 1.0, ramp: 2}", "train.steps=4", "train.save_every=2",
    "data.views.mixup=0.5", "student.pos_dropout=0.3",
]  # fmt: skip
DAMP = ["train.damp=0.1", "train.steps=5", "train.save_every=9", "train.log_every=3"]
HYBRID = "student={kind: hybrid, width: 16, stem_width: 8, depths: [1, 1, 1, 1], heads: [2, 2]}"
ELSE: dict[str, tuple[list[str], bool]] = {
    "stages": (['stages=[{name: low, teachers: [toy, dense]}, {name: high, set: ["train.steps=1"]}]'], True),
    "teacher_drop": (["balancer={kind: teacher_drop}", "data.views.shift=0.5"], True),
    "adaloss": (["balancer={kind: adaloss, momentum: 0.5}", "auxiliary={toy: {depth: 0}}"], True),
    "crops": (["data.views.crops=2", "data.views.roam=1"], True),
    "relations": (["losses.spatial={kind: relational}"], False),
    "batch_norm": ([HYBRID, "partitions=[{sizes: [64], batch: 4}]"], False),
}
"""What else a recipe may hold, by name, and whether one process does the same."""

JOBS: dict[str, dict[str, Any]] = {
    "many": {"changes": MANY},
    "straight": {"changes": DAMP},
    "broken": {"changes": DAMP, "stop": 1},
    "resumed": {"changes": DAMP, "run": "broken", "resume": True},
    "elsewhere": {"changes": DAMP, "run": "broken", "resume": True, "elsewhere": True},
    "nan": {"changes": ["train.steps=3"], "nan": 1},
    "patience": {"changes": ["train.steps=3", "train.patience=0"], "nan": 1},
    "refused": {"changes": ["partitions=[{sizes: [32], batch: 4}, {sizes: [32], batch: 5}]"]},
    **{name: {"changes": ["train.steps=2", *changes]} for name, (changes, _) in ELSE.items()},
}


# --- what the processes do --------------------------------------------------------------------------------------------


def train(
    images: Path,
    run: Path,
    changes: list[str],
    *,
    resume: bool = False,
    stop: int = -1,
    nan: int = -1,
    elsewhere: bool = False,
) -> dict[str, Any]:
    """A run; process 1 receives Ctrl-C in step ``stop`` and NaN in step ``nan``, and may have a separate folder."""
    run = run / "own" if elsewhere and os.environ["RANK"] == "1" else run
    real, found = loop.one_step, {"sizes": [], "good": [], "names": []}
    held: list[loop.Run] = []

    def step(state, batch, watch):
        held.append(state)
        if batch.step == stop and dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if batch.step == nan and dist.rank() == 1:
            batch.images.fill_(float("nan"))
        taken = real(state, batch, watch)
        found["sizes"].append(list(batch.size))
        found["good"].append(bool(taken.good))
        found["names"].append(list(batch.names))
        return taken

    loop.one_step, how = step, "finished"
    try:
        loop.train_model(tiny(images, *changes), run, resume=resume, quiet=True, device="cpu")
    except KeyboardInterrupt:
        how = "interrupted"
    except (ConfigError, dist.OtherRankError, loop.DivergenceError) as error:
        return {"how": type(error).__name__, "why": str(error)}
    finally:
        loop.one_step = real
    parts, damp = held[-1].parts, held[-1].damp
    state = {f"{part}/{name}": value for part in parts for name, value in parts[part].state_dict().items()}
    noise = {} if damp is None else {name: layer._damp.factors for name, layer in damp._layers.items()}
    return {"how": how, "state": state, "noise": noise, **found}


def run_collectives() -> dict[str, Any]:
    """The collectives of :mod:`agglo.dist`."""
    with dist.process_group("cpu"):
        here = dist.rank()
        torch.manual_seed(0)
        student = build("students", {"kind": "timm", "model": "test_vit", "drop_path": 0.5}).train()
        torch.manual_seed(0)
        images = torch.ones(8, 3, 32, 32)
        dropped, after = student(images).summary.detach(), torch.rand(3)
        torch.manual_seed(0)
        moments = Moments(2)
        moments.update(torch.arange(12.0).view(6, 2)[: 2 + 2 * here] ** 2)
        moments.all_reduce()
        return {
            "dropped": dropped, "weights": next(student.parameters()).detach(), "after": after,
            "total": dist.total(torch.tensor([1.0, here])), "rows": dist.gather_rows(torch.full((2, 1), float(here))),
            "anywhere": dist.any_rank(here == 1), "everywhere": dist.all_ranks(torch.tensor(here == 1)),
            "drawn": dist.uniform((2, 3), device=torch.device("cpu")),
            "mean": moments.mean, "covariance": moments.covariance(), "count": moments.count,
        }  # fmt: skip


def work(folder: Path, images: Path, ports: list[int]) -> None:
    """All jobs; what came of each is saved."""
    torch.set_num_threads(1)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {"run_collectives": run_collectives}
    for name, job in JOBS.items():
        options = {key: value for key, value in job.items() if key != "run"}
        jobs[name] = lambda name=name, job=job, options=options: train(images, folder / job.get("run", name), **options)
    found = {}
    for (name, job), port in zip(jobs.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            found[name] = job()
        except Exception:  # noqa: BLE001 - the test of this job shows it
            found[name] = {"how": traceback.format_exc()}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))


# --- what must come of it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all jobs' runs; ``images`` in it is their data, ``0.pt`` and ``1.pt`` what the processes found."""
    folder = tmp_path_factory.mktemp("runs")
    images = write_images(folder / "images")
    free = [socket.socket() for _ in range(len(JOBS) + 1)]
    for each in free:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in free]
    for each in free:
        each.close()
    command = [sys.executable, __file__, str(folder), str(images), json.dumps(ports)]
    running = []
    for rank in ("0", "1"):
        settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [each.communicate(timeout=600)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert all(each.returncode == 0 for each in running), "\n----\n".join(errors)
    return folder


def found(runs: Path, job: str) -> list[dict[str, Any]]:
    """What came of a job in both processes."""
    return [torch.load(runs / f"{rank}.pt", weights_only=True)[job] for rank in (0, 1)]


def assert_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Both processes hold the same model, average, statistics and balancer, bit for bit."""
    assert one["state"] and one["state"].keys() == two["state"].keys()
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name


def test_two_processes_equal_one(runs: Path, tmp_path: Path) -> None:
    made = tiny(runs / "images", *MANY)
    assert {partition.batch for partition in made.partitions} == {4, 2}
    loop.train_model(made, tmp_path / "one", quiet=True, device="cpu")
    one, two = found(runs, "many")
    assert one["how"] == two["how"] == "finished"
    first, second = trace(tmp_path / "one"), trace(runs / "many")
    assert [line["step"] for line in second] == [1, 2, 3, 4]
    for a, b in zip(first, second, strict=True):
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["size"] == b["size"]
    assert "mesa" in second[-1]["terms"]
    theirs = weights(runs / "many")
    for name, value in weights(tmp_path / "one").items():
        other = theirs[name]
        if name.endswith("attn.qkv.bias"):
            # Keys' biases have no gradient but rounding, which Adam makes steps of.
            value, other = (each.unflatten(0, (3, -1))[[0, 2]] for each in (value, other))
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5)
    assert_equal(one, two)
    assert one["sizes"] == two["sizes"]
    assert all(len(a) == len(b) for a, b in zip(one["names"], two["names"], strict=True))
    assert one["names"] != two["names"]
    assert {path.name for path in runs.glob("many/*")} == {path.name for path in tmp_path.glob("one/*")}


def test_damp_noise_differs_by_process(runs: Path) -> None:
    one, two = found(runs, "straight")
    assert one["noise"] and one["sizes"] == two["sizes"]
    for name, factors in one["noise"].items():
        assert not torch.equal(factors, two["noise"][name])
    assert_equal(one, two)
    assert [line["step"] for line in trace(runs / "straight")] == [3, 5]


def test_signal_to_one_process_stops_all_and_the_run_resumes(runs: Path) -> None:
    assert [(each["how"], len(each["sizes"])) for each in found(runs, "broken")] == [("interrupted", 2)] * 2
    assert [len(each["sizes"]) for each in found(runs, "resumed")] == [3, 3]  # from the one checkpoint, after step 2
    for one, two in zip(found(runs, "resumed"), found(runs, "straight"), strict=True):
        for name, value in one["state"].items():
            assert torch.equal(value, two["state"][name]), name
    assert [line["step"] for line in trace(runs / "broken")] == [3, 5]


def test_nan_in_one_process_skips_the_step_in_all(runs: Path) -> None:
    one, two = found(runs, "nan")
    assert one["good"] == two["good"] == [True, False, True]
    skipped = [line for line in trace(runs / "nan") if "skipped_step" in line]
    assert [line["images"] for line in skipped] == [one["names"][1] + two["names"][1]]
    assert_equal(one, two)
    assert all(bool(value.isfinite().all()) for value in one["state"].values())


def test_divergence_ends_all_processes_with_one_checkpoint(runs: Path) -> None:
    one, two = found(runs, "patience")
    assert (one["how"], two["how"]) == ("DivergenceError", "OtherRankError")
    assert one["why"] in two["why"]
    assert [path.name for path in checkpoints(runs / "patience" / "checkpoints")] == ["step_00000001"]


def test_indivisible_batch_is_refused_before_anything_is_written(runs: Path) -> None:
    one, two = found(runs, "refused")
    assert (one["how"], two["how"]) == ("ConfigError", "OtherRankError")
    assert "partitions.1.batch" in one["why"] and "5 is not divisible by 2 processes; use 4 or 6" in one["why"]
    assert not (runs / "refused").exists()


def test_different_folders_are_reported_once(runs: Path) -> None:
    one, two = found(runs, "elsewhere")
    assert (one["how"], two["how"]) == ("ConfigError", "OtherRankError")
    assert "differs between processes: name a folder that all machines share" in one["why"]


@pytest.mark.parametrize("name", ELSE)
def test_other_ingredients_work_with_two_processes(runs: Path, tmp_path: Path, name: str) -> None:
    one, two = found(runs, name)
    assert (one["how"], two["how"]) == ("finished", "finished")
    assert_equal(one, two)
    changes, exact = ELSE[name]
    if exact:
        loop.train_model(tiny(runs / "images", "train.steps=2", *changes), tmp_path / "one", quiet=True, device="cpu")
        below = Path("stages", "2_high") if name == "stages" else Path()
        for a, b in zip(trace(tmp_path / "one" / below), trace(runs / name / below), strict=True):
            assert a["terms"] == pytest.approx(b["terms"], rel=1e-4)


def test_collectives(runs: Path) -> None:
    one, two = found(runs, "run_collectives")
    torch.manual_seed(0)
    assert torch.equal(torch.cat([one["drawn"], two["drawn"]]), torch.rand(4, 3))
    # Stochastic depth drops other images in the other process, and what is drawn afterwards is one process's.
    assert torch.equal(one["weights"], two["weights"])
    assert not torch.equal(one["dropped"], two["dropped"])
    torch.manual_seed(0)
    assert torch.equal(one["after"], torch.rand(3)) and torch.equal(two["after"], one["after"])
    expected, seen = Moments(2), torch.arange(12.0).view(6, 2) ** 2
    expected.update(torch.cat([seen[:2], seen[:4]]))
    for rank in (one, two):
        assert rank["total"].tolist() == [2, 1] and rank["rows"].flatten().tolist() == [0, 0, 1, 1]
        assert rank["anywhere"] and not rank["everywhere"] and rank["count"] == 6
        torch.testing.assert_close(rank["mean"], expected.mean)
        torch.testing.assert_close(rank["covariance"], expected.covariance())


def test_single_process_needs_no_collectives() -> None:
    flag, rows = torch.tensor(False), torch.rand(3, 2)
    assert dist.rank() == 0 and dist.world_size() == 1 and dist.local_slice(4) == slice(0, 4)
    assert dist.gather_rows(rows) is rows and dist.total(rows) is rows and dist.all_ranks(flag) is flag
    with dist.process_group("cuda:7") as device:
        assert device == "cuda:7"


def test_incomplete_torchrun_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but RANK.*torchrun --nproc_per_node"):
        dist.launch_rank()
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--device mps.*one GPU each"):
        dist.local_device("mps")
    with pytest.raises(ConfigError, match="cannot join the others"), dist.process_group("cpu"):
        pass


def test_commands_under_torchrun_print_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**settings, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert resume_command(Path("run")).startswith("torchrun --nproc_per_node 2 -m agglo train run/recipe.yaml")
    result = CliRunner().invoke(app, ["cache", "quickstart", "--smoke", "--out", str(tmp_path / "cache")])
    assert result.exit_code == 2 and "without torchrun" in result.output
    assert not (tmp_path / "cache").exists()
    result = CliRunner().invoke(app, ["eval", "{kind: toy}", "--evals", "rank", "--out", str(tmp_path / "evals")])
    assert result.exit_code == 2 and "`agglo eval` writes with one process" in result.output
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, ["eval", "{kind: toy}", "--evals", "rank", "--out", str(tmp_path / "evals")])
    assert result.exit_code == 2 and result.output == ""  # printed once, by rank 0
    assert not (tmp_path / "evals").exists()


def test_common_positions_are_counted_without_the_device() -> None:
    place = Placement(torch.tensor([[0.0, 0.0], [2.0, 1.0]], dtype=torch.float64), (1.0, 1.0), (6, 6))
    other = Placement(torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64), (2.0, 2.0), (3, 3))
    *_, mask = align_to_common_grid(torch.rand(2, 3, 6, 6), place, torch.rand(2, 3, 3, 3), other)
    assert mask is not None and overlap_count(place, other) == int(mask.sum()) > 0
    assert overlap_count(place, place) == 72


def test_gradients_are_averaged_in_buckets_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_BUCKET", 10)
    sizes = [(4, torch.float32), (5, torch.float32), (3, torch.float64), (30, torch.float32), (1, torch.float32)]
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    found = [[len(each) for each in bucket] for bucket in parallel._buckets(tensors)]
    assert found == [[4, 5], [30], [1], [3]]
