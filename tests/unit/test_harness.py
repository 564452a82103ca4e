"""Suites and protocols: run, resumed, with shared features, with any number of workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agglo.config import build, find, kinds
from agglo.evals._features import encode, layered
from agglo.evals.base import Eval, EvalContext, FeatureStore, SourcePool
from agglo.evals.knn import Knn
from agglo.harness.measuring import FEATURES, measure
from agglo.harness.protocols import plan, protocol, protocols, resolved, suite, suites
from agglo.harness.running import evaluate
from agglo.report.page import write_results
from agglo.results.identity import settings
from agglo.results.records import read, read_images
from agglo.teachers.toy import Toy
from agglo.types import ConfigError, Features, MissingExtraError
from support import datasets as tiny
from support.models import Noise

pytestmark = pytest.mark.evals


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes, eight images; a mask of camvid's beside each."""
    root = tmp_path / "camvid"
    for split in ("train", "val", "test"):
        for i in range(4):
            tiny.picture(root / split / f"{i}.png", i)
            tiny.grey(root / f"{split}annot" / f"{i}.png", tiny.stripes(12))
    for i in range(8):
        tiny.picture(tmp_path / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    return tmp_path


def pets(images: Path, **keys: Any) -> dict[str, Any]:
    source = {"kind": "folder", "path": str(images / "pets")}
    return {"kind": "knn", "name": "knn", "k": 3, "size": 16, "train": source, "test": source, **keys}


def linear(images: Path) -> dict[str, Any]:
    source = {"kind": "folder", "path": str(images / "pets")}
    return {"kind": "linear", "name": "linear", "size": 16, "train": source, "val": source, "test": source, "steps": 5}


# --- what is run ------------------------------------------------------------------------------------------------------


def test_suite_resumes_without_measuring_twice(images: Path) -> None:
    model, folder, ran = Noise(), images / "out", []
    first = measure(model, "noise", [pets(images)], folder, done=lambda outcome: ran.append(outcome.name))
    assert ran == ["knn"]
    calls = model.calls
    both = [pets(images), linear(images)]
    second = measure(model, "noise", both, folder, done=lambda outcome: ran.append(outcome.name))
    assert ran == ["knn", "linear"]
    assert second.known == ["knn"]
    assert second.results["knn"] == first.results["knn"]
    assert model.calls == calls  # the images of linear are those of knn, encoded by the earlier call
    assert list(second.results) == ["knn", "linear"]
    again = measure(model, "noise", both, folder, again=True)
    assert again.known == []
    assert [r.name for r in read(folder)] == ["knn", "linear"]
    assert {n: r.metrics for n, r in again.results.items()} == {n: r.metrics for n, r in second.results.items()}


def test_interruption_keeps_finished_results(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> dict[str, float]:
        raise KeyboardInterrupt

    entries = [pets(images), linear(images)]
    with monkeypatch.context() as patch:
        patch.setattr(find("evals", "linear"), "run", stop)
        with pytest.raises(KeyboardInterrupt):
            measure(Noise(), "noise", entries, images / "out")
    assert [r.name for r in read(images / "out")] == ["knn"]
    model = Noise()
    found = measure(model, "noise", entries, images / "out")
    assert found.known == ["knn"]
    assert list(found.results) == ["knn", "linear"]
    assert model.calls == 0


def test_changed_setting_model_or_image_is_measured_again(images: Path) -> None:
    class Other(Noise):
        pass

    folder = images / "out"
    measure(Noise(), "noise", [pets(images)], folder)
    assert measure(Noise(), "noise", [pets(images, k=1)], folder).known == []
    assert measure(Other(), "other", [pets(images)], folder).known == []
    assert measure(Noise(), "noise", [pets(images)], folder).known == ["knn"]
    tiny.picture(images / "pets" / "cat" / "1.png", 77)
    assert measure(Noise(), "noise", [pets(images)], folder).known == []
    assert len(read(folder)) == 4


def test_changed_masks_change_the_data_hash_but_reuse_features(images: Path) -> None:
    camvid = {"kind": "camvid", "path": str(images / "camvid"), "split": "train"}
    masks = {"kind": "segmentation", "name": "seg", "size": 16, "train": camvid, "val": camvid, "test": camvid}
    model, folder = Noise(), images / "out"
    first = measure(model, "noise", [masks], folder)
    calls = model.calls
    assert measure(model, "noise", [masks], folder).known == ["seg"]
    for i in range(4):
        tiny.grey(images / "camvid" / "trainannot" / f"{i}.png", np.full_like(tiny.stripes(12), i))
    second = measure(model, "noise", [masks], folder)
    assert second.known == []
    assert second.results["seg"].column != first.results["seg"].column
    assert model.calls == calls


def test_result_records_settings_data_and_versions(images: Path) -> None:
    found = measure(Noise(), "noise", [pets(images)], images / "out", published="nvidia").results["knn"]
    assert found.settings["temperature"] == 0.07
    assert found.settings["train"]["recursive"] is True
    assert str(images) not in json.dumps(found.settings)
    assert found.data["test"]["images"] == 8
    assert found.data["test"]["source"]["path"] == str(images / "pets")
    assert found.view == (16, 16)
    assert (found.model["name"], found.model["summary"]) == ("noise", 8)
    assert {"torch", "agglo", "python"} <= set(found.versions)
    assert found.hardware["device"] == "cpu"
    assert found.protocol_name == "nvidia"
    known = read_images(images / "out", found)
    assert known is not None
    values = known.images["top1"]
    assert sum(values.values()) / len(values) == found.metrics["top1"]
    assert set(known.classes["top1"]) == {"cat", "dog"}


def test_view_is_none_for_whole_images_except_fixed_size_teachers(images: Path) -> None:
    """A teacher with a fixed input size encodes crops, and its result states the crop."""

    def run(model: Any, **keys: Any) -> Any:
        return measure(model, "toy", [pets(images, **keys)], images / type(model).__name__).results["knn"]

    class Fixed(Toy):
        canvas = 32

    free, fixed = run(Toy(), aspect="keep"), run(Fixed(), aspect="keep")
    assert free.column == fixed.column
    assert (free.view, free.notes) == (None, ())
    assert (fixed.view, len(fixed.notes)) == ((32, 32), 1) and "aspect: keep had no effect" in fixed.notes[0]
    assert run(Toy()).view == (16, 16)
    (note,) = run(Toy(), aspect="keep", size="preferred").notes
    assert note == "whole images, scaled to cover 224 px, the preferred size"
    page, _ = write_results([images / "Toy", images / "Fixed"], images / "page.html")
    assert "aspect: keep had no effect" in page.read_text()


def test_failed_eval_has_no_result_and_others_run(images: Path) -> None:
    class Nan(Noise):
        def forward(self, images: Tensor) -> Features:
            out = super().forward(images)
            assert out.spatial is not None
            return Features(out.summary, out.spatial * float("nan"))

    gone = {"kind": "folder", "path": str(images / "nowhere")}
    camvid = {"kind": "camvid", "path": str(images / "camvid"), "split": "train"}
    masks = {"kind": "segmentation", "name": "seg", "size": 16, "train": camvid, "val": camvid, "test": camvid}
    entries = [pets(images, name="gone", train=gone), masks, {"kind": "zero_shot", "name": "words"}, pets(images)]
    found = measure(Noise(), "noise", entries, images / "out")
    assert list(found.results) == ["seg", "knn"]
    assert "nowhere' does not exist" in found.failed["gone"]
    assert "no encode_text" in found.skipped["words"]
    broken = measure(Nan(), "nan", [masks], images / "other")
    assert "contain NaN" in broken.failed["seg"]
    assert "camvid/train/0.png" in broken.failed["seg"]
    assert not (images / "other" / "results.jsonl").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), OSError("no room"), MemoryError("no room")])
def test_memory_and_disk_errors_fail_one_eval_only(
    images: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def full(*arguments: object) -> dict[str, float]:
        raise error

    monkeypatch.setattr(find("evals", "linear"), "run", full)
    found = measure(Noise(), "noise", [linear(images), pets(images)], images / "out")
    assert list(found.results) == ["knn"]
    assert found.failed == {"linear": f"{type(error).__name__}: no room"}


def test_failed_cpu_allocation_fails_one_eval_only(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain RuntimeError in torch."""
    with monkeypatch.context() as patch:
        patch.setattr(find("evals", "linear"), "run", lambda *_: {"x": float(torch.empty(10**15)[0])})
        found = measure(Noise(), "noise", [linear(images), pets(images)], images / "out")
    assert list(found.results) == ["knn"]
    assert "memory" in found.failed["linear"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        KeyError("bbox"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_error_fails_one_eval_only(images: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(*arguments: object) -> dict[str, float]:
        raise error

    monkeypatch.setattr(find("evals", "linear"), "run", run)
    found = measure(Noise(), "noise", [linear(images), pets(images)], images / "out")
    assert list(found.results) == ["knn"]
    assert found.failed["linear"].startswith(type(error).__name__)
    with pytest.warns(UserWarning, match="linear failed"):
        numbers = evaluate(Noise(), [linear(images), pets(images)])
    assert set(numbers) == {"knn", "failed"} and "linear" in numbers["failed"]
    with pytest.raises(type(error)):
        evaluate(Noise(), [linear(images)])
    monkeypatch.setenv("AGGLO_TRACEBACK", "1")
    with pytest.raises(type(error)):
        measure(Noise(), "noise", [linear(images)], images / "out")


def test_damaged_data_fails_one_eval_only(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agglo.sources.camvid import Camvid

    def broken(*arguments: object) -> object:
        raise KeyError("image_id")

    monkeypatch.setattr(Camvid, "annotation_files", broken)
    camvid = {"kind": "camvid", "path": str(images / "camvid"), "split": "train"}
    masks = {"kind": "segmentation", "name": "seg", "size": 16, "train": camvid, "val": camvid, "test": camvid}
    found = measure(Noise(), "noise", [masks, pets(images)], images / "out")
    assert list(found.results) == ["knn"]
    assert found.failed == {"seg": "KeyError: 'image_id'"}


def test_sizes_that_the_model_does_not_take_are_one_row(images: Path) -> None:
    entry = {**pets(images)}
    swept = [{**entry, "size": size, "name": f"knn@{size}", "swept": True} for size in (16, 17, 31, 48)]
    model = Noise()
    found = measure(model, "noise", swept, images / "out")
    assert list(found.results) == ["knn@16", "knn@32", "knn@48"]
    assert [result.view for result in found.results.values()] == [(16, 16), (32, 32), (48, 48)]
    assert found.notes == [
        "knn@17 is knn@16: the model takes 16 px instead of 17",
        "knn@31 is knn@32: the model takes 32 px instead of 31",
    ]
    assert len(read(images / "out")) == 3
    assert measure(model, "noise", swept, images / "out").known == ["knn@16", "knn@32", "knn@48"]
    assert list(evaluate(model, swept)) == ["knn@16", "knn@32", "knn@48"]


def test_plan_of_equal_sizes_names_each_once() -> None:
    assert [entry["name"] for entry in plan("knn", sizes=[128, 128, 160])] == ["knn@128", "knn@160"]


def test_missing_package_fails_one_eval_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, extra: str) -> object:
        raise MissingExtraError(f'{name} is not installed: pip install "agglo[{extra}]"')

    for room in ("evals.zero_shot", "sources.imagenet"):
        monkeypatch.setattr(f"agglo.{room}.require", absent)
    tiny.imagenet(tmp_path / "imagenet")
    entries = plan("imagenet-zero-shot,imagenet-knn", published="nvidia", data=tmp_path)
    found = measure(Noise(), "noise", entries, tmp_path / "out")
    assert list(found.results) == ["imagenet-knn"]
    assert "pip install" in found.failed["imagenet-zero-shot"]


def test_wrong_keys_are_refused_before_any_eval_runs(images: Path) -> None:
    model = Noise()
    with pytest.raises(ConfigError, match="did you mean 'k'"):
        measure(model, "noise", [pets(images), {"kind": "knn", "name": "b", "kk": 2}], images / "out")
    assert model.calls == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_numbers_do_not_depend_on_workers(images: Path, workers: int) -> None:
    entries = [pets(images), linear(images)]
    one = measure(Noise(), "noise", entries, images / "a", keep_features=False)
    two = measure(Noise(), "noise", entries, images / "b", keep_features=False, workers=workers)
    assert {n: r.metrics for n, r in one.results.items()} == {n: r.metrics for n, r in two.results.items()}
    options = [{k: v for k, v in entry.items() if k != "name"} for entry in entries]
    assert evaluate(Noise(), options, workers=workers) == evaluate(Noise(), options)
    assert not (images / "a" / FEATURES).exists()


def test_reading_ahead_keeps_order_and_warnings(images: Path) -> None:
    bad = images / "pets" / "cat" / "3.png"
    bad.write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"3\.png"):
        found = evaluate(Noise(), [{k: v for k, v in pets(images).items() if k != "name"}], workers=2)
    with pytest.warns(UserWarning, match=r"3\.png"):
        assert evaluate(Noise(), [{k: v for k, v in pets(images).items() if k != "name"}]) == found


def test_skipped_images_are_noted_in_the_result(images: Path) -> None:
    (images / "pets" / "cat" / "3.png").write_bytes(b"no image")
    found = measure(Noise(), "noise", [pets(images)], images / "out").results["knn"]
    assert any("3.png" in note for note in found.notes)


# --- features on disk -------------------------------------------------------------------------------------------------


def test_damaged_features_are_encoded_again(images: Path) -> None:
    model, folder = Noise(), images / "out"
    first = measure(model, "noise", [pets(images)], folder).results["knn"]
    calls = model.calls
    file = next((folder / FEATURES).rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    found = measure(model, "noise", [pets(images)], folder, again=True).results["knn"]
    assert found.metrics == first.metrics
    assert any("damaged" in note for note in found.notes)
    assert model.calls == 2 * calls
    assert measure(model, "noise", [pets(images)], folder, again=True).results["knn"].notes == ()
    assert model.calls == 2 * calls


def test_features_of_a_replaced_image_are_encoded_again(images: Path) -> None:
    """Even if its content is not in the data's hash: the key has its modification time."""
    import os

    model, folder = Noise(), images / "out"
    measure(model, "noise", [pets(images)], folder)
    calls = model.calls
    file = images / "pets" / "cat" / "1.png"
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
    measure(model, "noise", [pets(images)], folder, again=True)
    assert model.calls == 2 * calls


def test_unwritable_feature_folder_is_a_note(images: Path) -> None:
    (images / "out").mkdir()
    (images / "out" / FEATURES).write_text("in the way")
    found = measure(Noise(), "noise", [pets(images)], images / "out").results["knn"]
    assert any("cannot store features on disk" in note for note in found.notes)


def test_stored_maps_read_back_bit_for_bit(images: Path) -> None:
    model = Noise()
    source = {"kind": "folder", "path": str(images / "pets")}
    stores, found = [], []
    for _ in range(2):
        store = FeatureStore(images / "f", model, "hash", SourcePool())
        found.append(encode(model, source, 16, EvalContext(features=store), want="spatial"))
        stores.append((store.written, store.read))
    assert stores == [(1, 0), (0, 1)]
    assert found[0].spatial is not None and found[1].spatial is not None
    assert torch.equal(found[0].spatial, found[1].spatial)
    assert (found[0].names, found[0].index, found[0].sizes) == (found[1].names, found[1].index, found[1].sizes)


# --- suites and protocols ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suites())
def test_every_suite_has_valid_options(name: str) -> None:
    entries = plan(name)
    assert len({entry["name"] for entry in entries}) == len(entries) == len(suite(name))
    for entry in entries:
        settings({k: v for k, v in entry.items() if k != "name"})


def test_full_suite_contains_the_other_suites() -> None:
    full = {entry["kind"] for entry in suite("full")}
    assert {entry["kind"] for name in ("quick", "dense", "demo") for entry in suite(name)} <= full
    assert full <= set(kinds("evals", installed=False))


def test_every_published_protocol_can_be_built(tmp_path: Path) -> None:
    """Each of its evals can be built: every key exists and is legal."""
    assert set(protocols()) == {"nvidia", "siglino", "eupe", "probe3d"}
    for name in protocols():
        entries = plan("", published=name, data=tmp_path)
        assert entries
        assert protocol(name).differs
        for entry in entries:
            options = resolved(entry, Noise())
            made = build("evals", options)
            assert isinstance(made, Eval)
            complete = settings(options)
            for key in ("train", "val", "test", "source"):
                if key in complete and complete[key] is not None:
                    assert complete[key].get("path", "").startswith(str(tmp_path)), (name, entry["name"], key)


def test_protocols_have_the_settings_of_the_papers(tmp_path: Path) -> None:
    def of(name: str, which: str) -> dict[str, Any]:
        return next(e for e in plan("", published=name, data=tmp_path) if e["name"] == which)

    assert (of("nvidia", "imagenet-knn")["k"], of("nvidia", "imagenet-knn")["vote"]) == (20, "weighted")
    assert (of("eupe", "imagenet-knn")["k"], of("eupe", "imagenet-knn")["vote"]) == (10, "majority")
    assert (of("probe3d", "spair")["size"], of("eupe", "spair")["size"]) == (800, 512)
    assert (of("probe3d", "spair")["source"]["pairs"], of("eupe", "spair")["source"]["pairs"]) == (200, 100)
    assert of("siglino", "imagenet-knn")["size"] == 512
    assert of("nvidia", "ade20k")["steps"] == 80_000


def test_preferred_size_differs_by_model_under_one_protocol(images: Path) -> None:
    class Big(Noise):
        preferred_size = 32

    class Small(Noise):
        preferred_size = 16

    entry = pets(images, size="preferred")
    big, small = (measure(kind(), "x", [entry], images / "out").results["knn"] for kind in (Big, Small))
    assert (big.view, small.view) == ((32, 32), (16, 16))
    assert big.protocol == small.protocol
    assert big.settings["size"] == "preferred"


def test_missing_data_folder_names_the_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AGGLO_DATA", raising=False)
    with pytest.raises(ConfigError, match="--data DIR"):
        plan("", published="eupe")
    monkeypatch.setenv("AGGLO_DATA", str(tmp_path))
    assert plan("spair", published="eupe")[0]["source"]["path"] == str(tmp_path / "spair")
    found = measure(Noise(), "noise", plan("spair", published="eupe"), tmp_path / "out")
    assert "Get it from cvlab.postech.ac.kr" in found.failed["spair"]


def test_plan_applies_changes_by_name() -> None:
    assert plan("knn,depth", changes=["knn.k=5"])[0] == {"kind": "knn", "k": 5, "name": "knn"}
    assert [e["name"] for e in plan("knn", sizes=[64, 128])] == ["knn@64", "knn@128"]
    with pytest.raises(ConfigError, match="no eval of that name is selected; selected: knn"):
        plan("knn", changes=["dept.size=3"])
    with pytest.raises(ConfigError, match="did you mean 'knn'"):
        plan("kn")
    with pytest.raises(ConfigError, match="did you mean 'nvidia'"):
        plan("", published="nvida")
    with pytest.raises(ConfigError, match="did you mean 'spair'"):
        plan("spar", published="eupe", data="x")


def test_teachers_are_part_of_the_protocol_of_agreement(images: Path) -> None:
    entry = {"kind": "agreement", "name": "agreement", "sources": [{"kind": "folder", "path": str(images / "pets")}]}

    class Student(Noise):
        def forward(self, images: Tensor) -> Any:
            from agglo.types import Output

            out = Toy(summary=8)(images)
            return Output(out.summary, out.spatial, {"toy": out})

    one, two = (
        measure(Student(), "s", [entry], images / "out", teachers={"toy": Toy(summary=8, seed=seed)}) for seed in (0, 1)
    )
    assert one.results and two.results
    assert two.known == []
    assert one.results["agreement"].protocol != two.results["agreement"].protocol


def test_evals_of_a_suite_share_encoded_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Adding an eval to a suite costs its probe only: the images of a second one are not encoded again."""
    model = Noise()
    measure(model, "noise", plan("knn"), tmp_path)
    calls = model.calls
    found = measure(model, "noise", plan("knn,linear"), tmp_path / "two", again=True)
    val = len(build("sources", {"kind": "scenes", "split": "val"}))
    assert model.calls == 2 * calls + int(np.ceil(val / 32))
    assert not found.failed
    assert Knn.deterministic


def test_maps_of_several_blocks_are_stored_separately(images: Path) -> None:
    from agglo.model.model import Model

    model = Model({"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8}, {}, preferred_size=32).eval()
    source = {"kind": "folder", "path": str(images / "pets")}
    found = []
    for _ in range(2):
        store = FeatureStore(images / "f", model, "hash", SourcePool())
        seen, count = layered(model, 2)
        assert count == 2
        context = EvalContext(features=store)
        each = [encode(one, source, 32, context, want="spatial").spatial for one in (model, seen)]
        found.append((each, store.written, store.read))
    assert [(written, read) for _, written, read in found] == [(2, 0), (0, 2)]
    (plain, both), (plain_again, both_again) = found[0][0], found[1][0]
    assert plain is not None and both is not None and both.shape[1] == 2 * plain.shape[1]
    assert torch.equal(plain, plain_again) and torch.equal(both, both_again)
