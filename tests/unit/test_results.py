"""Results on disk, what identifies them, tables of them, and the comparison of two models."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from agglo.config import build
from agglo.results import comparing, content, identity, tables
from agglo.results.records import FILE, PerImage, Result, ResultError, append, read, read_images
from agglo.types import ConfigError, StorageError
from support.models import Squares


def result(name: str = "knn", top1: float = 0.5, **changes) -> Result:
    made = Result(
        name=name,
        kind="knn",
        model={"name": "one", "hash": "aaaa"},
        settings={"kind": "knn", "k": 20, "size": 128},
        protocol="p20",
        data={"train": {"images": 2, "hash": "d1"}, "test": {"images": 2, "hash": "d2"}},
        metrics={"top1": top1},
        view=(128, 128),
        versions={"agglo": "1"},
    )
    return replace(made, **changes)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_result_reads_back_unchanged(tmp_path: Path) -> None:
    first = result(lower_is_better=("rmse",), notes=("skipped one",), seconds=1.5, protocol_name="nvidia")
    images = PerImage({"top1": {"a": 1.0, "b": 0.0}}, {"top1": {"cat": 0.5}})
    append(tmp_path, first, images)
    append(tmp_path, result("linear", protocol="q"))
    found = read(tmp_path)
    assert found == [first, result("linear", protocol="q")] == read(tmp_path / FILE)
    assert read_images(tmp_path, found[0]) == images
    assert read_images(tmp_path, found[1]) is None


def test_newest_result_of_an_id_counts(tmp_path: Path) -> None:
    append(tmp_path, result(top1=0.1))
    append(tmp_path, result("other", protocol="q"))
    append(tmp_path, result(top1=0.2))
    assert [(r.name, r.metrics["top1"]) for r in read(tmp_path)] == [("other", 0.5), ("knn", 0.2)]


def test_damaged_line_is_left_out_alone(tmp_path: Path) -> None:
    append(tmp_path, result())
    whole = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(whole + whole[:70])
    append(tmp_path, result("linear", protocol="q"))
    with pytest.warns(UserWarning, match="1 damaged line left out"):
        assert [r.name for r in read(tmp_path)] == ["knn", "linear"]


def test_nan_is_not_a_result(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="metric top1 is not finite; result not stored"):
        append(tmp_path, result(top1=float("nan")))
    assert not (tmp_path / FILE).exists()


def test_other_formats_are_refused_with_the_next_step(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / FILE).write_text(json.dumps({"name": "knn", "metrics": {"top1": 0.5}}) + "\n")
    with pytest.raises(ResultError, match=r"line 1 is not a result of format 2.*measure again: `agglo eval"):
        read(old)
    (old / FILE).write_text(json.dumps({"format": 3}) + "\n")
    with pytest.raises(ResultError, match="pip install --upgrade agglo"):
        read(old)
    (old / FILE).unlink()
    (old / "evals.json").write_text('{"models": {}}')
    with pytest.raises(ResultError, match=rf"older version \(evals.json\): measure it again with `agglo eval {old}`"):
        read(old)
    with pytest.raises(
        ResultError, match=r"one JSON document, a results file one per line: .* `agglo eval MODEL --out"
    ):
        read(old / "evals.json")
    with pytest.raises(ResultError, match="agglo eval MODEL"):
        read(tmp_path / "nowhere")
    (old / "evals.json").unlink()
    with pytest.raises(ResultError, match=r"holds no results\.jsonl"):
        read(old)
    (old / FILE).write_text(json.dumps({"format": 2, "name": "knn"}) + "\n")
    with pytest.raises(ResultError, match="is not a result "):
        read(old)


def test_damaged_file_of_images_is_named(tmp_path: Path) -> None:
    made = result()
    append(tmp_path, made, PerImage({"top1": {"a": 1.0}}))
    file = next((tmp_path / "images").iterdir())
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ResultError, match=r"damaged.*--again"):
        read_images(tmp_path, made)


def _many(folder: Path, name: str) -> None:
    for number in range(25):
        append(folder, result(name, protocol=f"{name}{number}"))


def test_two_processes_append_concurrently(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_many, args=(tmp_path, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(r.protocol for r in read(tmp_path)) == sorted(f"{n}{i}" for n in "ab" for i in range(25))


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_protocol_hash_depends_on_settings_and_not_on_paths() -> None:
    def protocol(**keys) -> str:
        return identity.protocol_hash(identity.settings({"kind": "knn", **keys}))

    base = protocol()
    assert protocol(k=20, temperature=0.07) == base  # explicit or not
    assert protocol(name="other") == base
    train = {"kind": "folder", "path": "/a", "min_side": 3}
    changed = [protocol(k=10), protocol(size=224), protocol(vote="majority"), protocol(train=train)]
    assert len({base, *changed}) == 5
    assert protocol(train={**train, "path": "/b"}) == protocol(train=train)
    assert protocol(train={**train, "min_side": 4}) != protocol(train=train)


def test_protocol_hash_depends_on_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    from agglo.evals.knn import Knn

    complete = identity.settings({"kind": "knn"})
    before = identity.protocol_hash(complete)
    monkeypatch.setattr(Knn, "revision", 2, raising=False)
    assert identity.protocol_hash(complete) != before
    assert identity.protocol_hash(complete, teachers={"a": "1"}) != identity.protocol_hash(complete)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        identity.settings({"kind": "knn", "sise": 3})
    with pytest.raises(ConfigError, match="did you mean 'split'"):
        identity.settings({"kind": "knn", "train": {"kind": "scenes", "splt": "test"}})


def test_data_hash_depends_on_names_labels_and_content(tmp_path: Path) -> None:
    from support import datasets as tiny

    def hashed(root: Path) -> str:
        return identity.data_hash(build("sources", {"kind": "folder", "path": str(root)}))

    for root in ("one", "two"):
        for i in range(3):
            tiny.picture(tmp_path / root / "cat" / f"{i}.png", i)
    base = hashed(tmp_path / "one")
    assert hashed(tmp_path / "two") == base  # the path is not hashed
    tiny.picture(tmp_path / "two" / "cat" / "1.png", 9)
    content = hashed(tmp_path / "two")
    (tmp_path / "one" / "cat").rename(tmp_path / "one" / "dog")
    label = hashed(tmp_path / "one")
    tiny.picture(tmp_path / "two" / "cat" / "4.png", 9)
    assert len({base, content, label, hashed(tmp_path / "two")}) == 4


TRUTHS = {
    "ade20k": ("annotations/validation/*.png", ""),
    "camvid": ("valannot/*.png", ""),
    "voc": ("SegmentationClass/2007_03.png", ""),
    "nyu": ("test/*_depth.png", ""),
    "navi": ("depth/000.png", ""),
    "navi#cameras": ("annotations.json", "500.0]"),
    "spair": ("*:cat.json", "[3, 4]"),
    "coco": ("instances_*.json", "[6, 6,"),
    "coco#captions": ("captions_*.json", "A dog"),
}
"""Kind → a ground-truth file, and a word in it to replace."""


@pytest.mark.parametrize("kind", TRUTHS)
def test_data_hash_depends_on_the_ground_truth(kind: str, tmp_path: Path) -> None:
    from support import datasets as tiny

    maker, (pattern, words) = kind.partition("#")[0], TRUTHS[kind]
    hashes = []
    for root in ("one", "two", "three"):
        (tmp_path / root).mkdir()
        keys = tiny.MAKERS[maker](tmp_path / root)
        if root == "three":
            file = next(f for f in sorted((tmp_path / root).rglob("*.*")) if f.match(pattern))
            if words:
                file.write_text(file.read_text().replace(words, words.translate(str.maketrans("346ad5", "455oe6"))))
            else:
                tiny.grey(file, np.array(Image.open(file))[::-1] // 2)
        hashes.append(identity.data_hash(build("sources", {"kind": maker, **keys})))
    assert hashes[0] == hashes[1] != hashes[2]  # another place and other times are the same data


def test_large_annotations_are_hashed_by_size_time_and_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Masks(Squares):
        def annotation_files(self, index: int) -> tuple[Path, ...]:
            return (tmp_path / f"{index}",)

    for i in range(100):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 10)
    base = identity.data_hash(Masks(100))
    os.utime(tmp_path / "1", (1, 1))
    assert identity.data_hash(Masks(100)) == base  # small: times do not count
    (tmp_path / "1").write_bytes(b"other text")
    assert identity.data_hash(Masks(100)) != base
    monkeypatch.setattr(content, "CHEAP_BYTES", 0)
    base = identity.data_hash(Masks(100))
    os.utime(tmp_path / "2", (5, 5))
    assert identity.data_hash(Masks(100)) != base  # the time, although it is not one of the sample
    base, kept = identity.data_hash(Masks(100)), os.stat(tmp_path / "0")
    (tmp_path / "0").write_bytes(b"other text")
    os.utime(tmp_path / "0", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert identity.data_hash(Masks(100)) != base  # one of the sample: its content


@pytest.mark.parametrize("index", [0, 1, 17, 39])
def test_data_hash_covers_every_image_of_a_small_folder(index: int, tmp_path: Path) -> None:
    from support import datasets as tiny

    for i in range(40):
        tiny.picture(tmp_path / f"{i:02d}.png", i)
    base = identity.data_hash(build("sources", {"kind": "folder", "path": str(tmp_path)}))
    tiny.picture(tmp_path / f"{index:02d}.png", 99)
    assert identity.data_hash(build("sources", {"kind": "folder", "path": str(tmp_path)})) != base


def test_data_hash_of_a_large_folder_covers_sizes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import datasets as tiny

    def hashed() -> str:
        return identity.data_hash(build("sources", {"kind": "folder", "path": str(tmp_path)}))

    for i in range(40):
        tiny.picture(tmp_path / f"{i:02d}.png", i)
        os.utime(tmp_path / f"{i:02d}.png", (1000, 1000))
    monkeypatch.setattr(content, "CHEAP_BYTES", 0)
    base = hashed()
    assert hashed() == base
    os.utime(tmp_path / "17.png", (1000, 1001))
    assert hashed() != base


def test_sources_name_the_files_that_hold_their_data(tmp_path: Path) -> None:
    from support import datasets as tiny

    for kind in ("cifar", "coco", "nyu"):
        (tmp_path / kind).mkdir()
        found = build("sources", {"kind": kind, **tiny.MAKERS[kind](tmp_path / kind)}).data_files()
        assert found and all(file.is_file() for file in found), kind


class Loose(Squares):
    """Images without files; the pixels of image ``odd`` are replaced. The data lie in ``archive``."""

    odd = -1
    archive: Path | None = None

    def read(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8), "red" if index == self.odd else "blue")

    def data_files(self) -> list[Path]:
        return [] if self.archive is None else [self.archive]


def test_data_hash_covers_every_image_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(odd: int, archive: Path | None = None) -> str:
        source = Loose(100)
        source.odd, source.archive = odd, archive
        return identity.images_hash(source)

    assert len({hashed(odd) for odd in (-1, 1, 50, 99)}) == 4
    monkeypatch.setattr(identity, "CHEAP_PIXELS", 1000)
    archive = tmp_path / "all.tar"
    archive.write_bytes(b"one")
    base = hashed(-1, archive)
    assert hashed(1, archive) == base != hashed(0, archive)  # a large set: a sample of the images, and the archive
    archive.write_bytes(b"two")
    assert hashed(-1, archive) != base


def test_data_hash_covers_every_small_annotation(monkeypatch: pytest.MonkeyPatch) -> None:
    from agglo.results import truth

    class Annotated(Squares):
        odd = -1

        def annotation(self, index: int) -> object:
            found = super().annotation(index)
            found.K = np.eye(3) * (2 if index == self.odd else 1)
            return found

    def hashed(odd: int) -> str | None:
        source = Annotated(100)
        source.odd = odd
        return truth.truth_hash(source)

    assert len({hashed(odd) for odd in (-1, 1, 2, 99)}) == 4
    monkeypatch.setattr(truth, "CHEAP_ARRAYS", 1000)
    assert hashed(-1) == hashed(2) != hashed(0)


def test_data_hash_depends_on_annotations_pairs_and_queries() -> None:
    from types import SimpleNamespace

    class Annotated(Squares):
        def __init__(self, **changes: object) -> None:
            super().__init__()
            self.changes = changes

        def annotation(self, index: int) -> SimpleNamespace:
            found = super().annotation(index)
            found.K = np.eye(3) * float(self.changes.get("focal", 1.0))  # type: ignore[arg-type]
            found.objects = ({"box": (1, 2, 3, self.changes.get("edge", 4))}, None, "word")
            return found

        def pairs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(first=0, second=1, points=np.full((1, 2, 2), self.changes.get("point", 3)))]

        def query(self, index: int) -> str | None:
            return self.changes.get("query") if index == 8 else super().query(index)  # type: ignore[return-value]

    assert identity.data_hash(Annotated()) == identity.data_hash(Annotated())
    changed = [Annotated(), Annotated(focal=2.0), Annotated(edge=5), Annotated(point=4), Annotated(query="a blue one")]
    assert len({identity.data_hash(each) for each in changed}) == 5
    assert len({identity.images_hash(each) for each in changed}) == 1


def test_model_hash_depends_on_every_weight_and_setting() -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    base = identity.model_hash(one)
    assert identity.model_hash(two) == base == identity.model_hash(one.eval())
    with torch.no_grad():
        two.weight[0, 0] += 1e-6
    assert identity.model_hash(two) != base
    assert identity.model_hash(one.half()) != base
    hogs = [build("teachers", {"kind": "hog", "cell": cell}) for cell in (8, 16)]
    assert identity.model_hash(hogs[0]) != identity.model_hash(hogs[1])


def test_model_hash_depends_on_the_files_beside_the_weights(tmp_path: Path) -> None:
    """Another mean, or another activation, in the folder of a teacher gives other features of the same weights."""
    teacher, options = build("teachers", {"kind": "hog", "cell": 8}), {"model": str(tmp_path)}
    hashes = [identity.model_hash(teacher)]
    teacher.processor = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 64}
    hashes.append(identity.model_hash(teacher))
    teacher.processor = {"mean": [0.1, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 64}
    hashes += [identity.model_hash(teacher), identity.model_hash(teacher, options)]
    for activation in ("gelu", "relu"):
        (tmp_path / "config.json").write_text(json.dumps({"hidden_act": activation}))
        hashes.append(identity.model_hash(teacher, options))
    assert len(set(hashes)) == len(hashes)
    assert identity.model_hash(teacher, options) == hashes[-1]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_other_settings_or_data_have_their_own_column() -> None:
    other = {"name": "two", "hash": "bbbb"}
    same = tables.columns([result(top1=0.4), result(top1=0.6, model=other)])
    assert [(c.title, c.values) for c in same] == [("knn top1", {"one": 0.4, "two": 0.6})]
    assert tables.notes(same) == []
    apart = [result(), result(model=other, protocol="p10", settings={"kind": "knn", "k": 10, "size": 128})]
    columns = tables.columns(apart)
    assert [(c.title, list(c.values)) for c in columns] == [("knn top1 (a)", ["one"]), ("knn top1 (b)", ["two"])]
    assert tables.notes(columns) == ["knn: (a) and (b) do not compare: k: 20, 10"]
    data = [result(), result(model=other, data={"test": {"images": 2, "hash": "d9"}})]
    assert "other data" in tables.notes(tables.columns(data))[0]
    assert "do not compare" in tables.markdown(apart)


def test_markdown_prints_the_best_in_bold() -> None:
    models = [{"name": n, "hash": n} for n in ("one", "two", "three")]
    text = tables.markdown([result(top1=v, model=m) for v, m in zip((0.5, 0.70004, 0.70001), models, strict=True)])
    assert "| one | 0.500 |" in text
    assert "| two | **0.700** |" in text
    assert "| three | **0.700** |" in text
    lower = [result(top1=v, model=m, lower_is_better=("top1",)) for v, m in zip((0.5, 0.7), models, strict=False)]
    assert "| one | **0.500** |" in tables.markdown(lower)
    assert "knn top1 ↓" in tables.markdown(lower)
    assert "**" not in tables.markdown([result()])


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("robustness", ["top1_corrupted", "kept"]),  # not the clean top-1 that comes first
        ("rank", ["rank_me", "lidar"]),
        ("retrieval", ["mrr"]),
        ("elsewhere", ["top1"]),
    ],
)
def test_headline_metrics_of_each_kind(kind: str, shown: list[str]) -> None:
    names = ("top1", "top1_corrupted", "kept", "cosine", "rank_me", "rank_me_spatial", "lidar", "mrr")
    made = result(kind, metrics=dict.fromkeys(names, 0.5), kind=kind)
    assert [column.metric for column in tables.columns([made], headlines=True)] == shown
    assert all(f"{kind} {metric}" in tables.markdown([made]) for metric in shown)


def test_models_of_one_name_are_distinguished() -> None:
    pair = [result(), result(model={"name": "one", "hash": "bbbbbbbb"})]
    assert list(tables.labels(pair).values()) == ["one (aaaa)", "one (bbbbbb)"]
    assert len(tables.columns(pair)[0].values) == 2


def test_each_file_of_answers_has_its_own_row() -> None:
    given = [{"answers": "1a2b3c4d", "questions": "77"}, {"answers": "5e6f7a8b", "questions": "77"}]
    pair = [result("vlm", top1=v, inputs=i) for v, i in zip((0.9, 0.3), given, strict=True)]
    rows = {"one (answers 1a2b3c)": 0.9, "one (answers 5e6f7a)": 0.3}
    assert tables.columns(pair)[0].values == rows == tables.columns([*pair, pair[0]])[0].values
    assert "| one (answers 1a2b3c) | **0.900** |" in tables.markdown(pair)
    plain, other = result(protocol="p10"), result("vlm", inputs={"answers": "99"}, protocol="gqa")
    assert [tables.labels([*pair, plain, other])[r.id] for r in (*pair, plain, other)] == [*rows, "one", "one"]
    assert list(tables.labels(pair[:1]).values()) == ["one"]
    more = replace(pair[0], inputs={"answers": "1a2b3c4d"})
    assert list(tables.labels([pair[0], more]).values()) == ["one (questions 77)", "one"]


def test_curves_join_results_that_differ_in_size_only() -> None:
    def at(size: int, **changes) -> Result:
        settings = {"kind": "knn", "k": 20, "size": size} | changes
        return result(f"knn@{size}", size / 1000, settings=settings, view=(size, size), protocol=f"p{size}{changes}")

    found = tables.curves([at(224), at(128), at(448, k=10)])
    assert list(found.values()) == [{"one": [(128, 0.128), (224, 0.224)]}]
    whole = [
        result(f"knn@{size}", 0.1, settings={"aspect": "keep", "size": size}, view=None, protocol=f"k{size}")
        for size in (64, [32, 48], "preferred", None)
    ]
    assert list(tables.curves(whole).values()) == [{"one": [(48, 0.1), (64, 0.1)]}]


# --- comparing --------------------------------------------------------------------------------------------------------


def test_interval_matches_the_standard_error() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(0.5, 0.2, 400)
    b = a + rng.normal(0.02, 0.1, 400)
    found = comparing.bootstrap("x", a, b)
    error = (b - a).std() / 20
    assert found.difference == pytest.approx((b - a).mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (found.low + found.high) / 2 == pytest.approx(found.difference, abs=error / 10)
    assert found == comparing.bootstrap("x", a, b)
    assert found.low != comparing.bootstrap("x", a, b, seed=1).low


def test_interval_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(200):
        a = rng.random(60) < 0.5
        b = rng.random(60) < 0.6
        one = comparing.bootstrap("x", a.astype(float), b.astype(float), seed=trial, draws=500)
        inside += one.low <= 0.1 <= one.high
    assert 0.88 <= inside / 200 <= 0.99


def test_identical_models_have_no_difference() -> None:
    a = np.random.default_rng(0).random(50)
    found = comparing.bootstrap("x", a, a)
    assert (found.difference, found.low, found.high, found.better, found.sure) == (0, 0, 0, 0.5, False)


def test_pairing_cancels_the_spread_of_images() -> None:
    """The spread of the images cancels: that is what pairing is for."""
    hard = np.random.default_rng(0).random(200)
    found = comparing.bootstrap("x", hard, hard + 0.01)
    assert found.sure
    assert found.low == pytest.approx(0.01)


def test_changed_images_and_classes_are_sorted_by_change() -> None:
    one = PerImage({"top1": {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.2}}, {"top1": {"cat": 0.5, "dog": 0.5, "cow": 1.0}})
    two = PerImage({"top1": {"a": 1.0, "b": 1.0, "c": 0.0, "e": 0.3}}, {"top1": {"cat": 0.4, "dog": 1.0}})
    found = comparing.compare(result(), result(top1=0.6), one, two)
    assert found.changed["top1"] == [("b", 0.0, 1.0), ("c", 1.0, 0.0)]
    assert found.classes["top1"] == [("dog", 0.5, 1.0), ("cat", 0.5, 0.4)]
    assert found.metrics == {"top1": (0.5, 0.6)}
    assert found.intervals[0].images == 3
    assert "2 images have a value for one model only" in found.notes[0]
    assert comparing.compare(result(), result(), one, None).notes == ("no values per image are recorded",)


def test_different_measurements_are_not_compared() -> None:
    other = result(protocol="p10", settings={"kind": "knn", "k": 10, "size": 128})
    found = comparing.compare(result(), other, PerImage(), PerImage())
    assert found.why == "k: 20, 10"
    assert not found.metrics
    moved = result(data={"test": {"images": 2, "hash": "d9"}})
    assert "other data" in comparing.compare(result(), moved, None, None).why
    with pytest.raises(ResultError, match="same images"):
        comparing.bootstrap("x", np.zeros(2), np.zeros(3))


@pytest.mark.parametrize("room", [0, 10])
def test_full_disk_keeps_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    append(tmp_path, result())
    before = (tmp_path / FILE).read_bytes()

    def write(handle: int, content: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(handle, content[:room])  # what a disk that fills up in the middle does

    whole = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(StorageError, match=r"of linear cannot be written to .*No space left.*free some space"):
            append(tmp_path, result("linear", protocol="q"))
    assert (tmp_path / FILE).read_bytes() == before
    append(tmp_path, result("linear", protocol="q"))
    assert [each.name for each in read(tmp_path)] == ["knn", "linear"]
