"""Each eval on models that know everything, nothing, or are broken."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from agglo.evals._features import encode
from agglo.evals._labels import class_names
from agglo.evals.agreement import Agreement
from agglo.evals.base import Eval, EvalContext, FeatureError
from agglo.evals.depth import Depth
from agglo.evals.knn import Knn
from agglo.evals.linear import Linear
from agglo.evals.retrieval import Retrieval, first_right
from agglo.evals.segmentation import Segmentation
from agglo.evals.zero_shot import ZeroShot
from agglo.harness.running import evaluate
from agglo.preprocess import crop_box, crop_map, fit
from agglo.sources.folder import Folder
from agglo.sources.scenes import Scenes
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec, ImageError
from support import datasets as tiny
from support.models import COLOURS, Broken, Noise, Oracle, Squares, Student

pytestmark = pytest.mark.evals


def squares(kind: type[Eval], count: int = 12, **options: Any) -> Any:
    """An eval over the fake source, with one object per split."""
    names = {ZeroShot: ("source",), Retrieval: ("source",), Knn: ("train", "test")}.get(kind, ("train", "val", "test"))
    return kind(size=32, **{name: Squares(count, seed) for seed, name in enumerate(names)}, **options)


# --- metrics of a perfect model ---------------------------------------------------------------------------------------


def test_oracle_is_perfect() -> None:
    model = Oracle()
    assert squares(Knn, k=3).run(model) == {"top1": 1.0}
    assert squares(ZeroShot).run(model) == {"top1": 1.0, "top5": 1.0}
    assert squares(Segmentation, decay=[0.01]).run(model) == {"miou": 1.0, "pixel_accuracy": 1.0}
    depth = squares(Depth, ridge=[1e-6]).run(model)
    assert depth["delta1"] == 1
    assert depth["rmse"] < 1e-3
    assert depth["abs_rel"] < 1e-3
    assert squares(Retrieval).run(model) == {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0, "mrr": 1.0}


def test_noise_is_at_chance() -> None:
    model = Noise()
    top1 = Knn(k=5, size=32, train=Squares(300, 0), test=Squares(300, 1)).run(model)["top1"]
    assert abs(top1 - 1 / 3) < 4 * (2 / 9 / 300) ** 0.5
    found = squares(Segmentation, 30).run(model)
    truth = np.concatenate([Squares(30, 2).arrays(i)[1].ravel() for i in range(30)])
    background = (truth == 0).mean()
    # Nothing to see: the probe can do no better than call everything background.
    assert found["pixel_accuracy"] == pytest.approx(background, abs=0.02)
    assert found["miou"] == pytest.approx(background / 4, abs=0.02)
    mean_only = squares(Depth, 30, ridge=[1e9]).run(model)
    assert squares(Depth, 30).run(model)["rmse"] == pytest.approx(mean_only["rmse"], rel=0.05)


def test_depth_of_a_constant_model_is_the_geometric_mean() -> None:
    found = squares(Depth, 6, ridge=[1.0]).run(Broken(1.0, 0, spatial=True))  # all features are 1
    train, test = (np.stack([Squares(6, s).arrays(i)[2] for i in range(6)]).astype(np.float64) for s in (0, 2))
    guess = np.exp(np.log(train).mean())
    assert found["rmse"] == pytest.approx(np.sqrt(((test - guess) ** 2).mean()), rel=1e-5)
    assert found["abs_rel"] == pytest.approx((abs(test - guess) / test).mean(), rel=1e-5)
    assert found["delta1"] == pytest.approx((np.maximum(test / guess, guess / test) < 1.25).mean(), abs=1e-9)


@pytest.mark.parametrize("kind", [Knn, Segmentation, Depth])
def test_evals_are_deterministic(kind: type[Eval]) -> None:
    first, second = (squares(kind).run(Noise()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", [Knn, ZeroShot, Segmentation, Depth, Retrieval])
def test_lower_is_better_names_exist(kind: type[Eval]) -> None:
    assert squares(kind, 3).run(Oracle()).keys() >= kind.lower_is_better
    assert kind.needs_text == (kind in (ZeroShot, Retrieval))


# --- what a model lacks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ZeroShot, Retrieval])
def test_model_without_text_raises(kind: type[Eval]) -> None:
    model = Noise()
    with pytest.raises(TypeError, match=r"Noise has no encode_text: .*text-aligned teacher.*knn"):
        squares(kind).run(model)
    assert model.calls == 0  # raised before any image is encoded

    class Mute(Noise):
        def encode_text(self, texts: list[str]) -> Tensor:
            raise TypeError(f"no tower for {len(texts)} texts")

    with pytest.raises(TypeError, match=r"no tower for 1 texts; .*knn"):
        squares(kind).run(Mute())


@pytest.mark.parametrize("kind", [Segmentation, Depth])
def test_model_without_a_map_raises(kind: type[Eval]) -> None:
    with pytest.raises(TypeError, match="spatial features and this Noise has none"):
        squares(kind).run(Noise(spatial=False))


def test_without_a_summary_the_pooled_map_is_used() -> None:
    encoded = encode(Noise(summary=False), Squares(5), 32, EvalContext(), want="summary")
    assert encoded.summary is not None
    assert encoded.spatial is not None
    torch.testing.assert_close(encoded.summary, encoded.spatial.mean((2, 3)))
    assert 0 <= squares(Knn).run(Noise(summary=False))["top1"] <= 1


def test_a_text_aligned_teacher_needs_no_encode_image() -> None:
    class Aligned(Oracle):
        encode_image = None  # type: ignore[assignment]

    assert squares(ZeroShot).run(Aligned())["top1"] == 1


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_non_finite_features_name_the_image(value: float, word: str) -> None:
    with pytest.raises(FeatureError, match=rf"summary features of squares/0/4 contain {word}"):
        squares(Knn).run(Broken(value, 4))
    with pytest.raises(FeatureError, match=rf"spatial features of squares/0/7 contain {word}"):
        squares(Segmentation).run(Broken(value, 7, spatial=True))


def test_unreadable_images_are_skipped_and_named() -> None:
    with pytest.warns(UserWarning, match="squares/0/[18]: broken on purpose"):
        encoded = encode(Oracle(), Squares(9, bad=(1, 8)), 32, EvalContext(), want="summary")
    assert encoded.index == (0, 2, 3, 4, 5, 6, 7)
    assert encoded.skipped == ("squares/0/1", "squares/0/8")
    assert encoded.summary is not None
    assert len(encoded.summary) == 7
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ImageError, match="no image of this Squares could be read; 2 of 2 skipped"),
    ):
        encode(Oracle(), Squares(2, bad=(0, 1)), 32, EvalContext(), want="summary")


def test_skipped_image_drops_its_label() -> None:
    with pytest.warns(UserWarning, match="skipped"):
        found = Knn(k=1, size=32, train=Squares(12, bad=(0, 4)), test=Squares(12, 1, bad=(2,))).run(Oracle())
    assert found == {"top1": 1.0}


def test_module_modes_are_restored() -> None:
    model = Oracle().train()
    model.inner.eval()
    squares(Knn).run(model)
    assert model.training
    assert not model.inner.training
    model.inner.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    squares(Knn).run(model)
    assert model.modes
    assert not any(model.modes)  # nothing ran in training mode
    assert model.inner.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batches_do_not_change_features(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(Oracle(), Squares(10), 32, EvalContext(), want="spatial")
    monkeypatch.setattr("agglo.evals._features.BATCH", 3)
    parts = encode(Oracle(), Squares(10), 32, EvalContext(), want="spatial")
    assert whole.names == parts.names
    assert whole.spatial is not None
    assert parts.spatial is not None
    assert torch.equal(whole.spatial, parts.spatial)


class Tracked(Noise):
    """Counts how many of its earlier batches are still referenced."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(spatial=False)
        self.scale = scale
        self.alive: list[int] = []
        self._given: list[weakref.ref[np.ndarray]] = []

    def forward(self, images: Tensor) -> Features:
        self.alive.append(sum(ref() is not None for ref in self._given))
        summary = super().forward(images).summary
        assert summary is not None
        array = self.scale * summary.numpy()
        self._given.append(weakref.ref(array))
        return Features(torch.from_numpy(array), None)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_features_are_held_in_memory_once(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are written into one allocation instead of being collected and concatenated."""
    monkeypatch.setattr("agglo.evals._features.BATCH", 4)
    model = Tracked()
    with pytest.warns(UserWarning, match="squares/0/7"):
        found = encode(model, Squares(30, bad=(7,)), 16, EvalContext(), want="summary", precision=precision)
    assert len(model.alive) == 8
    assert max(model.alive) <= 1
    assert found.summary is not None
    assert (found.summary.dtype, found.summary.shape, len(found.names)) == (precision, (29, 8), 29)


def test_half_precision_rounds_cached_features() -> None:
    source = Squares(9)
    plain = encode(Tracked(), source, 16, EvalContext(), want="summary").summary
    assert plain is not None
    first = encode(Tracked(), source, 16, EvalContext(), want="summary", precision=torch.float16).summary
    context = EvalContext()
    model = Tracked()
    encode(model, source, 16, context, want="summary")
    second = encode(model, source, 16, context, want="summary", precision=torch.float16).summary
    third = encode(model, source, 16, context, want="summary").summary
    assert len(model.alive) == 1
    assert first is not None and second is not None and third is not None
    assert torch.equal(first, plain.half()) and torch.equal(second, first) and torch.equal(third, plain)
    with pytest.raises(FeatureError, match=r"squares/0/0 exceed 65504.*precision: float32"):
        Knn(k=1, size=16, precision="float16", train=source, test=source).run(Tracked(1e6))  # type: ignore[arg-type]


def test_neighbours_in_half_precision() -> None:
    def top1(precision: str) -> dict[str, float]:
        return Knn(k=3, size=16, precision=precision, train=Squares(30), test=Squares(30, 1)).run(Oracle())  # type: ignore[arg-type]

    assert top1("float16") == top1("float32") == {"top1": 1.0}
    with pytest.raises(ConfigError, match="float32 or float16"):
        top1("float8")


def test_large_maps_are_cached_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agglo.evals._features.KEEP_BYTES", 1000)
    model, source = Noise(), Squares(4)
    context = EvalContext()
    assert encode(model, source, 32, context, want="summary").spatial is None
    assert encode(model, source, 32, context, want="spatial").spatial is not None
    assert encode(model, source, 32, context, want="summary").spatial is not None
    assert model.calls == 2


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24)])
def test_truth_is_cropped_like_its_image(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 51), np.uint8)
    box = crop_box((37, 51), size)
    assert min(box) >= 0
    assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(size[1] / size[0], rel=0.05)
    truth = crop_map(pixels, size)
    image = Image.fromarray(np.repeat(pixels[..., None], 3, 2))
    exact = fit(image, (truth.shape[0], truth.shape[1]))
    assert torch.equal((exact[0] * 255).round().to(torch.uint8), truth)
    assert fit(image, size).shape == (3, *size)


def test_sizes_are_snapped_to_the_models_step() -> None:
    shapes = []

    class Watch(Noise):
        def forward(self, images: Tensor) -> Features:
            shapes.append(tuple(images.shape[-2:]))
            return super().forward(images)

    encode(Watch(), Squares(1), 30, EvalContext(), want="summary")
    encode(Watch(), Squares(1), (17, 41), EvalContext(), want="summary")
    assert shapes == [(32, 32), (16, 40)]
    with pytest.raises(ConfigError, match="size must be one number"):
        encode(Noise(), Squares(1), 0, EvalContext(), want="summary")


# --- labels and text --------------------------------------------------------------------------------------------------


def paint(folder: Path, name: str, colour: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), COLOURS[colour]).save(path)


def test_folders_are_classes(tmp_path: Path) -> None:
    for colour in COLOURS:
        for split in ("train", "test"):
            paint(tmp_path, f"{split}/{colour}/one.png", colour)
    paint(tmp_path, "test/purple/one.png", "red")  # a class that the training images lack: always wrong
    knn = Knn(
        k=1,
        size=20,
        train={"kind": "folder", "path": str(tmp_path / "train")},
        test={"kind": "folder", "path": str(tmp_path / "test")},
    )
    with pytest.warns(UserWarning, match=r"no training image \(purple\): 1 of 4 test images count as wrong"):
        found = knn.run(Oracle())
    assert found == {"top1": 0.75}
    source = {"kind": "folder", "path": str(tmp_path / "train")}
    assert ZeroShot(size=20, source=source).run(Oracle())["top1"] == 1
    with pytest.raises(ConfigError, match="labels images 'red', not in classes; did you mean 'reds'"):
        ZeroShot(size=20, source=source, classes=["reds", "green", "blue"]).run(Oracle())
    paint(tmp_path, "train/root.png", "red")
    with pytest.raises(ConfigError, match=r"train/root\.png has no class: .*sub-folder"):
        class_names(Folder(path=str(tmp_path / "train")), range(4))


def test_class_folders_without_images_are_named(tmp_path: Path) -> None:
    for colour in COLOURS:
        paint(tmp_path, f"{colour}/deep/one.png", colour)
    for name in ("cyan", "grey", "olive", "pink/inner", "red/other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cyan" / "notes.txt").write_text("no image")
    source = {"kind": "folder", "path": str(tmp_path)}
    made = (
        Knn(k=1, size=20, train=source, test=source),
        Linear(size=20, train=source, val=source, test=source, steps=2),
        ZeroShot(size=20, source=source),
    )
    for each in made:
        with pytest.warns(UserWarning, match=r"5 class folders of .* without an image \(cyan, grey, olive, \.\.\.\)"):
            each.run(Oracle())
    assert Folder(path=str(tmp_path)).empty_folders() == ["cyan", "grey", "olive", "pink", "red/other"]
    assert Folder(path=str(tmp_path / "red" / "deep")).empty_folders() == []
    assert Folder(path=str(tmp_path / "red" / "deep" / "one.png")).empty_folders() == []


def test_imagenet_labels_come_from_file_names(tmp_path: Path) -> None:
    paint(tmp_path, "n01440764_tench.png", "red")
    paint(tmp_path, "n07753592_banana.png", "green")
    source = {"kind": "folder", "path": str(tmp_path)}

    class Fish(Oracle):
        def encode_text(self, texts: list[str]) -> Tensor:
            found = torch.tensor([["tench" in text, "banana" in text, False] for text in texts]).float()
            return torch.nn.functional.normalize(found + 1e-3, dim=1)

    assert ZeroShot(size=20, source=source, classes="imagenet").run(Fish()) == {"top1": 1.0, "top5": 1.0}
    assert ZeroShot(size=20, source=source, classes="imagenet").run(Oracle())["top1"] < 1
    paint(tmp_path, "holiday.png", "blue")
    with pytest.raises(ConfigError, match=r"holiday\.png: no ImageNet-1k WordNet id; name files like"):
        ZeroShot(size=20, source=source, classes="imagenet").run(Fish())


def test_templates_are_averaged_and_renormalised() -> None:
    from agglo.evals.zero_shot import class_bank

    class Words:
        def encode_text(self, texts: list[str]) -> Tensor:
            return torch.tensor([[3.0, 0.0] if text.startswith("a ") else [0.0, float(len(text))] for text in texts])

    # Each template counts the same, whatever the length of its raw vectors.
    torch.testing.assert_close(class_bank(Words(), ["x_y"], ["a {}", "{}"]), torch.full((1, 2), 0.5**0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Knn(k=0), "k must be at least 1"),
        (lambda: Knn(temperature=0), "temperature must be positive"),
        (lambda: ZeroShot(templates=[]), "templates is empty"),
        (lambda: ZeroShot(templates=["a photo"]), "has no {}"),
        (lambda: ZeroShot(classes="imagnet"), "did you mean 'imagenet'.*or a list"),
        (lambda: Segmentation(decay=[]), "decay"),
        (lambda: Segmentation(steps=0), "steps"),
        (lambda: Depth(ridge=[0.0]), "ridge"),
        (lambda: Retrieval(template="a photo"), "has no {}"),
        (lambda: Agreement(sources=[]), "sources is empty"),
    ],
)
def test_options_are_checked_at_construction(make: Callable[[], Eval], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("kind", [Segmentation, Depth])
def test_sources_without_truth(kind: type[Eval], tmp_path: Path) -> None:
    paint(tmp_path, "red/a.png", "red")
    source = {"kind": "folder", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"Folder (has no classes|has no annotation).*scenes"):
        kind(size=32, train=source, val=source, test=source).run(Oracle())  # type: ignore[call-arg]


# --- retrieval --------------------------------------------------------------------------------------------------------


def test_ranking_with_shared_queries_and_distractors() -> None:
    answers = squares(Retrieval, 8).rank(Oracle())
    assert [answer.query for answer in answers] == ["a red square", "a green square", "a blue square"]
    for k, answer in enumerate(answers):
        assert answer.right == {f"squares/0/{k}", f"squares/0/{k + 3}"}  # images 6 and 7 have no query
        assert sorted(answer.names) == sorted(f"squares/0/{i}" for i in range(8))
        assert list(answer.scores) == sorted(answer.scores, reverse=True)
        assert answer.rank == 1


def test_recall_with_shifted_colours() -> None:
    class Shifted(Oracle):
        def encode_text(self, texts: list[str]) -> Tensor:
            return super().encode_text(texts).roll(1, 1)

    # 6 images, two of each colour: asked for red it puts both greens first, then ties in the source's order.
    answers = squares(Retrieval, 6).rank(Shifted())
    ranks = [answer.rank for answer in answers]
    assert all(rank >= 3 for rank in ranks)
    found = squares(Retrieval, 6).run(Shifted())
    assert found["recall@1"] == 0
    assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


class Captioned(Squares):
    """A sentence of the colour and one of the image's own, or one alone."""

    query = None  # type: ignore[assignment]

    def annotation(self, index: int) -> SimpleNamespace:
        both = (f"it is {self.classes[self.label(index)]}", f"number {index}, {self.classes[self.label(index)]}")
        return SimpleNamespace(captions=both if index % 2 else (), caption=both[0] if index != 4 else None)


def test_captions_replace_missing_queries() -> None:
    """As in COCO, each caption is a query for its image; for a caption of several images, any of them is correct."""
    answers = {a.query: a for a in Retrieval(size=32, source=Captioned(7)).rank(Oracle())}  # type: ignore[arg-type]
    assert set(answers) == {
        "it is red", "it is green", "it is blue", "number 1, green", "number 3, red", "number 5, blue",
    }  # fmt: skip
    assert answers["it is red"].right == {f"squares/0/{i}" for i in (0, 3, 6)}
    assert answers["it is green"].right == {"squares/0/1"}  # image 4 has no caption and competes
    assert answers["number 5, blue"].right == {"squares/0/5"}
    found = Retrieval(size=32, source=Captioned(7)).run(Oracle())  # type: ignore[arg-type]
    ranks = np.array([answer.rank for answer in answers.values()])
    assert found == {
        **{f"recall@{k}": pytest.approx(np.mean(ranks <= k)) for k in (1, 5, 10)},
        "mrr": pytest.approx(np.mean(1 / ranks)),
    }
    assert found["recall@1"] < 1  # some of the images are of one colour


def test_captions_of_coco_and_scenes(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    coco = {"kind": "coco", **tiny.coco(tmp_path / "coco")}
    (answer,) = Retrieval(size=16, source=coco).rank(Oracle())
    assert (answer.query, answer.right) == ("A dog in a car.", {"coco/val2017/1.jpg"})
    scenes = Scenes(split="val")
    wanted = {caption for i in range(len(scenes)) for caption in scenes.annotation(i).captions}
    assert {a.query for a in Retrieval(size=16, source={"kind": "scenes", "split": "val"}).rank(Oracle())} == wanted


def test_blocks_of_texts_give_equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (40, 9), generator=draw).float()  # many ties
    right = [sorted(torch.randperm(9, generator=draw)[: 1 + i % 3].tolist()) for i in range(40)]
    order = scores.sort(dim=1, descending=True, stable=True).indices
    wanted = [1 + min(row.tolist().index(j) for j in own) for row, own in zip(order, right, strict=True)]
    assert first_right(scores, right).tolist() == wanted
    whole = Retrieval(size=32, source=Captioned(7)).run(Oracle())  # type: ignore[arg-type]
    monkeypatch.setattr("agglo.evals.retrieval._TEXTS", 2)
    assert Retrieval(size=32, source=Captioned(7)).run(Oracle()) == whole  # type: ignore[arg-type]


def test_retrieval_needs_queries(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", "red")
    with pytest.raises(ConfigError, match=r"Folder has no queries or captions.*coco"):
        Retrieval(source={"kind": "folder", "path": str(tmp_path)}).run(Oracle())


# --- agreement --------------------------------------------------------------------------------------------------------


class Pool(Teacher):
    """Mean colours of cells of eight pixels."""

    def __init__(self, summary: bool = True) -> None:
        super().__init__()
        self.spec = FeatureSpec(summary=3 if summary else None, spatial=3, stride=8, step=8)

    def forward(self, images: Tensor) -> Features:
        summary = images.mean((2, 3)) if self.spec.summary else None
        return Features(summary, torch.nn.functional.avg_pool2d(images, 8))


def test_perfect_head_agrees_across_grids() -> None:
    # The head's map has stride 1, the teacher's 8: area averaging makes them equal.
    student = Student(a=lambda x: Features(x.mean((2, 3)), x), b=lambda x: Features(None, -x))
    sources: Any = [Squares(5), Squares(4, 1)]
    found = Agreement({"a": Pool(), "b": Pool(False)}, size=32, sources=sources).run(student)
    assert found.keys() == {"a/summary_cosine", "a/spatial_r2", "a/spatial_cosine", "b/spatial_r2", "b/spatial_cosine"}
    for metric in ("summary_cosine", "spatial_r2", "spatial_cosine"):
        assert found[f"a/{metric}"] == pytest.approx(1, abs=1e-6)
    assert found["b/spatial_r2"] < 0


def test_agreement_against_numpy() -> None:
    noise = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    head = lambda x: Features(x.amax((2, 3)), torch.nn.functional.avg_pool2d(x, 8) + 0.1 * noise)  # noqa: E731
    found = Agreement({"a": Pool()}, size=32, sources=[Squares(7)]).run(Student(a=head))  # type: ignore[list-item]
    images = np.stack([Squares(7).arrays(i)[0] for i in range(7)]).astype(np.float64).transpose(0, 3, 1, 2) / 255
    y = images.reshape(7, 3, 4, 8, 4, 8).mean((3, 5))
    residual, mean = 0.1 * noise.double().numpy(), y.mean((0, 2, 3), keepdims=True)
    assert found["a/spatial_r2"] == pytest.approx(1 - 7 * (residual**2).sum() / ((y - mean) ** 2).sum(), abs=1e-6)
    a, b = y + residual - mean, y - mean
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found["a/spatial_cosine"] == pytest.approx(cosine.mean(), abs=1e-6)
    p, q = images.max((2, 3)), images.mean((2, 3))
    cosine = (p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1)
    assert found["a/summary_cosine"] == pytest.approx(cosine.mean(), abs=1e-6)


def test_agreement_refuses_bad_input() -> None:
    sources: Any = [Squares(2)]
    head = lambda x: Features(x.mean((2, 3)), x)  # noqa: E731
    with pytest.raises(TypeError, match="pass them, evaluate"):
        Agreement(size=32, sources=sources).run(Student(a=head))
    with pytest.raises(TypeError, match="this Noise has no heads"):
        Agreement({"a": Pool()}, size=32, sources=sources).run(Noise())
    with pytest.raises(ConfigError, match="no head for teacher 'alpha'; did you mean 'alpha1'"):
        Agreement({"alpha": Pool()}, size=32, sources=sources).run(Student(alpha1=head))
    wide = Student(a=lambda x: Features(x.mean((2, 3)).repeat(1, 2), x))
    with pytest.raises(FeatureError, match="head 'a' has 6 channels and its teacher 3"):
        Agreement({"a": Pool()}, size=32, sources=sources).run(wide)
    broken = Student(a=lambda x: Features(x.mean((2, 3)) / 0, x))
    with pytest.raises(FeatureError, match=r"a head's summary features of squares/0/0 contain infinity"):
        Agreement({"a": Pool()}, size=32, sources=sources).run(broken)


# --- suites -----------------------------------------------------------------------------------------------------------


def test_a_suite_encodes_each_image_set_once() -> None:
    train, val, test = (Squares(12, seed) for seed in range(3))
    model, phrases = Noise(), []
    evals = [
        Knn(size=32, train=train, test=test),  # type: ignore[arg-type]
        Segmentation(size=32, train=train, val=val, test=test),  # type: ignore[arg-type]
        Depth(size=32, train=train, val=val, test=test),  # type: ignore[arg-type]
        ZeroShot(size=32, source=test),  # type: ignore[arg-type]
    ]
    found = evaluate(model, evals, progress=phrases.append)
    assert list(found) == ["knn", "segmentation", "depth", "skipped"]
    assert "encode_text" in found["skipped"]["zero_shot"]
    assert model.calls == 3
    assert [s.reads for s in (train, val, test)] == [12, 12, 12]
    assert phrases[0] == "knn: encoding 12/12"
    assert any(phrase.startswith("zero_shot: left out") for phrase in phrases)
    alone = {name: each.run(Noise()) for name, each in zip(found, evals[:3], strict=False)}
    assert alone == {name: found[name] for name in alone}  # sharing changes no number
    evaluate(model, evals[:1])
    assert model.calls == 5  # nothing is kept beyond a call


def test_models_do_not_share_features() -> None:
    source = Squares(9)
    context = EvalContext()
    a, b = (encode(model, source, 32, context, want="spatial").spatial for model in (Oracle(), Noise()))
    assert a is not None
    assert b is not None
    assert a.shape != b.shape


def test_eval_options_are_checked_before_the_first_run(tmp_path: Path) -> None:
    for colour in COLOURS:
        paint(tmp_path, f"{colour}/one.png", colour)
    source = {"kind": "folder", "path": str(tmp_path)}
    knn = {"kind": "knn", "k": 1, "size": 20, "train": source, "test": source}
    found = evaluate(Oracle(), [knn, knn, {**knn, "name": "again"}, {"kind": "agreement"}])
    assert list(found) == ["knn", "knn#2", "again", "skipped"]
    assert found["knn"] == found["again"] == {"top1": 1.0}
    assert "pass them" in found["skipped"]["agreement"]
    assert "skipped" not in evaluate(Oracle(), [knn])
    model = Noise()
    for evals, message in (
        ([knn, {"kind": "knm"}], "no kind 'knm' of evals; did you mean 'knn'"),
        ([knn, {"kind": "knn", "kk": 3}], r"evals\.1\.kk: unknown key"),
        ([knn, {"k": 3}], r"evals\.1: needs `kind:`"),
        ([knn, {**knn, "name": "knn"}], "the name 'knn' is taken"),
        ("quik", "did you mean 'quick'"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(model, evals)  # type: ignore[arg-type]
    assert model.calls == 0


def test_teachers_are_passed_to_comparing_evals() -> None:
    each = {"kind": "agreement", "size": 32, "sources": [{"kind": "photos", "split": "heldout"}]}
    head = lambda x: Features(x.mean((2, 3)), x)  # noqa: E731
    found = evaluate(Student(a=head), [each], teachers={"a": Pool()})
    assert found["agreement"]["a/spatial_r2"] == pytest.approx(1, abs=1e-6)
