"""Correspondence on worlds where the answer is known: a painted wall before moving cameras."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from agglo.evals.base import EvalContext, ProbeError
from agglo.evals.correspondence import (
    Correspondence,
    Frame,
    View,
    project,
    ratio_matches,
    rotation_between,
)
from agglo.sources.base import Source
from agglo.types import ConfigError, Features, FeatureSpec
from support.models import Noise, Oracle, Squares

pytestmark = pytest.mark.evals

SIDE, FOCAL, DISTANCE = 32, 32.0, 2.0
STEP = DISTANCE / FOCAL
"""Metres on the wall that one pixel covers."""


class Wall(Source):
    """Views of a wall at two metres from cameras that move sideways by whole pixels.

    Red and green encode the position on the wall.
    """

    def __init__(self, shifts: tuple[int, ...] = (0, 4, 8), points: bool = True, turn: float = 0.0) -> None:
        self.shifts, self.with_points, self.turn = shifts, points, turn

    def __len__(self) -> int:
        return len(self.shifts)

    def name(self, index: int) -> str:
        return f"wall/{index}"

    def read(self, index: int) -> Image.Image:
        x = np.arange(SIDE) + self.shifts[index]
        y = np.arange(SIDE)
        plane = np.stack(np.broadcast_arrays(5 * x[None], 7 * y[:, None], np.zeros((1, 1))), -1)
        return Image.fromarray(plane.astype(np.uint8))

    def annotation(self, index: int) -> SimpleNamespace:
        pose = np.eye(4)
        pose[0, 3] = -self.shifts[index] * STEP
        K = np.array([[FOCAL, 0, SIDE / 2], [0, FOCAL, SIDE / 2], [0, 0, 1]])
        return SimpleNamespace(depth=np.full((SIDE, SIDE), DISTANCE, np.float32), K=K, cam_from_world=pose)

    def pairs(self) -> list[SimpleNamespace]:
        found = []
        for first in range(len(self) - 1):
            d = self.shifts[first + 1] - self.shifts[first]
            x = np.array([[12.5, 3.5], [20.5, 30.5], [math.nan, 4.5]])
            points = np.stack((x, x - [d, 0]), 1)
            pair = SimpleNamespace(first=first, second=first + 1, category=f"c{first}", box=(0, 0, 20, 10))
            if self.with_points:
                pair.points = points
            found.append(pair)
        return found


class Place(nn.Module):
    """Maps the colour of a pixel to a unit vector, different for every colour."""

    spec = FeatureSpec(summary=None, spatial=3, stride=1)

    def forward(self, images: Tensor) -> Features:
        r, g = images[:, 0] * 255 / 500, images[:, 1] * 255 / 500
        return Features(None, torch.stack((r.sin() * g.cos(), g.sin(), r.cos() * g.cos()), 1))


class Shifted(Place):
    """Shifts the features by ``by`` pixels to the left in every second image of a batch."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, images: Tensor) -> Features:
        out = super().forward(images)
        assert out.spatial is not None
        moved = out.spatial.clone()
        moved[1::2] = out.spatial[1::2].roll(-self.by, 3)
        return Features(None, moved)


def run(model: Any, source: Source, context: EvalContext | None = None, **options: Any) -> dict[str, float]:
    return Correspondence(size=SIDE, grid=1.0, source=source, **options).run(model, context)  # type: ignore[arg-type]


def test_position_features_match_every_point() -> None:
    found = run(Place(), Wall())
    # Of 32 columns 28 are seen by the next camera; they are among the 1000 surest of 1024 matches.
    many = run(Place(), Wall(), matches=500)
    assert many["3d@1cm"] == 1
    assert many["2d@5px"] == 1
    assert found["3d@1cm"] == pytest.approx(28 * 32 / 1000, abs=1e-9)
    assert found["pck@0.10"] == found["pck_image@0.10"] == 1
    assert found["3d@2cm/0-30"] == found["3d@2cm"]
    assert not any(key.startswith("3d@2cm/") and not key.endswith("0-30") for key in found)


def test_errors_equal_the_offset() -> None:
    # Feature maps that lie three pixels off: 3 * 6.25 cm in the world, 3 * 512 / 32 = 48 px at the reference size.
    found = run(
        Shifted(3), Wall((0, 0)), matches=400, metres=[0.18, 0.19], pixels=[47, 49], pck=[0.14, 0.16], angles=[]
    )
    assert found["3d@18cm"] == 0
    right = found["3d@19cm"]
    assert right > 0.85  # three columns of 32 come in again at the other side
    assert found["3d"] == pytest.approx(right / 2)
    assert found["2d@47px"] == 0
    assert found["2d@49px"] == right
    assert found["pck@0.14"] == 0  # 3 of 20 pixels, the longer side of the box: 0.15
    assert found["pck@0.16"] == 1
    assert not any("/" in key for key in found)


def test_noise_matches_at_chance() -> None:
    found = Correspondence(size=SIDE, source=Wall()).run(Noise())  # type: ignore[arg-type]
    assert found["3d@1cm"] < 0.1


def test_hidden_and_outside_points_are_ignored() -> None:
    context = EvalContext()
    run(Place(), Wall((0, 16)), context)
    # Of three points one is NaN, and 12.5 - 16 lies outside the second image.
    assert context.records.images["pck"] == {"wall/0 -> wall/1": 1.0}
    assert set(context.records.images) == {"3d", "2d", "pck"}


def test_pck_averages_over_categories() -> None:
    """Two pairs of one category and one of another: PCK is the mean of the categories, not of the pairs."""

    class Uneven(Wall):
        def pairs(self) -> list[SimpleNamespace]:
            same, off, again = super().pairs()
            same.category = again.category = "a"
            off.category = "b"
            off.points = off.points + np.array([0.0, 9.0])[None, None] * np.array([[0.0], [1.0]])[None]
            return [same, off, again]

    found = run(Place(), Uneven((0, 1, 2, 3)))
    assert found["pck@0.10"] == pytest.approx(0.5)
    assert found["pck_image@0.10"] == pytest.approx(2 / 3)


def test_ratio_matches_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, 5)) for n in (40, 30))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    rows, columns = ratio_matches(torch.tensor(a).float(), torch.tensor(b).float(), 15)
    distance = np.sort(1 - a @ b.T, 1)
    ratio = distance[:, 0] / distance[:, 1]
    order = np.argsort(ratio, kind="stable")[:15]
    assert rows.tolist() == order.tolist()
    assert columns.tolist() == (a @ b.T).argmax(1)[order].tolist()
    # Two perfect matches are unsure; one candidate is compared with the opposite direction.
    same = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    rows, _ = ratio_matches(same, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.7, 0.7141428]]), 2)
    assert rows.tolist() == [1, 0]
    rows, columns = ratio_matches(same, same[:1], 5)
    assert rows.tolist() == [0, 1]
    assert columns.tolist() == [0, 0]


def test_projection_and_rotation() -> None:
    turn = math.radians(40)
    pose = np.eye(4)
    pose[:3, :3] = [[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]]
    assert rotation_between(np.eye(4), pose) == pytest.approx(40)
    camera = SimpleNamespace(K=np.diag([100.0, 100.0, 1.0]), cam_from_world=np.eye(4))
    world = torch.tensor([[0.5, 0.25, 1.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    seen = project(world, camera)
    assert seen[0].tolist() == [50, 25]
    assert bool(torch.isinf(seen[1]).all())  # behind the camera


def test_frame_of_a_cropped_view() -> None:
    frame = Frame.of((40, 60), (32, 32), 0.25)
    assert frame.box == (10, 0, 50, 40)
    assert frame.grid == (10, 10)
    points = frame.points()
    assert points[0].tolist() == [12, 2]
    assert points[-1].tolist() == [48, 38]
    assert frame.inside(torch.tensor([[9.9, 5.0], [10.0, 5.0], [50.0, 5.0]])).tolist() == [False, True, False]
    view = View(torch.rand(3, 10, 10), frame)
    torch.testing.assert_close(view.at(points), view.on_grid(), atol=1e-5, rtol=1e-5)


def test_the_grid_of_a_large_photograph_is_that_of_512_pixels() -> None:
    frame = Frame.of((3024, 4032), (512, 512), 0.25)
    assert frame.grid == (128, 128)
    assert frame.points()[-1].tolist() == pytest.approx([504 + 3024 - 3024 / 256, 3024 - 3024 / 256])
    assert Frame.of((400, 500), (800, 800), 1.0).grid == (400, 400)


def test_missing_pairs_and_bad_options_raise() -> None:
    with pytest.raises(ConfigError, match="Squares has no pairs"):
        run(Oracle(), Squares(3))
    with pytest.raises(TypeError, match="has none"):
        run(Noise(spatial=False), Wall())

    class Bare(Wall):
        annotation = None  # type: ignore[assignment]

    with pytest.raises(ProbeError, match="no correspondence to measure"):
        run(Place(), Bare(points=False))
    assert set(run(Place(), Bare())) == {"pck@0.10", "pck_image@0.10"}

    class Small(Wall):
        def annotation(self, index: int) -> SimpleNamespace:
            found = super().annotation(index)
            found.depth = found.depth[:8]
            return found

    with pytest.raises(ConfigError, match=r"none of \d+ pairs .* wall/0: is 32x32 pixels and its depth \(8, 32\)"):
        run(Place(), Small())

    class Flat(Wall):
        def pairs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(first=0, second=1, points=np.zeros((4, 2)))]

    with pytest.raises(ConfigError, match=r"wall/0 -> wall/1: points have shape \(4, 2\)"):
        run(Place(), Flat())
    for options, message in (
        ({"grid": 0.0}, "grid must be above 0"),
        ({"matches": 0}, "matches must be at least 1"),
        ({"pck": []}, "pck must be a list of positive"),
        ({"metres": [-1.0]}, "metres must be a list of positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            Correspondence(**options)
