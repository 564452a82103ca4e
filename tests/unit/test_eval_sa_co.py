"""SA-Co/Gold: the score against a brute force and closed forms, and SAM 3 on other features against SAM 3 itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from agglo.config import build
from agglo.decoders.sam3 import Sam3
from agglo.evals._concepts import THRESHOLDS, count, decoded, favourable, measures, overlaps, read_pairs, runs
from agglo.evals.base import EvalContext, ProbeError
from agglo.evals.sa_co import SaCo
from agglo.harness.measuring import measure
from agglo.preprocess import fit
from agglo.types import AssetError, ConfigError, Features, FeatureSpec
from support import datasets as tiny
from support.checkpoints import tiny_sam3
from support.models import Noise, Student

pytestmark = pytest.mark.libraries

pytest.importorskip("scipy")
SIZE = (20, 30)


# --- writing files ----------------------------------------------------------------------------------------------------


def run_lengths(mask: np.ndarray, text: bool = True) -> dict[str, Any]:
    """COCO's run lengths of a mask, as text or as numbers; the way back is in the package."""
    flat = [0, *mask.T.reshape(-1).astype(int).tolist()]
    edges = [i - 1 for i in range(1, len(flat)) if flat[i] != flat[i - 1]] + [len(flat) - 1]
    counts = [b - a for a, b in zip([0, *edges], edges, strict=False)]
    if not text:
        return {"size": list(mask.shape), "counts": counts}
    words = ""
    for i, value in enumerate(counts):
        rest = value - counts[i - 2] if i > 2 else value
        while True:
            group, rest = rest & 31, rest >> 5
            last = (rest == 0 and not group & 16) or (rest == -1 and group & 16)
            words += chr(48 + group + (0 if last else 32))
            if last:
                break
    return {"size": list(mask.shape), "counts": words}


def box(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def annotated(path: Path, pairs: dict[int, list[np.ndarray]], **changes: Any) -> str:
    """One annotator's file; pair ``i`` is of image ``i // 2``."""
    facts = {"width": SIZE[1], "height": SIZE[0], "is_instance_exhaustive": 1}
    images = [
        {
            "id": i,
            "file_name": f"{i // 2}.png",
            "text_input": ("cat", "dog")[i % 2],
            **facts,
            **changes.get(f"p{i}", {}),
        }
        for i in pairs
    ]
    marked = [{"image_id": i, "segmentation": run_lengths(mask)} for i, masks in pairs.items() for mask in masks]
    path.write_text(json.dumps({"images": images, "annotations": marked}))
    return str(path)


def predictions(path: Path, pairs: dict[int, list[tuple[float, np.ndarray]]]) -> str:
    entries = [
        {"image_id": i, "category_id": 1, "score": score, "segmentation": run_lengths(mask, text=False)}
        for i, masks in pairs.items()
        for score, mask in masks
    ]
    path.write_text(json.dumps(entries))
    return str(path)


# --- the score --------------------------------------------------------------------------------------------------------


def brute(pairs: list[tuple[list[np.ndarray], list[list[np.ndarray]]]]) -> dict[str, float]:
    """The definition, pair by pair and threshold by threshold, every matching tried."""

    def iou(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.logical_and(a, b).sum()) / float(np.logical_or(a, b).sum())

    def hits(found: list[np.ndarray], true: list[np.ndarray]) -> list[int]:
        few, many = (found, true) if len(found) <= len(true) else (true, found)
        best = max(
            ([iou(a, many[j]) for a, j in zip(few, order, strict=True)]
             for order in itertools.permutations(range(len(many)), len(few))),
            key=sum,
        )  # fmt: skip
        return [sum(value >= 0.5 + 0.05 * k - 1e-12 for value in best) for k in range(10)]

    def f1(tp: int, fp: int, fn: int) -> float:
        return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0

    chosen = []
    for found, truths in pairs:
        scored = []
        for true in truths:
            tp = hits(found, true)
            scored.append((np.mean([f1(t, len(found) - t, len(true) - t) for t in tp]), tp, len(true)))
        top = max(value for value, _, _ in scored)
        _, tp, n = next(each for each in scored if each[0] == top)
        chosen.append((tp, len(found), n))
    micro = []
    for k in range(10):
        own = [(tp[k], found - tp[k], true - tp[k]) for tp, found, true in chosen if true]
        micro.append(f1(*map(sum, zip(*own, strict=True))))
    results, there = np.array([f > 0 for _, f, _ in chosen], float), np.array([t > 0 for _, _, t in chosen], float)
    mcc = float(np.corrcoef(results, there)[0, 1])  # Matthews' coefficient is Pearson's of two binary variables
    return {"cgf1": float(np.mean(micro)) * mcc, "pmf1": float(np.mean(micro)), "il_mcc": mcc}


def test_the_score_equals_the_brute_force() -> None:
    rng = np.random.default_rng(0)

    def draw(many: int) -> list[np.ndarray]:
        corners = rng.integers(0, 12, (many, 2))
        return [box(x, y, x + rng.integers(4, 15), y + rng.integers(3, 8)) for x, y in corners.tolist()]

    pairs = []
    for _ in range(60):
        base = draw(int(rng.integers(0, 4)))
        truths = [[np.roll(m, rng.integers(0, 3), 1) for m in base] + draw(int(rng.random() < 0.2)) for _ in range(3)]
        found = [np.roll(m, rng.integers(0, 2), 0) for m in base if rng.random() < 0.8] + draw(int(rng.random() < 0.3))
        pairs.append((found, truths))
    counts = [favourable(found, truths) for found, truths in pairs]
    wanted = brute(pairs)
    assert measures(counts) == pytest.approx(wanted, abs=1e-12)
    assert 0.1 < wanted["cgf1"] < 0.9


def test_the_score_in_closed_form() -> None:
    a, b = box(0, 0, 10, 10), box(15, 5, 25, 15)
    perfect = [count([a, b], [b, a]), count([a], [a]), count([], [])]
    assert measures(perfect) == {"cgf1": 1, "pmf1": 1, "il_mcc": 1}
    assert [each.local for each in perfect] == [1, 1, 1]
    nothing = [count([], [a, b]), count([], [])]
    assert measures(nothing) == {"cgf1": 0, "pmf1": 0, "il_mcc": 0}
    wrong = [count([], [a]), count([b], [])]
    assert measures(wrong) == {"cgf1": 0, "pmf1": 0, "il_mcc": -1}
    # One of two found, with an IoU of 0.7: F1 of 2/3 at the five thresholds up to 0.70, else 0.
    half = [count([box(0, 0, 7, 10)], [a, b]), count([], [])]
    assert measures(half) == pytest.approx({"cgf1": 1 / 3, "pmf1": 1 / 3, "il_mcc": 1})
    # What is predicted where nothing is costs il_mcc alone: 1 of 2 such pairs is a false alarm.
    alarm = [count([a], [a]), count([a], [a]), count([a], []), count([], [])]
    assert measures(alarm) == pytest.approx({"cgf1": 1 / 3**0.5, "pmf1": 1, "il_mcc": 1 / 3**0.5})
    assert measures([count([], [])])["cgf1"] == 0
    assert THRESHOLDS.tolist() == pytest.approx([0.5 + 0.05 * i for i in range(10)])
    assert overlaps([a * False], [b * False]).tolist() == [[0]]


def test_overlaps_are_those_of_whole_masks() -> None:
    """Boxes that touch, lie in one another or apart, ragged masks, and empty ones."""
    rng = np.random.default_rng(0)
    edges = [np.sort(rng.integers(0, [[21], [31]], (2, 2)), 1) for _ in range(30)]
    masks = [box(x[0], y[0], x[1], y[1]) & (rng.random(SIZE) < rng.choice([0.3, 1])) for y, x in edges]
    masks += [np.ones(SIZE, bool), np.zeros(SIZE, bool), box(0, 0, 5, 5), box(5, 0, 9, 5), box(0, 5, 5, 9)]
    wanted = [[(a & b).sum() / max((a | b).sum(), 1) for b in masks[::-1]] for a in masks]
    assert np.array_equal(overlaps(masks, masks[::-1]), np.array(wanted))
    assert overlaps([], masks).shape == (0, len(masks))


def test_disjoint_masks_are_skipped() -> None:
    """An image of many small instances: only the pixels in which two boxes meet are compared."""

    class Looked(np.ndarray):
        compared = 0

        def __and__(self, other: Any) -> Any:
            Looked.compared += self.size
            return super().__and__(other)

    masks = [box(3 * i, 0, 3 * i + 3, 4).view(Looked) for i in range(10)]
    assert np.array_equal(overlaps(masks, masks), np.eye(10))
    assert Looked.compared == 10 * 12


def test_matching_maximises_total_iou() -> None:
    """Greedy would give the first prediction its best match and leave the second one nothing above 0.5."""
    true = [box(0, 0, 10, 10), box(3, 0, 13, 10)]
    found = [box(1, 0, 11, 10), box(0, 0, 7, 10)]
    assert count(found, true).hits[0] == 2


def test_most_favourable_annotator_counts() -> None:
    a, b = box(0, 0, 10, 10), box(15, 5, 25, 15)
    assert favourable([a], [[a, b], [b], [a]]).local == 1
    assert favourable([], [[a], [], [b]]).true == 0
    assert favourable([a], [[b], []]).true == 1  # equals: the first


def test_run_lengths_and_polygons() -> None:
    assert runs("532N") == [5, 3, 2, 1]
    assert runs("`0") == [16]
    rng = np.random.default_rng(0)
    for mask in (*(rng.random((9, 7)) < p for p in (0, 0.1, 0.5, 1)), box(3, 4, 300, 200, (400, 500))):
        for text in (True, False):
            assert (decoded(run_lengths(mask, text), mask.shape, "a") == mask).all()
    assert (decoded([[2, 1, 12, 1, 12, 7, 2, 7]], SIZE, "a") == box(2, 1, 12, 7)).all()
    for bad in (
        {"size": [20, 30], "counts": "`"},
        {"size": [20, 30]},
        {"size": [20, 30], "counts": "é"},
        7,
        [[1, 2, 3]],
    ):
        with pytest.raises(ConfigError, match=r"a: .* is not a mask"):
            decoded(bad, SIZE, "a")
    with pytest.raises(ConfigError, match=r"a: is 20x30 pixels"):
        decoded(run_lengths(box(0, 0, 1, 1).T), SIZE, "a")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_predictions_is_scored(tmp_path: Path) -> None:
    a, b = box(0, 0, 10, 10), box(15, 5, 25, 15)
    truth = [
        annotated(tmp_path / "a.json", {0: [a, b], 1: [], 2: [a], 3: []}),
        annotated(tmp_path / "b.json", {0: [a], 1: [], 2: [a], 3: [a]}),
        annotated(tmp_path / "c.json", {0: [a], 1: [], 2: [b], 3: []}, p2={"is_instance_exhaustive": 0}),
    ]
    results = predictions(tmp_path / "results.json", {0: [(0.5, a), (0.49, b)], 1: [(0.2, a)], 2: [(1.0, b)]})
    context = EvalContext()
    found = SaCo(annotations=truth, predictions=results).run(Noise(), context)
    assert found == {"cgf1": 1, "pmf1": 1, "il_mcc": 1}  # annotator b's pair 0; pair 2 is not whole in c
    assert context.records.images["local_f1"] == {"0: cat": 1, "1: dog": 1, "3: dog": 1}
    one = SaCo(annotations=truth[:1], predictions=results).run(Noise())
    assert one["pmf1"] == pytest.approx(2 / 5)  # one of three, one in the wrong place: 2 / (2 + 3)


def test_inconsistent_files_raise(tmp_path: Path) -> None:
    mask = box(0, 0, 10, 10)
    good = annotated(tmp_path / "a.json", {0: [mask], 1: []})
    results = predictions(tmp_path / "results.json", {0: [(0.9, mask)]})

    def run(truth: list[str], given: str = results) -> None:
        SaCo(annotations=truth, predictions=given).run(Noise())

    run([good])
    with pytest.raises(ConfigError, match=r"b.json lacks 1 of the pairs of .*a.json, such as 1"):
        run([good, annotated(tmp_path / "b.json", {0: []})])
    with pytest.raises(ConfigError, match=r"pair 1 is 'dog' on 0.png of 20x30 pixels in .* and 'cow' on"):
        run([good, annotated(tmp_path / "b.json", {0: [], 1: []}, p1={"text_input": "cow"})])
    with pytest.raises(ConfigError, match=r"result 0 is of pair 7, which is not annotated"):
        run([good], predictions(tmp_path / "other.json", {7: [(0.9, mask)]}))
    with pytest.raises(ConfigError, match=r"pair 0 \(0.png\): is 20x30"):
        run([good], predictions(tmp_path / "other.json", {0: [(0.9, mask.T)]}))
    with pytest.raises(ProbeError, match="no pair was marked in full"):
        run([annotated(tmp_path / "b.json", {0: []}, p0={"is_instance_exhaustive": False})])
    for text, message in (
        ("{", "cannot be read"),
        ('{"images": []}', r"lacks annotations; required are images, annotations"),
        ('{"images": [], "annotations": []}', "contains no pair"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}',
         r"images\[0\] lacks height, width, is_instance_exhaustive; required are id"),
    ):  # fmt: skip
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            run([str(tmp_path / "b.json")])
    whole = json.loads(Path(good).read_text())
    for change, message in (
        (lambda w: w["images"][0].pop("text_input"), r"images\[0\] lacks text_input or phrase"),
        (lambda w: w["images"][0].update(id=1), r"images\[1\] repeats pair id 1"),
        (lambda w: w["annotations"][0].update(image_id=9), r"annotations\[0\] is of pair 9, which is not in images"),
        (lambda w: w["annotations"][0].pop("segmentation"), r"annotations\[0\] lacks segmentation"),
    ):
        broken = json.loads(json.dumps(whole))
        change(broken)
        (tmp_path / "b.json").write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=message):
            run([str(tmp_path / "b.json")])
    whole["images"][0]["phrase"] = whole["images"][0].pop("text_input")
    (tmp_path / "b.json").write_text(json.dumps(whole))
    assert read_pairs([tmp_path / "b.json"])[0].phrase == "cat"
    for entries, message in (
        ({}, "is not a list of COCO results"),
        ([{"image_id": 0}], "result 0 lacks segmentation, score"),
        ([{"image_id": 0, "segmentation": [], "score": None}], "has score None"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(entries))
        with pytest.raises(ConfigError, match=message):
            run([good], str(tmp_path / "other.json"))


def test_sa_co_required_options() -> None:
    assert not SaCo.bundled
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "annotations must be a list of files"),
        ({"annotations": ["a"]}, "set either decoder, .*or predictions"),
        ({"annotations": ["a"], "decoder": "d", "predictions": "p"}, "set either decoder, .*or predictions"),
        ({"annotations": ["a"], "decoder": "d"}, "decoder needs images, the folder"),
        ({"annotations": ["a"], "predictions": "p", "size": 0}, "size must be at least 1"),
    )
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            SaCo(**options)


def test_file_contents_are_hashed(tmp_path: Path) -> None:
    mask = box(0, 0, 10, 10)
    truth = [annotated(tmp_path / f"{who}.json", {0: [mask], 1: []}) for who in "ab"]
    results = predictions(tmp_path / "results.json", {0: [(0.9, mask)]})
    for name in ("0.png", "other.png"):
        tiny.picture(tmp_path / "images" / name, 0)

    def run(**keys: Any) -> Any:
        entry = {"kind": "sa_co", "name": "sa_co", "annotations": truth, "predictions": results, **keys}
        found = measure(Noise(), "noise", [entry], tmp_path / "out")
        assert not found.failed
        return found

    first = run(images=str(tmp_path / "images"))
    assert set(first.results["sa_co"].data) == {"annotations.0", "annotations.1", "images"}
    tiny.picture(tmp_path / "images" / "other.png", 1)
    assert run(images=str(tmp_path / "images")).known == ["sa_co"]  # another subset's image
    tiny.picture(tmp_path / "images" / "0.png", 1)
    assert run(images=str(tmp_path / "images")).known == []
    predictions(tmp_path / "results.json", {0: []})
    assert run(images=str(tmp_path / "images")).known == []
    assert run().results["sa_co"].metrics["cgf1"] == 0


# --- SAM 3 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_sam3(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("subset")
    rng = np.random.default_rng(0)
    for i in range(3):
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    whole = np.ones(SIZE, bool)
    truth = annotated(folder / "a.json", {0: [whole], 1: [], 2: [whole], 3: [whole], 4: [], 5: [whole]})
    return {"annotations": [truth], "images": str(folder / "images")}


def test_teacher_trunk_reproduces_original_masks(
    decoder: str, subset: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: nothing on the way from the trunk's features to the masks is different."""
    transformers = pytest.importorskip("transformers")
    answers: list[list[np.ndarray]] = []
    own = Sam3.segment

    def segment(*given: Any) -> Any:
        found = own(*given)
        answers.append(list(found.masks.numpy()))
        return found

    monkeypatch.setattr(Sam3, "segment", segment)
    teacher = build("teachers", {"kind": "transformers", "model": decoder}).eval()
    seen: list[tuple[int, ...]] = []
    teacher.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    found = SaCo(decoder=decoder, **subset).run(teacher)
    assert seen == [(1, 3, 112, 112)] * 3  # once for the two phrases of an image
    stock = transformers.Sam3Model.from_pretrained(decoder).eval()
    words = transformers.CLIPTokenizer.from_pretrained(decoder)
    wanted = []
    for pair in read_pairs(subset["annotations"]):
        image = Image.open(Path(subset["images"]) / pair.file)
        text = words([pair.phrase], padding="max_length", max_length=16, return_tensors="pt")
        with torch.inference_mode():
            pixels = (fit(image, (112, 112), "stretch", resample=Image.Resampling.BILINEAR)[None] - 0.5) / 0.5
            out = stock(pixel_values=pixels, input_ids=text["input_ids"], attention_mask=text["attention_mask"])
        scores = (out.pred_logits.sigmoid() * out.presence_logits.sigmoid())[0]
        up = torch.nn.functional.interpolate(out.pred_masks.sigmoid(), SIZE, mode="bilinear", align_corners=False)[0]
        wanted.append([(up[k] > 0.5).numpy() for k in range(len(scores)) if scores[k] >= 0.5])
    assert [len(masks) for masks in answers] == [len(masks) for masks in wanted]
    assert all((a == b).all() for got, due in zip(answers, wanted, strict=True) for a, b in zip(got, due, strict=True))
    assert len({len(masks) for masks in wanted}) > 1
    assert any(0 < mask.mean() < 1 for masks in wanted for mask in masks)
    truths = [list(pair.truths) for pair in read_pairs(subset["annotations"])]
    full = [np.ones(SIZE, bool)]
    assert found == measures([count(got, full if true[0] else []) for got, true in zip(answers, truths, strict=True)])
    assert SaCo(decoder=decoder, **subset).run(teacher) == found


def test_different_features_change_masks(decoder: str) -> None:
    sam = Sam3(decoder)
    assert (sam.width, sam.side) == (32, 8)
    assert sum(p.numel() for p in sam.model.vision_encoder.backbone.parameters()) == 0
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(1, 32, 8, 8, generator=draw) * 3
    with torch.inference_mode():
        logits = [
            sam.model(vision_embeds=sam.embed(each), input_ids=torch.arange(16)[None]).pred_masks
            for each in (features, features, features.mT, features * 0)
        ]
    assert torch.equal(logits[0], logits[1])
    assert not any(torch.allclose(logits[0], other, atol=1e-2) for other in logits[2:])


class Trunk(nn.Module):
    """Features of any width, at another stride."""

    def __init__(self, width: int, stride: int = 16) -> None:
        super().__init__()
        self.spec = FeatureSpec(summary=None, spatial=width, stride=stride, step=stride)
        self.weight = torch.randn(width, 3, stride, stride, generator=torch.Generator().manual_seed(0)) / stride
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Features:
        self.shapes.append(tuple(images.shape))
        return Features(None, torch.conv2d(images, self.weight, stride=self.spec.stride))


def test_student_input_has_trunk_cell_count(decoder: str, subset: dict[str, Any]) -> None:
    model = Trunk(32)
    found = SaCo(decoder=decoder, **subset).run(model)
    assert model.shapes == [(1, 3, 128, 128)] * 3  # 8 cells of 16 pixels; SAM 3 has 8 of 14
    assert set(found) == {"cgf1", "pmf1", "il_mcc"}
    SaCo(decoder=decoder, size=64, **subset).run(model)
    assert model.shapes[-1] == (1, 3, 64, 64)
    heads: dict[str, Any] = {"sam3": Trunk(32, 4), "other": Trunk(32, 4), "clip": lambda x: Features(None, x)}
    own = SaCo(decoder=decoder, **subset).run(Student(**heads))
    assert (
        own
        == SaCo(decoder=decoder, head="sam3", **subset).run(Student(**heads))
        == pytest.approx(SaCo(decoder=decoder, **subset).run(heads["sam3"]))
    )
    with pytest.raises(ConfigError, match=r"evals.sa_co: the decoder takes 32 channels, and none has them: clip \(3\)"):
        SaCo(decoder=decoder, **subset).run(Student(clip=heads["clip"]))
    with pytest.raises(TypeError, match="has none"):
        SaCo(decoder=decoder, **subset).run(Noise(spatial=False))


def test_missing_images_and_decoders_raise(decoder: str, subset: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"no SAM 3 in .*nowhere.*facebook/sam3"):
        SaCo(decoder=str(tmp_path / "nowhere"), **subset).run(Trunk(32))
    elsewhere: dict[str, Any] = subset | {"images": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"3 of 3 annotated images are not in .*, such as 0.png"):
        SaCo(decoder=decoder, **elsewhere).run(Trunk(32))
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((Path(subset["images"]) / f"{i}.png").read_bytes())
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped an image and its 2 phrases: 1.png"):
        SaCo(decoder=decoder, **elsewhere).run(Trunk(32), context := EvalContext())
    assert set(context.records.images["local_f1"]) == {"0: cat", "1: dog", "4: cat", "5: dog"}
    Image.new("RGB", (7, 9)).save(tmp_path / "1.png")
    with pytest.warns(UserWarning, match=r"2 phrases: 1.png: is 9x7 pixels \(HxW\), annotated as \(20, 30\)"):
        SaCo(decoder=decoder, **elsewhere).run(Trunk(32))
