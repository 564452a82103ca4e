"""One step: memory, synchronisation with the device, and skipped steps."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from agglo.losses.mse import MSE
from agglo.objectives import _matching
from agglo.objectives.base import spread
from agglo.training import loop, optim
from agglo.training import step as step_module
from agglo.training.checkpoint import checkpoints
from agglo.training.loop import Progress, Run
from agglo.training.metrics import MetricsBuffer, half_precision_teachers, pack
from agglo.training.optim import build_optimizer, is_deferred, update
from agglo.training.step import Stopwatch, one_step
from agglo.types import ConfigError
from support.training import started, tiny, trace, weights

pytestmark = pytest.mark.training

EVERYTHING = (
    "data.views.shift=0.8", "losses.mesa={kind: se_mesa}", "train.windows=[2]", "train.window_share=1.0",
    "train.damp=0.1", "train.spectral=true", "data.views.mixup=1.0",
    "auxiliary={toy: {depth: 0}, other: {depth: 1.0, weight: 0.5}}", "partitions=[{sizes: [64], batch: 4}]",
)  # fmt: skip


def gradients(run: Run, step: int = 0) -> dict[str, Tensor]:
    """Of one step's loss, without an update."""
    torch.manual_seed(step)
    result, _ = step_module.forward(run, run.loader.batch(step), Stopwatch())
    run.optimizer.zero_grad()
    result.loss.backward()
    parts = (("model", run.model), ("objective", run.objective))
    found = {f"{part}.{name}": p.grad for part, module in parts for name, p in module.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


# --- memory -----------------------------------------------------------------------------------------------------------


class Product(MSE):
    """Keeps the target's map for the backward pass, and counts how many of them are alive when it is asked again."""

    maps: list[StorageWeakRef] = []
    alive: list[int] = []

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.alive.append(self.count())
        self.maps.extend(StorageWeakRef(x.untyped_storage()) for x in (prediction, target))
        return (prediction * target).square().mean(1)

    def count(self) -> int:
        return sum(not ref.expired() for ref in self.maps)


@pytest.mark.parametrize("plain", [False, True])
def test_at_most_one_resampled_map_is_in_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    run = started(data, tmp_path, "data.views.shift=0.8", "losses.mesa={kind: se_mesa}")
    monkeypatch.setattr(Product, "maps", [])
    monkeypatch.setattr(Product, "alive", [])
    run.objective.mesa = Product()
    for name in run.objective.spatial_losses:
        run.objective.spatial_losses[name] = Product()
    if plain:
        monkeypatch.setattr(_matching, "checkpoint", lambda function, *given, **_: function(*given))
    torch.manual_seed(0)
    result, _ = step_module.forward(run, run.loader.batch(0), Stopwatch())
    assert len(Product.alive) == 4  # three teachers and the averaged student
    if plain:  # what the test sees where all are kept
        assert Product().count() == 4
        assert Product.alive == [0, 1, 2, 3]
        return
    assert Product().count() == 0
    result.loss.backward()
    assert Product.alive == [0] * 8  # each was made once more, and the one before it was gone


@pytest.mark.parametrize(
    "balancer", ["fixed", "adaloss", "uncertainty", "dwa", "teacher_drop", "{kind: schedule, points: {toy: [[0, 2]]}}"]
)
def test_gradients_equal_those_without_recomputation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balancer: str
) -> None:
    run = started(data, tmp_path, *EVERYTHING, f"balancer={balancer if '{' in balancer else f'{{kind: {balancer}}}'}")
    state = {name: value.clone() for name, value in run.objective.state_dict().items()}
    found = gradients(run)
    run.objective.load_state_dict(state)  # balancers remember
    for name, buffer in started(data, tmp_path, *EVERYTHING).model.named_buffers():
        run.model.get_buffer(name).copy_(buffer)  # and so does the power iteration
    monkeypatch.setattr(_matching, "checkpoint", lambda function, *given, **_: function(*given))
    expected = gradients(run)
    assert found.keys() == expected.keys()
    assert any("auxiliary" in name for name in found)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)


def test_teacher_drop_decides_per_image(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(data, tmp_path, "balancer={kind: teacher_drop, p: 1.0}", "data.views.shift=0.5")
    seen = {}
    real = run.objective.balancer.combine

    def looking(terms, *, step, total, per_image):
        seen.update(per_image)
        return real(terms, step=step, total=total, per_image=per_image)

    monkeypatch.setattr(run.objective.balancer, "combine", looking)
    batch = run.loader.batch(0)
    result, _ = step_module.forward(run, batch, Stopwatch())
    assert {name: tuple(rows.shape) for name, rows in seen.items()} == dict.fromkeys(result.terms, (4,))
    scores = {"toy": (seen["toy/summary"] + seen["toy/spatial"]) / 2, "dense": seen["dense/spatial"]}
    scores["other"] = (seen["other/summary"] + seen["other/spatial"]) / 2
    # With p = 1 only the worst teacher of each image is left, times three; its terms weigh 1 each.
    parts = {"toy": 2, "other": 2, "dense": 1}
    expected = torch.stack([scores[name] * parts[name] for name in parts])
    worst = torch.stack([scores[name] for name in parts]).argmax(0)
    kept = expected.gather(0, worst[None]).mean() * 3
    torch.testing.assert_close(result.loss, kept)
    for name, rows in seen.items():
        torch.testing.assert_close(result.terms[name], rows.mean().detach())


# --- no synchronisation -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch):
    """The meta device has no autocast."""
    real = torch.autocast

    def autocast(device_type, *given, **named):
        return contextlib.nullcontext() if device_type == "meta" else real(device_type, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", autocast)
        yield


class Flagged(torch.optim.SGD):
    """Stands for the fused kernel, which reads its flag on the device."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=0.1)
        self.defaults["fused"] = True
        self.flags: list[Tensor] = []

    def step(self, closure=None):
        self.flags.append(self.found_inf)  # type: ignore[attr-defined]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad)


@pytest.mark.parametrize("balancer", ["fixed", "adaloss", "uncertainty", "dwa", "teacher_drop"])
@pytest.mark.parametrize("clip", ["null", "1.0"])
def test_step_does_not_synchronise_with_the_device(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balancer: str, clip: str
) -> None:
    """The meta device has no values: reading one, or copying a tensor to the host, raises."""
    run = started(data, tmp_path, *EVERYTHING, f"balancer.kind={balancer}", f"train.clip={clip}")
    one_step(run, run.loader.batch(0), Stopwatch())  # what is looked up once and remembered, is now
    meta = torch.device("meta")
    for module in (run.model, run.ema.model, run.objective, *run.teachers.values()):
        module.to(meta)
    parameters = [p for p in (*run.model.parameters(), *run.objective.parameters()) if p.requires_grad]
    moved = replace(run, device=meta, optimizer=Flagged(parameters))
    with no_autocast_on_meta(monkeypatch):
        moved.damp.set_step(1)
        taken = one_step(moved, run.loader.batch(1), Stopwatch())
        moved.ema.update(moved.model, 1, taken.good)
    assert taken.values.is_meta and taken.good.is_meta and moved.optimizer.flags[0].is_meta
    assert {"loss", "norm", "term:mesa", "term:toy/auxiliary", "target:dense/spatial"} <= set(taken.labels)
    buffer = MetricsBuffer()
    buffer.add(taken)
    with pytest.raises((RuntimeError, NotImplementedError)):
        buffer.fetch()  # the one place that reads, and only when it is asked to


@pytest.mark.parametrize("planted", ["item", "cpu", "nonzero"])
def test_meta_device_detects_synchronisation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    run = started(data, tmp_path)
    one_step(run, run.loader.batch(0), Stopwatch())
    for module in (run.model, run.objective, *run.teachers.values()):
        module.to("meta")
    real = run.objective.spatial_losses["toy"].forward
    spy = {"item": lambda x: x.sum().item(), "cpu": lambda x: x.cpu(), "nonzero": lambda x: x[x > 0]}[planted]

    def reading(prediction, target, mask=None):
        spy(prediction)
        return real(prediction, target, mask)

    monkeypatch.setattr(run.objective.spatial_losses["toy"], "forward", reading)
    moved = replace(run, device=torch.device("meta"), optimizer=Flagged(list(run.model.parameters())))
    with no_autocast_on_meta(monkeypatch), pytest.raises((RuntimeError, NotImplementedError)):
        one_step(moved, run.loader.batch(1), Stopwatch())


def fused(model, config, objective=None):
    """The optimiser of a GPU on the CPU, which has that kernel too."""
    groups = [
        {key: group[key] for key in ("params", "student", "weight_decay")}
        for group in build_optimizer(model, config, objective).param_groups
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these steps NaN."""
    real = step_module.forward

    def spoiled(run, batch, watch):
        result, spread = real(run, batch, watch)
        if batch.step in steps:
            result = replace(result, loss=result.loss * float("nan"))
        return result, spread

    monkeypatch.setattr(step_module, "forward", spoiled)


def test_deferred_checks_skip_the_same_steps(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny(data, "train.log_every=3", "train.steps=8", "train.clip=null")
    spoil(monkeypatch, 1, 3, 4)
    monkeypatch.setattr(loop, "build_optimizer", fused)
    with monkeypatch.context() as patch:
        for module in (loop, step_module, optim):
            patch.setattr(module, "is_deferred", lambda _: False)
        loop.train_model(made, tmp_path / "at_once", quiet=True)
    reads = []
    real = MetricsBuffer.fetch
    monkeypatch.setattr(MetricsBuffer, "fetch", lambda buffer: reads.append(len(buffer._pending)) or real(buffer))
    loop.train_model(made, tmp_path / "late", quiet=True)
    assert reads == [3, 3, 2]  # at steps 3 and 6, where it is logged and saved, and at the end
    for name, value in weights(tmp_path / "at_once").items():
        assert torch.equal(weights(tmp_path / "late")[name], value), name
    skipped = [[line for line in trace(tmp_path / name) if "skipped_step" in line] for name in ("at_once", "late")]
    assert skipped[0] == skipped[1]
    assert [line["step"] for line in skipped[1]] == [2, 4, 5]
    assert all(line["images"] for line in skipped[1])
    assert trace(tmp_path / "late")[-1]["skipped_steps"] == 3


@pytest.mark.parametrize(("how", "stops_at", "kept"), [(build_optimizer, 5, 2), (fused, 6, 2)])
def test_too_many_consecutive_skips_stop_the_run_with_a_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how, stops_at: int, kept: int
) -> None:
    """At once where reading costs nothing, at the next record elsewhere; what was learned before is kept."""
    spoil(monkeypatch, *range(2, 20))
    taken = []
    real = loop.one_step
    monkeypatch.setattr(loop, "one_step", lambda *given: taken.append(given[1].step) or real(*given))
    monkeypatch.setattr(loop, "build_optimizer", how)
    made = tiny(data, "train.steps=20", "train.patience=2", "train.log_every=6", "train.save_every=100")
    with pytest.raises(loop.DivergenceError, match=r"step 4: the loss is not finite; consecutive skipped steps: 3"):
        loop.train_model(made, tmp_path / "run", quiet=True)
    assert len(taken) == stops_at
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [f"step_{kept:08d}"]
    assert all(value.isfinite().all() for value in loop.checkpoint.load_file(
        tmp_path / "run" / "checkpoints" / f"step_{kept:08d}" / "model.safetensors").values())  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
def test_skipped_update_changes_nothing(late: bool) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **{"fused" if late else "foreach": True})
    assert is_deferred(optimizer) == late
    for good in (True, False, True):
        layer(torch.ones(1, 3)).sum().backward()
        before = [p.detach().clone() for p in layer.parameters()]
        if not good:
            layer.weight.grad.fill_(float("nan"))
        update(optimizer, torch.tensor(good))
        same = all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))
        assert same != good
        optimizer.zero_grad()
    assert float(optimizer.state[layer.weight]["step"]) == 2


def overflow(run: Run, monkeypatch: pytest.MonkeyPatch, scale: float, *steps: int) -> None:
    """Let the first BatchNorm of the student meet values that are so much larger, in these steps."""
    norm = next(m for m in run.model.student.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    real = step_module.forward

    def forward(run, batch, watch):
        grow = lambda module, given: (given[0] * scale,) if batch.step in steps else None  # noqa: E731
        with contextlib.ExitStack() as stack:
            stack.callback(norm.register_forward_pre_hook(grow).remove)
            return real(run, batch, watch)

    monkeypatch.setattr(step_module, "forward", forward)


@pytest.mark.parametrize(("scale", "why"), [(1e38, "loss|is not finite"), (1e30, "running statistics")])
@pytest.mark.parametrize("how", [build_optimizer, fused])
@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_running_statistics_are_restored_after_a_skipped_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how, ema: float, scale: float, why: str
) -> None:
    monkeypatch.setattr(loop, "build_optimizer", how)
    run = started(
        data, tmp_path, "student={kind: timm, model: test_efficientnet, stages: [3]}", f"train.ema={ema}",
        "train.steps=3", "partitions=[{sizes: [64], batch: 4}]",
    )  # fmt: skip
    overflow(run, monkeypatch, scale, 1)
    seen = {}
    real = loop.one_step

    def step(run, batch, watch):
        taken = real(run, batch, watch)
        seen[batch.step] = {name: buffer.clone() for name, buffer in run.model.named_buffers()}, bool(taken.good)
        return taken

    monkeypatch.setattr(loop, "one_step", step)
    messages = []
    with Progress(run.folder, 3, quiet=True) as progress:
        progress.message = messages.append
        loop.train_steps(run, progress, [])
        model = loop.export(run, progress)
    assert [seen[step][1] for step in range(3)] == [True, False, True]
    assert re.match(f"step 1: .*({why})", messages[0])
    moved = [name for name, value in seen[0][0].items() if not torch.equal(value, seen[2][0][name])]
    assert any(name.endswith("running_var") for name in moved)
    for name, value in seen[0][0].items():
        assert torch.equal(seen[1][0][name], value), name
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_fused_update_accepts_gradients_of_any_strides() -> None:
    """Its kernel walks memory; a gradient may come in another order than its channels-last weight."""
    start, gradient = torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    moved = []
    for late in (False, True):
        weight = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([weight], lr=0.1, **{"fused" if late else "foreach": True})
        for scale in (1.0, -0.3):
            weight.grad = gradient * scale
            assert weight.grad.stride() != weight.stride()
            update(optimizer, torch.tensor(True))
        moved.append(weight.detach())
    torch.testing.assert_close(moved[1], moved[0])


def test_metrics_buffer_counts_skips_and_finds_the_cause() -> None:
    buffer = MetricsBuffer(done=7, half={"b"})

    def put(step: int, *, good: bool = True, **numbers: float) -> None:
        values = {"loss": 1.0, "norm": 1.0, "term:a/spatial": 0.5, "target:a/spatial": 1.0} | {
            name.replace("__", ":").replace("_", "/"): value for name, value in numbers.items()
        }
        buffer.add(pack(step, [f"{step}.png"], {k: torch.tensor(v) for k, v in values.items()}, torch.tensor(good)))

    nan = float("nan")
    put(7)
    put(8, good=False, loss=nan, term__a_spatial=nan)
    put(9, good=False, loss=nan, term__a_spatial=nan, target__a_spatial=nan)
    put(10, target__a_spatial=0.0)
    put(11, good=False, norm=nan)
    put(12, good=False, loss=nan)
    put(13, good=False, loss=nan, target__a_spatial=nan, target__b_summary=nan)
    found = buffer.fetch()
    assert [known.consecutive_skips for known in found] == [0, 1, 2, 0, 1, 2, 3]
    assert (buffer.skipped, buffer.consecutive_skips, buffer.done) == (5, 3, 11)
    assert [known.problem for known in found] == [
        None,
        "a/spatial is not finite",
        "spatial features of teacher 'a': NaN or infinity; check its weights and its input",
        None,
        "the gradient is not finite",
        "the loss is not finite",
        "spatial features of teacher 'a', summary features of teacher 'b': NaN or infinity; run it in float32, and "
        "check its weights and its input",
    ]
    assert "train.lr" in found[1].remedy
    assert "--resume" in found[2].remedy and "train.lr" not in found[2].remedy and "dtype" not in found[2].remedy
    assert "teachers.b.dtype=float32" in found[6].remedy and "teachers.a.dtype" not in found[6].remedy
    assert [known.constant for known in found] == [(), (), (), ("a/spatial",), (), (), ()]
    assert found[0].terms == {"a/spatial": 0.5}
    assert buffer.fetch() == []


# --- broken teachers --------------------------------------------------------------------------------------------------


def test_spread_of_constant_and_non_finite_features() -> None:
    x = torch.randn(3, 5, 4, 4)
    assert 0.5 < float(spread(x)) < 4
    per_channel = torch.randn(1, 5, 1, 1).expand(3, 5, 4, 4)
    assert float(spread(per_channel)) == 0
    assert float(spread(per_channel * (1 + 1e-8 * x))) < 1e-6  # rounding
    assert float(spread(torch.zeros(3, 5))) == 0
    one = per_channel.clone()
    one[0, 2, 1, 1] += 1
    assert float(spread(one)) > 0.1
    for bad in (float("nan"), float("inf"), -float("inf")):
        one[0, 2, 1, 1] = bad
        assert spread(one).isnan()
    assert float(spread(torch.randn(1, 5))) == float("inf")  # one vector cannot vary
    assert spread(torch.tensor([[1.0, float("nan")]])).isnan()


def change_features(run: Run, name: str, change) -> None:
    """Change the features of a teacher of a run."""
    teacher = run.teachers[name]
    real = teacher.forward
    teacher.forward = lambda images: change(real(images))


NAN = lambda features: features.map(lambda x: x * float("nan"))  # noqa: E731
SAME = lambda features: features.map(lambda x: torch.full_like(x, 0.3))  # noqa: E731


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (NAN, (), r"teachers\.toy: summary features contain NaN or infinity \(pre-pass, batch 0\)"),
        (SAME, (), r"teachers\.toy: .*equal at all \d+ positions"),
        (SAME, ("targets.normalizer.kind=identity",), r"teachers\.toy: all \d+ targets have the same direction"),
        (NAN, ("targets.normalizer.kind=identity",), r"teachers\.toy.*NaN"),
    ],
)
def test_prepass_names_a_broken_teacher(
    data: Path, tmp_path: Path, change, overrides: tuple[str, ...], message: str
) -> None:
    run = loop.prepare(tiny(data, *overrides), tmp_path / "run", torch.device("cpu"), resume=False)
    change_features(run, "toy", change)
    with Progress(tmp_path, 1, quiet=True) as progress, pytest.raises(ConfigError, match=message):
        loop.start(run, progress, [])


def test_training_names_a_broken_teacher_and_the_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(data, tmp_path, "train.steps=4")
    toy, other = run.teachers["toy"].forward, run.teachers["other"].forward
    real = loop.one_step

    def step(run, batch, watch):
        run.teachers["toy"].forward = lambda images: NAN(toy(images)) if batch.step == 1 else toy(images)
        run.teachers["other"].forward = lambda images: SAME(other(images)) if batch.step >= 2 else other(images)
        return real(run, batch, watch)

    monkeypatch.setattr(loop, "one_step", step)
    messages = []
    with Progress(run.folder, 4, quiet=True) as progress:
        progress.message = messages.append
        loop.train_steps(run, progress, [])
    assert messages[0].startswith("step 1: summary features of teacher 'toy', spatial features of teacher 'toy': NaN")
    assert messages[1].startswith("step 2: the summary features of teacher 'other' are constant over the batch")
    assert messages[2].startswith("step 2: the spatial features of teacher 'other'")
    assert len(messages) == 3  # reported once
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped_step" in line] == [2]
    assert [line["constant_target"] for line in lines if "constant_target" in line] == [
        "other/summary",
        "other/spatial",
    ]


@pytest.mark.parametrize("loss", ["angular", "cosine"])
@pytest.mark.parametrize("part", ["summary", "spatial"])
def test_persistent_nan_of_a_teacher_stops_the_run_with_a_remedy(
    data: Path, tmp_path: Path, loss: str, part: str
) -> None:
    made = (f"losses.summary.kind={loss}", "train.steps=9", "train.patience=2", "train.save_every=100")
    run = started(data, tmp_path, *made)
    nan = float("nan")
    one = lambda x: x.index_fill(0, torch.tensor([1]), nan)  # noqa: E731  # of one image of the batch
    change_features(run, "other", lambda features: replace(features, **{part: one(getattr(features, part))}))
    why = rf"step 2: {part} features of teacher 'other'.*consecutive skipped steps: 3"
    with Progress(run.folder, 9, quiet=True) as progress, pytest.raises(loop.DivergenceError, match=why) as e:
        loop.train_steps(run, progress, [])
    assert "weights" in str(e.value)
    assert "dtype" not in str(e.value)  # this kind has no such key
    assert "lr" not in str(e.value)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped_step" in line] == [1, 2, 3]
    assert all(line["images"] for line in lines)
    assert [path.name for path in checkpoints(run.folder / "checkpoints")] == ["step_00000000"]


def test_half_precision_teachers_are_found(data: Path) -> None:
    model = "{kind: timm, model: test_vit, weights: random"
    made = tiny(data, f"teachers.other={model}, dtype: bfloat16}}", f"teachers.dense={model}}}")
    assert half_precision_teachers(made) == {"other"}


def test_nan_in_a_target_without_a_term_is_ignored(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop.prepare(tiny(data), tmp_path / "run", torch.device("cpu"), resume=False)
    run.folder.mkdir()
    change_features(run, "dense", lambda features: replace(features, summary=features.summary * float("nan")))
    with Progress(tmp_path, 1, quiet=True) as progress:
        loop.start(run, progress, [])  # the pre-pass
    buffer = MetricsBuffer()
    buffer.add(one_step(run, run.loader.batch(0), Stopwatch()))
    real = step_module.forward

    def steep(run, batch, watch):
        result, spread = real(run, batch, watch)
        weight = next(run.model.parameters())
        return replace(result, loss=result.loss + (weight - weight.detach()).sum().abs().sqrt()), spread

    monkeypatch.setattr(step_module, "forward", steep)
    buffer.add(one_step(run, run.loader.batch(1), Stopwatch()))
    first, second = buffer.fetch()
    assert first.problem is None
    assert second.problem == "the gradient is not finite" and "train.lr" in second.remedy


def test_unreadable_images_are_gathered_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(data, tmp_path)
    bad, sent = {"a.png": "empty"}, []
    run.loader.skipped = bad

    def gather(new):
        sent.append(dict(new))
        bad.update({f"{len(sent)}.png": "short"})  # a thread of the loader
        return [new, {"b.png": "elsewhere"}]

    monkeypatch.setattr(loop.dist, "gather", gather)
    assert loop.skipped_images(run) == {"a.png": "empty", "b.png": "elsewhere"}
    assert loop.skipped_images(run).keys() == {"a.png", "b.png", "1.png"}
    assert sent == [{"a.png": "empty"}, {"1.png": "short"}]


def test_covariance_of_too_few_positions_is_refused(data: Path, tmp_path: Path) -> None:
    made = tiny(
        data, "targets.normalizer.kind=whiten", "targets.estimate_images=2", "partitions=[{sizes: [32], batch: 2}]"
    )
    run = loop.prepare(made, tmp_path / "run", torch.device("cpu"), resume=False)
    with (
        Progress(tmp_path, 1, quiet=True) as progress,
        pytest.raises(ConfigError, match=r"teachers\.toy: .*12 channels .* from 8 positions.*at least 13 are needed"),
    ):
        loop.start(run, progress, [])


# --- illegal sizes and windows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.windows=[3, 5]",), r"train\.windows: \[3, 5\] fit no size.*32 px: none; 48 px: none; 64 px: 2$"),
        (("student.window=5",), r"partitions\.0\.sizes: .*32 is not a multiple of 80 px, .*the nearest is 80"),
        (("partitions.0.sizes=[7]",), r"partitions\.0\.sizes.*7 is not a multiple of 16 px, .*the nearest is 16"),
        (("train.windows=[1]",), r"window: 1 is neither 0 \(none\) nor an integer"),
    ],
)
def test_illegal_windows_and_sizes_list_the_legal_ones(
    data: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loop.train_model(tiny(data, *overrides), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_size_that_a_teacher_cannot_take_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agglo.teachers.toy import Toy

    monkeypatch.setattr(Toy, "input_size", lambda self, size, stride: (size[0] + 1, size[1]))
    with pytest.raises(ConfigError, match=r"at 32 px teacher 'toy' would get 33x32 px, but it takes multiples of 16"):
        loop.train_model(tiny(data), tmp_path / "run", quiet=True)
