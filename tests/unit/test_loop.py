"""The training loop: losses fall, runs are reproducible and resumable, and a used folder is protected."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from agglo import recipe
from agglo.data.shifts import max_shift
from agglo.model import artefact
from agglo.model.artefact import WEIGHTS
from agglo.model.model import Model
from agglo.training import loop
from agglo.training import step as step_module
from agglo.training.checkpoint import checkpoints
from agglo.training.ema import Ema
from agglo.training.optim import build_optimizer, learning_rate, set_learning_rate, student_factor
from agglo.training.step import draw_window
from agglo.types import AssetError, ConfigError, StorageError
from support.training import TINY, interrupted_in, tiny, trace, weights

pytestmark = pytest.mark.training


def test_run_writes_all_files_and_lowers_every_term(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = loop.train_model(tiny(data, "train.steps=60", "train.log_every=10"), run, quiet=True)
    for name in ("recipe.yaml", "versions.json", "metrics.jsonl", "model/config.json", "initial/model.safetensors"):
        assert (run / name).is_file()
    assert any((run / "tensorboard").iterdir())
    assert recipe.load(str(run / "recipe.yaml")).train.steps == 60
    first, last = trace(run)[0], trace(run)[-1]
    assert set(first["terms"]) == {"toy/summary", "toy/spatial", "other/summary", "other/spatial", "dense/spatial"}
    assert all(last["terms"][name] < first["terms"][name] for name in first["terms"])
    assert last["step"] == 60
    assert {"teachers", "forward", "backward", "data"} <= set(last["seconds"])
    assert not model.training
    out = model(torch.rand(1, 3, 50, 70))
    assert out.heads["dense"].summary is None
    assert out.heads["other"].spatial.shape[1] == 8


def test_exported_heads_predict_in_the_teachers_own_space(data: Path, tmp_path: Path) -> None:
    made = tiny(data, "train.steps=1", "train.ema=0")
    (tmp_path / "run").mkdir()
    run = loop.prepare(made, tmp_path / "run", torch.device("cpu"), resume=False)
    with loop.Progress(tmp_path, 1, quiet=True) as progress:
        loop.start(run, progress, [])
    run.model.eval()
    images = torch.rand(2, 3, 32, 32)
    before = run.model(images).heads["toy"].spatial
    expected = run.objective.normalizers["toy"].inverse(before)
    after = run.objective.fold(run.model)(images).heads["toy"].spatial
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    initial = Model.load(tmp_path / "run" / "initial")(images).heads["toy"].spatial
    torch.testing.assert_close(initial, expected, rtol=1e-4, atol=1e-4)


def test_term_without_teacher_output_is_refused_if_weighted(data: Path, tmp_path: Path) -> None:
    silent = tiny(data, "teachers={toy: {kind: toy}, dense: {kind: hog, cell: 8}}", "train.steps=2")
    assert silent.to_dict()["teachers"]["dense"]["summary_weight"] is None
    run = tmp_path / "run"
    loop.train_model(silent, run, quiet=True)
    assert set(trace(run)[0]["terms"]) == {"toy/summary", "toy/spatial", "dense/spatial"}
    again = recipe.load(str(run / "recipe.yaml"))  # with every default written out
    assert again == silent
    loop.train_model(again, run, resume=True, quiet=True)
    conse = "{kind: conse, model: tf_efficientnet_lite0, size: 64}"
    for teacher, key, part in ((conse, "spatial", "map"), ("{kind: hog, cell: 8}", "summary", "summary")):
        asked = tiny(data, f"teachers.dense={teacher}", f"teachers.dense.{key}_weight=0.5")
        with pytest.raises(
            ConfigError, match=rf"teachers\.dense\.{key}_weight: 0\.5.*no {part}.*set `{key}_weight: 0` or omit"
        ):
            loop.train_model(asked, tmp_path / key, quiet=True)
        assert not (tmp_path / key / "metrics.jsonl").exists()


def test_losses_depend_on_the_seed_only(data: Path, tmp_path: Path) -> None:
    loop.train_model(tiny(data), tmp_path / "a", quiet=True)
    loop.train_model(tiny(data, "data.workers=2"), tmp_path / "b", quiet=True)
    loop.train_model(tiny(data, "train.seed=1"), tmp_path / "c", quiet=True)
    terms = [[line["terms"] for line in trace(tmp_path / name)] for name in "abc"]
    assert terms[0] == terms[1]
    assert terms[0] != terms[2]


def test_resumed_run_equals_the_straight_one(data: Path, tmp_path: Path) -> None:
    loop.train_model(tiny(data), tmp_path / "straight", quiet=True)
    with interrupted_in(3), pytest.raises(KeyboardInterrupt):
        loop.train_model(tiny(data), tmp_path / "broken", quiet=True)
    assert checkpoints(tmp_path / "broken" / "checkpoints")[-1].name == "step_00000004"  # the step was finished
    loop.train_model(tiny(data), tmp_path / "broken", resume=True, quiet=True)
    straight, resumed = trace(tmp_path / "straight"), trace(tmp_path / "broken")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(straight, resumed, strict=True):
        assert one["terms"] == pytest.approx(two["terms"], rel=1e-5)
    for name, value in weights(tmp_path / "straight").items():
        torch.testing.assert_close(weights(tmp_path / "broken")[name], value, rtol=1e-4, atol=1e-5)


def test_used_folder_is_refused_without_a_flag(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop.train_model(tiny(data, "train.steps=1"), run, quiet=True)
    with pytest.raises(ConfigError, match=r"--resume.*--overwrite"):
        loop.train_model(tiny(data, "train.steps=1"), run, quiet=True)
    with pytest.raises(ConfigError, match=r"another recipe \(train\.steps\)"):
        loop.train_model(tiny(data, "train.steps=2"), run, resume=True, quiet=True)
    with pytest.raises(ConfigError, match="no run to resume"):
        loop.train_model(tiny(data), tmp_path / "nowhere", resume=True, quiet=True)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match="exclude"):
        loop.train_model(tiny(data), run, resume=True, overwrite=True, quiet=True)
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.tex").write_text("...")
    with pytest.raises(ConfigError, match="is not a run folder"):
        loop.train_model(tiny(data), precious, overwrite=True, quiet=True)
    assert (precious / "chapter1.tex").exists()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="nearest is 16"):  # a recipe that does not fit costs no run
        loop.train_model(tiny(data, "partitions.0.sizes=[7]"), run, overwrite=True, quiet=True)
    assert (run / "model" / "model.safetensors").is_file()
    loop.train_model(tiny(data, "train.steps=1"), run, overwrite=True, quiet=True)
    assert (run / "notes.txt").read_text() == "mine"


def test_damaged_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop.train_model(tiny(data), run, quiet=True)
    newest = checkpoints(run / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(AssetError, match=newest.name):
        loop.train_model(tiny(data), run, resume=True, quiet=True)


def test_divergence_stops_and_keeps_the_checkpoint(data: Path, tmp_path: Path) -> None:
    with pytest.raises(loop.DivergenceError, match=r"not finite.*train\.lr"):
        loop.train_model(
            tiny(data, "train.lr=1e10", "train.steps=40", "train.clip=null", "train.save_every=1"),
            tmp_path / "run",
            quiet=True,
        )
    kept = load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_non_finite_step_is_skipped_counted_and_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_module.forward

    def failing(run, batch, watch):
        result, spread = real(run, batch, watch)
        if batch.step in (1, 3):
            spoiled = result.loss * float("nan")
            result = replace(result, loss=spoiled, terms={**result.terms, "toy/spatial": spoiled.detach()})
        return result, spread

    monkeypatch.setattr(step_module, "forward", failing)
    loop.train_model(tiny(data), tmp_path / "run", quiet=True)
    lines = trace(tmp_path / "run")
    skipped = [line for line in lines if "skipped_step" in line]
    assert [line["step"] for line in skipped] == [2, 4]
    assert all("toy/spatial" in line["skipped_step"] and len(line["images"]) > 1 for line in skipped)
    assert lines[-1]["skipped_steps"] == 2
    with pytest.raises(loop.DivergenceError, match=r"step 1: toy/spatial.*consecutive skipped steps: 1"):
        loop.train_model(tiny(data, "train.patience=0"), tmp_path / "strict", quiet=True)
    assert checkpoints(tmp_path / "strict" / "checkpoints")[-1].name == "step_00000001"


def test_shifted_views_and_windows_are_drawn(data: Path, tmp_path: Path) -> None:
    """The averaged student joins in when it is due; every window divides its step's grid."""
    made = tiny(
        data, "data.views.shift=0.5", "losses.mesa={kind: se_mesa, weight: 2, start: 2}", "train.windows=[2, 3, 4]",
        "train.window_share=1.0",
    )  # fmt: skip
    loop.train_model(made, tmp_path / "run", quiet=True)
    assert ["mesa" in line["terms"] for line in trace(tmp_path / "run")] == [False, False, True, True, True, True]
    run = loop.prepare(made, tmp_path / "other", torch.device("cpu"), resume=False)
    assert run.loader.margin == max_shift(0.5) * 16
    drawn = set()
    for batch in run.loader.iterate(0, 30):
        window, side = draw_window(made.train, run.model, batch), batch.size[0] // 16
        assert batch.images.shape[-1] == batch.size[1] + 2 * run.loader.margin
        assert window is None or (side % window == 0 and window < side)
        drawn.add((side, window))
    assert drawn == {(2, None), (3, None), (4, 2)}  # 2 and 3 patches hold no smaller window of these
    assert draw_window(tiny(data).train, run.model, batch) is None


def test_student_without_windows_or_linear_layers_warns_and_trains(data: Path, tmp_path: Path) -> None:
    net = "student={kind: timm, model: mobilenetv4_conv_small}"
    made = tiny(data, net, "partitions=[{sizes: [64], batch: 4}]", "train.windows=[2]", "train.spectral=true")
    with pytest.warns(UserWarning, match="training without") as caught:
        run = loop.prepare(made, tmp_path / "run", torch.device("cpu"), resume=False)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "a timm student does not support windows" in messages
    assert "no linear layers" in messages
    batches = list(run.loader.iterate(0, 4))
    assert all(draw_window(made.train.model_copy(update={"window_share": 1.0}), run.model, b) is None for b in batches)


def test_exported_model_has_no_noise_and_no_reparametrisation(data: Path, tmp_path: Path) -> None:
    loop.train_model(tiny(data), tmp_path / "plain", quiet=True)
    loop.train_model(tiny(data, "train.damp=0.2", "train.spectral=true"), tmp_path / "run", quiet=True)
    for name in ("initial", "model"):
        one, other = load_file(tmp_path / "plain" / name / WEIGHTS), load_file(tmp_path / "run" / name / WEIGHTS)
        assert one.keys() == other.keys()
    before = [load_file(tmp_path / run / "initial" / WEIGHTS) for run in ("plain", "run")]
    for key, value in before[0].items():
        torch.testing.assert_close(before[1][key], value, rtol=2e-2, atol=2e-3)  # one power iteration apart
    assert trace(tmp_path / "plain")[0]["terms"] != trace(tmp_path / "run")[0]["terms"]  # noise from the first step on


def test_mesa_without_ema_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"losses\.mesa needs the EMA student"):
        tiny(data, "losses.mesa={kind: se_mesa}", "train.ema=0")


def test_illegal_size_names_the_legal_ones(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"partitions\.0\.sizes.*7 is not a multiple of 16 px.*nearest is 16"):
        loop.train_model(tiny(data, "partitions.0.sizes=[7]"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()  # so that the corrected command just works


def test_interrupted_prepass_restarts_on_resume(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.prepass

    def interrupting(run, progress, interrupted):
        os.kill(os.getpid(), signal.SIGINT)
        yield from real(run, progress, interrupted)

    monkeypatch.setattr(loop, "prepass", interrupting)
    with pytest.raises(KeyboardInterrupt):
        loop.train_model(tiny(data), tmp_path / "run", quiet=True)
    monkeypatch.setattr(loop, "prepass", real)
    loop.train_model(tiny(data), tmp_path / "run", resume=True, quiet=True)
    loop.train_model(tiny(data), tmp_path / "straight", quiet=True)
    assert trace(tmp_path / "run")[-1]["terms"] == trace(tmp_path / "straight")[-1]["terms"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("losses.spatial.kind=angular",),
        ("train.precision=bf16", "data.views.mixup=1.0", "data.views.canvas=64"),
        (
            "student.kind=timm",
            "student.model=test_efficientnet",
            "student.stages=[2]",
            "partitions=[{sizes: [64], batch: 4}]",
        ),
        ("targets.normalizer.kind=identity", "losses.summary.kind=cosine", "losses.spatial.kind=smooth_l1"),
        ("targets.normalizer.kind=standard", "losses.summary.kind=mse", "train.head_steps=2"),
        ("data.views.shift=0.8", "losses.mesa={kind: se_mesa, start: 1, ramp: 2}", "train.windows=[2, 3]"),
        ("train.damp=0.1", "train.spectral=true"),
        (
            "auxiliary={toy: {depth: 0.5, until: 0.8}, dense: {depth: 1, weight: 0.1, until: 1.0}}",
            "train.damp=0.1",
            "train.spectral=true",
            "train.windows=[2]",
            "data.views.shift=0.5",
        ),
        ("balancer.kind=teacher_drop", "data.views.shift=0.5", "losses.mesa={kind: se_mesa}"),
        ("balancer.kind=uncertainty", "targets.normalizer.kind=global_standard"),
        ("balancer={kind: dwa, every: 1}", "losses.spatial.kind=am_radio"),
        ("balancer.kind=adaloss", "targets.normalizer.kind=whiten", "targets.estimate_images=32"),
    ],
)  # fmt: skip
def test_all_ingredients_train_and_resume(data: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    made = tiny(data, "train.steps=4", "train.save_every=2", *overrides)
    loop.train_model(made, tmp_path / "straight", quiet=True)
    loop.train_model(made, tmp_path / "resumed", quiet=True)
    shutil.rmtree(checkpoints(tmp_path / "resumed" / "checkpoints")[-1])  # as if killed after step 2
    loop.train_model(made, tmp_path / "resumed", resume=True, quiet=True)
    straight, resumed = trace(tmp_path / "straight"), trace(tmp_path / "resumed")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    assert resumed[-1]["terms"] == pytest.approx(straight[-1]["terms"], rel=1e-4)
    for name, value in weights(tmp_path / "straight").items():
        torch.testing.assert_close(weights(tmp_path / "resumed")[name], value, rtol=1e-3, atol=1e-4)


def test_unreadable_image_is_skipped_counted_and_named(data: Path, tmp_path: Path) -> None:
    (data / "broken.png").write_bytes((data / "0.png").read_bytes()[:200])
    loop.train_model(tiny(data), tmp_path / "run", quiet=True)
    assert trace(tmp_path / "run")[-1]["skipped_images"] == 1


def test_learning_rate_warms_up_and_decays_by_cosine() -> None:
    config = recipe.Train(steps=101, lr=2.0, warmup_steps=20, final_lr=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(19, config) == pytest.approx(2.0)
    assert learning_rate(20, config) == pytest.approx(2.0)
    assert learning_rate(60, config) == pytest.approx(0.2 + 1.8 / 2)
    assert learning_rate(100, config) == pytest.approx(0.2)


def test_no_weight_decay_on_norms_biases_tokens_and_positions() -> None:
    model = Model(TINY["student"], {})
    optimizer = build_optimizer(model, recipe.Train(steps=1, weight_decay=0.1, backbone_lr=0.5))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    named = dict(model.named_parameters())
    assert id(named["student.blocks.0.attn.qkv.weight"]) in decayed
    for name in (
        "blocks.0.norm1.weight",
        "blocks.0.mlp.fc1.bias",
        "patch_generator.pos_embed",
        "patch_generator.token",
    ):
        assert id(named[f"student.{name}"]) not in decayed
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    rate = set_learning_rate(optimizer, 0, recipe.Train(steps=1, lr=0.2, backbone_lr=0.5))
    assert rate == 0.2
    assert all(group["lr"] == pytest.approx(0.1) for group in optimizer.param_groups)


def test_head_steps_freeze_the_student_then_warm_it_up(data: Path, tmp_path: Path) -> None:
    config = recipe.Train(steps=100, backbone_lr=0.5, head_steps=10, warmup_steps=4)
    shares = [student_factor(step, config) for step in (0, 9, 10, 11, 13, 50)]
    assert shares == pytest.approx([0, 0, 0.125, 0.25, 0.5, 0.5])
    loop.train_model(tiny(data, "train.steps=3", "train.head_steps=3", "train.ema=0"), tmp_path / "run", quiet=True)
    initial, trained = (Model.load(tmp_path / "run" / name).state_dict() for name in ("initial", "model"))
    for name, value in initial.items():
        assert torch.equal(value, trained[name]) == name.startswith(("student.", "conditioner.")), name


def test_ema_is_the_documented_weighted_mean() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema, expected = Ema(model, 0.9), 0.0
    for step in range(50):
        torch.nn.init.constant_(model.weight, float(step))
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.model.weight) == pytest.approx(expected, rel=1e-5)
    assert not ema.model.weight.requires_grad


def test_interrupt_during_the_last_save_keeps_the_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.export

    def interrupting(run, progress):
        os.kill(os.getpid(), signal.SIGINT)
        return real(run, progress)

    monkeypatch.setattr(loop, "export", interrupting)
    with pytest.raises(KeyboardInterrupt):
        loop.train_model(tiny(data, "train.steps=1"), tmp_path / "run", quiet=True)
    assert Model.load(tmp_path / "run" / "model")


def test_progress_line_begins_with_step_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with loop.Progress(tmp_path, 300) as progress:
        progress.show(300, {"lite2/summary": 0.5, "hog/spatial": 0.25}, 41.7, 75)
    line = capsys.readouterr().err.strip()
    assert line == "step 300/300  1:15 left  42 images/s  lite2/summary 0.500  hog/spatial 0.250"
    assert line.index("images/s") < 80


def test_full_disk_raises_and_keeps_earlier_checkpoints(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = artefact.save_file

    def full(tensors, path, metadata=None):
        if "step_00000006" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return real(tensors, path, metadata=metadata)

    monkeypatch.setattr(artefact, "save_file", full)
    with pytest.raises(StorageError, match=r"No space left.*free some space"):
        loop.train_model(tiny(data), tmp_path / "run", quiet=True)
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]
    monkeypatch.setattr(artefact, "save_file", real)
    loop.train_model(tiny(data), tmp_path / "run", resume=True, quiet=True)
    assert trace(tmp_path / "run")[-1]["step"] == 6
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
