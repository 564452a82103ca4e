"""The page of a run: self-contained, escaped, complete, and written even if parts are missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from agglo import recipe as recipes
from agglo.model.creation import create
from agglo.model.model import Model
from agglo.report import charts, markup, visuals
from agglo.report.markup import Markup, tag
from agglo.report.run import read_run
from agglo.report.run_page import write_run
from agglo.results.records import Result, append
from agglo.results.tables import number, signed
from agglo.types import ConfigError

pytestmark = pytest.mark.evals

NASTY = "<script>alert('x')</script>&\"quoted\""
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "claim": {"summary": f"A claim with {NASTY}."},
    "student": {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 8, "max_grid": 8, "registers": 0},
    "teachers": {
        "both": {"kind": "toy", "stride": 8, "channels": 6, "summary": 5},
        "dense": {"kind": "toy", "stride": 8, "channels": 7, "summary": None, "summary_weight": 0, "seed": 1},
    },
    "heads": {"summary": {"kind": "mlp", "hidden": 8}, "spatial": {"kind": "mlp", "hidden": 8}},
    "data": {"sources": [{"kind": "photos", "split": "train"}]},
    "partitions": [{"sizes": [32], "batch": 4}],
    "train": {"steps": 40},
}


class Parsed(HTMLParser):
    """Checks that tags balance, and collects what a browser would fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((name, {key: value or "" for key, value in attrs}))
        if name not in markup.VOID:
            self.stack.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.stack, f"</{name}> closes nothing"
        assert self.stack.pop() == name

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.seen if name in attrs]


def metrics_line(step: int, **more: Any) -> dict[str, Any]:
    terms = {"both/summary": 2.0 / step, "both/spatial": 1.0, "dense/spatial": 1.5 - step / 100}
    seconds = {"data": 1.0, "teachers": 5.0, "forward": 2.0, "backward": 2.0}
    return {"step": step, "terms": terms, "images_per_second": 8.0, "seconds": seconds, "elapsed": step / 2} | more


def write_lines(folder: Path, lines: list[Any]) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run folder without a text head."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    recipe = recipes.from_dict(RECIPE)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "versions.json").write_text(
        json.dumps({"agglo": "9.9", "torch": NASTY, "threads": "2"}), encoding="utf-8"
    )
    torch.manual_seed(0)
    create(recipe).save(folder / "initial")
    create(recipe).save(folder / "model")
    write_lines(folder, [metrics_line(step) for step in range(1, 41)])
    student = {
        "depth": {"rmse": 0.5, "delta1": 0.75},
        "agreement": {"both/summary_cosine": 0.8, "both/spatial_r2": 0.4},
    }
    untrained = {
        "depth": {"rmse": 0.7, "delta1": 0.8},
        "agreement": {"both/summary_cosine": 0.1, "both/spatial_r2": -0.2},
    }
    models = {"dense": {"depth": {"rmse": 0.9, "delta1": 0.2}}, "untrained": untrained, "student": student}
    for name, evals in models.items():
        for kind, metrics in evals.items():
            role = "teacher" if name == "dense" else name
            append(
                folder / "evals",
                Result(
                    name=kind,
                    kind=kind,
                    model={"name": name, "hash": name, "role": role},
                    settings={"kind": kind},
                    protocol=kind,
                    data={"test": {"hash": "d", "source": {"kind": "scenes"}, "images": 0}},
                    metrics=metrics,
                    lower_is_better=("rmse",),
                ),
            )
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    path = write_run(run)
    assert path == run / "report.html"
    assert not list(run.glob("*.partial"))
    return path.read_text(encoding="utf-8")


def test_page_is_self_contained(html: str) -> None:
    page = Parsed(html)
    assert {name for name, _ in page.seen}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    for source in page.attributes("src"):
        assert source.startswith("data:image/webp;base64,")
    for target in page.attributes("href"):
        assert target.startswith("#") and target[1:] in page.attributes("id")
    assert not re.search(r"https?://|url\(|@import", html)
    assert len(html) < 3_000_000


def test_page_has_every_section(html: str) -> None:
    page = Parsed(html)
    assert {"learning", "measured", "seen", "found", "reproduce"} <= set(page.attributes("id"))
    for expected in (
        "both · summary",
        "dense · spatial",
        "90 % in teachers and student",
        "160 views",
        "student as both",
    ):
        assert expected in page.text
    alts = [attrs["alt"] for name, attrs in page.seen if name == "img"]
    for column in ("untrained", "student", "both", "student as both", "dense", "student as dense"):
        assert sum(alt.endswith(f": {column}") for alt in alts) == 6
    assert "agglo train" in page.text and "agglo search" in page.text and "agglo view" in page.text
    assert "has no text tower" in page.text  # the reason for the missing text search


def test_names_are_escaped(html: str) -> None:
    assert "<script" not in html
    assert NASTY in " ".join(Parsed(html).words)
    assert tag("p", NASTY, title=NASTY).count("<") == 2
    assert tag("p", Markup("<b>x</b>"), ["&", None, 3]) == "<p><b>x</b>&amp;3</p>"


def test_best_and_changes_follow_the_direction_of_each_metric(html: str) -> None:
    bold = re.findall(r'<td class="best">([^<]*)</td>', html)
    assert bold == ["0.500", "0.800"]  # rmse: the lowest; delta1: the untrained student
    rmse = html[html.index(">RMSE") :]
    assert re.search(r'class="delta (\w+)" title="([^"]*)"', rmse).groups() == ("good", "−0.200")  # type: ignore[union-attr]
    assert "▼ 0.050" in html and 'delta bad" title="−0.050"' in html


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("evals", "agglo report"),
        ("metrics.jsonl", "holds no losses"),
        ("versions.json", "versions.json is missing"),
        ("recipe.yaml", "recipe.yaml is missing"),
        ("model", "agglo train"),
    ],
)
def test_missing_parts_are_named_with_their_command(run: Path, tmp_path: Path, gone: str, expected: str) -> None:
    for path in run.iterdir():
        if path.name not in (gone, "report.html"):
            (tmp_path / path.name).symlink_to(path)
    page = Parsed(write_run(tmp_path).read_text(encoding="utf-8"))
    assert expected in page.text
    assert {"learning", "measured", "seen", "found", "reproduce"} <= set(page.attributes("id"))


def test_damaged_files_become_notes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: [", encoding="utf-8")
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "results.jsonl").write_text("{", encoding="utf-8")
    (tmp_path / "model").mkdir()
    write_lines(
        tmp_path, [metrics_line(1, terms={NASTY: 1.0, "nan": math.nan, "odd": "text"}), '{"step": 2, "ter', "[]"]
    )
    html = write_run(tmp_path).read_text(encoding="utf-8")
    page = Parsed(html)
    assert "<script" not in html
    for note in (
        "recipe.yaml does not fit",
        "results.jsonl: 1 damaged line left out",
        "2 damaged lines",
        "model/ cannot be loaded",
    ):
        assert note in page.text
    assert "no finite value" in page.text and "One step is logged" in page.text


def test_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="agglo train quickstart"):
        write_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is not a run folder"):
        write_run(tmp_path)


def test_a_resumed_run_counts_each_step_and_second_once(tmp_path: Path) -> None:
    lines = [metrics_line(10, elapsed=4.0), metrics_line(20, elapsed=8.0), metrics_line(30, elapsed=12.0)]
    write_lines(tmp_path, [*lines, metrics_line(20, elapsed=3.0), metrics_line(30, elapsed=6.0)])
    found = read_run(tmp_path)
    assert [entry["step"] for entry in found.metrics] == [10, 20, 30]
    assert found.seconds == 4.0 + 3.0 + 3.0
    assert found.images == (round(8.0 * 10.0), False)  # no recipe: speed times time
    assert found.phases()["teachers"] == 15.0


def test_smoothing_is_the_two_sided_exponential_average() -> None:
    x = np.random.default_rng(0).normal(size=50)
    decay = 1 - 1 / 4
    kernel = decay ** np.abs(np.arange(50)[:, None] - np.arange(50)[None, :])
    np.testing.assert_allclose(charts.smooth(list(x), 4), kernel @ x / kernel.sum(1), rtol=1e-12)
    assert charts.smooth([1.0, 5.0], 1) == [1.0, 5.0]


def test_ticks() -> None:
    assert charts.linear_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert charts.linear_ticks(3, 3) == [3]
    assert charts.log_ticks(0.01, 10) == pytest.approx([0.01, 0.1, 1, 10])
    assert charts.wants_log([0.01, 1]) and not charts.wants_log([0.5, 1]) and not charts.wants_log([0, 100])
    for low, high in ((1e-9, 3e-9), (-5, 7), (0.2, 0.9), (10, 1e6)):
        ticks = charts.linear_ticks(low, high)
        assert 2 <= len(ticks) <= 8 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [1e-8, 1.0, 1e4], [-3.0, 5.0], [0.0, 0.0]])
def test_curves_stay_inside_their_chart(values: list[float]) -> None:
    figure = charts.line_chart(NASTY, [(10.0 * i, v) for i, v in enumerate(values)], 0)
    Parsed(figure)
    for path in re.findall(r' d="([^"]+)"', figure):
        pairs = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)
        assert len(pairs) >= len(values)
        assert all(0 <= float(x) <= charts.WIDTH and 0 <= float(y) <= charts.HEIGHT for x, y in pairs)


def test_long_curves_are_thinned() -> None:
    figure = charts.line_chart("x", [(float(i), 1.0 + i) for i in range(50_000)], 0)
    assert len(figure) < 40_000


def test_numbers() -> None:
    assert [number(v) for v in (0.12345, 12.345, 123.45, 12345.6, -0.5, -0.0001)] == [
        "0.123", "12.35", "123.5", "12,346", "−0.500", "0.000",
    ]  # fmt: skip
    assert (number(math.nan), number(-math.inf)) == ("n/a", "−∞")
    assert (signed(0.5), signed(-0.5), signed(0.0)) == ("+0.500", "−0.500", "0.000")


class Oracle:
    """Image i and its query have equal embeddings, except for queries in ``wrong``."""

    def __init__(self, wrong: int) -> None:
        self.wrong, self.preferred_size, self.heads = wrong, 64, {"words": None}
        self.sizes: list[tuple[int, ...]] = []

    def step(self) -> int:
        return 16

    def text_head(self, head: str | None = None) -> str:
        return "words"

    def encode_text(self, texts: list[str], head: str | None = None) -> torch.Tensor:
        photos = visuals.build("sources", {"kind": "photos", "split": "heldout"})
        asked = [photos.query(i) for i in range(len(photos))]
        rows = [asked.index(text) if place >= self.wrong else len(asked) for place, text in enumerate(texts)]
        return F.one_hot(torch.tensor(rows), len(asked) + 1).float()

    def encode_image(self, images: torch.Tensor, head: str | None = None) -> torch.Tensor:
        self.sizes.append(tuple(images.shape))
        return torch.eye(len(images), len(images) + 1)


def test_search_counts_the_right_photos() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    student: Any = Oracle(wrong=0)
    found = visuals.search(visuals.Models(student, student), None)
    assert found.found == found.found_before == len(found.queries) >= 8
    assert all(q.hits[0].right and q.hits[0].score == 1.0 and len(q.hits) == 3 for q in found.queries)
    assert student.sizes[0][2:] == (224, 224)
    # A query that matches nothing ties all photos: they keep their order, so only the first photo's query stays right.
    lost: Any = Oracle(wrong=3)
    found = visuals.search(visuals.Models(lost), None)
    assert [q.rank > 1 for q in found.queries[:3]] == [False, True, True]
    assert found.found == len(found.queries) - 2
    assert found.found_before is None


def test_gallery_uses_one_basis_for_teacher_and_head() -> None:
    recipe = recipes.from_dict(RECIPE)
    from agglo.objectives.base import build_teachers

    rng = np.random.default_rng(0)
    images = [(f"i{i}", Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))) for i in range(2)]
    teachers = build_teachers(recipe)
    shown = visuals.gallery(visuals.Models(teachers=teachers), recipe, images)
    assert [column.title for column in shown.columns] == ["image", "both", "dense"]
    model: Model = create(recipe).eval()
    shown = visuals.gallery(visuals.Models(model, teachers=teachers), recipe, images)
    assert [c.title for c in shown.columns] == [
        "image",
        "student",
        "both",
        "student as both",
        "dense",
        "student as dense",
    ]
    side = (visuals.SHOWN, visuals.SHOWN)
    assert all(p is not None and p.size == side for column in shown.columns for p in column.pictures)
    batch = torch.stack([visuals.fit(image, (64, 64)) for _, image in images])
    with torch.inference_mode():
        basis = visuals.pca_basis(teachers["both"](batch).spatial)
        answer = visuals.pca_picture(model(batch).heads["both"].spatial[1], basis, side)
    assert np.array_equal(np.asarray(answer), np.asarray(shown.columns[3].pictures[1]))
    with pytest.raises(ValueError, match="no image source"):
        visuals.gallery(visuals.Models(model), recipe, [])
