"""Mosaics of small views: layout, packing and unpacking, masks, and the wrapped teacher."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from agglo import recipe
from agglo.config import build
from agglo.data.mosaic import MosaicLayout, Tiling, draw_layout, pack, unpack
from agglo.objectives._wrapping import Mosaic, wrap
from agglo.recipe import TeacherEntry
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec

GREY = torch.full((3,), 0.5)


class FixedSizeTeacher(Teacher):
    """A token is a linear map of its own pixels; with ``mixing``, of the whole image too."""

    fill = (0.5, 0.25, 0.75)

    def __init__(self, side: int = 56, patch: int = 14, mixing: bool = False) -> None:
        super().__init__()
        self.side, self.mixing = side, mixing
        self.spec = FeatureSpec(summary=4, spatial=6, stride=patch, step=side)
        self.net = nn.Conv2d(3, 6, patch, patch)
        self.seen: list[Tensor] = []
        self.requires_grad_(False).eval()

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        return self.side, self.side

    def forward(self, images: Tensor) -> Features:
        assert images.shape[-2:] == (self.side, self.side)
        self.seen.append(images)
        spatial = self.net(images - torch.tensor(self.fill).view(1, 3, 1, 1))
        if self.mixing:
            spatial = spatial + spatial.mean((2, 3), keepdim=True)
        return Features(spatial.mean((2, 3))[:, :4], spatial)


# docs/method.md, 3.2: student size, side of the view in SAM3's input of 1008 pixels, views per mosaic.
TABLE = [
    (128, 112, 81), (192, 168, 36), (224, 196, 25), (256, 224, 16), (384, 336, 9), (432, 378, 4), (512, 448, 4),
    (768, 672, 1), (1024, 896, 1), (1152, 1008, 1),
]  # fmt: skip


@pytest.mark.parametrize(("size", "side", "count"), TABLE)
def test_view_sizes_in_a_mosaic_of_1008_pixels(size: int, side: int, count: int) -> None:
    mosaic = Mosaic(FixedSizeTeacher(1008), (1008, 1008))
    assert mosaic.input_size((size, size), 16) == (side, side)
    tiling = Tiling((72, 72), (side // 14, side // 14))
    assert tiling.count == count
    layout = draw_layout(tiling, count, seed=1, step=2)
    masks = layout.masks()
    assert layout.mosaics == 1
    assert int(masks.sum(0).max()) == 1, "two views share a cell"
    assert masks.flatten(1).sum(1).tolist() == [(side // 14) ** 2] * count
    starts = tiling.starts(0)  # docs/method.md, D-12: every tile has at least floor(72 / tiles) whole cells
    assert min(b - a for a, b in itertools.pairwise(starts)) == 72 // tiling.tiles[0]


def test_views_larger_than_the_mosaic_fill_it() -> None:
    mosaic = Mosaic(FixedSizeTeacher(56), (56, 56))
    assert mosaic.input_size((2048, 2048), 16) == (56, 56)


@pytest.mark.parametrize("batch", [1, 4, 7, 9])
def test_unpack_inverts_pack(batch: int) -> None:
    """With one pixel per cell, for a full mosaic, two of them, and a remainder."""
    tiling = Tiling((9, 11), (4, 3))
    images = torch.rand(batch, 3, 4, 3)
    for step in range(20):
        layout = draw_layout(tiling, batch, seed=0, step=step)
        assert layout.mosaics == -(-batch // 6)
        mosaics = pack(images, layout, 1, GREY)
        assert torch.equal(unpack(mosaics, layout), images)
        covered = torch.zeros(layout.mosaics, 9, 11, dtype=torch.bool)
        for mosaic, mask in zip(layout.mosaic, layout.masks(), strict=True):
            assert not (covered[mosaic] & mask).any()
            covered[mosaic] |= mask
        uncovered = mosaics.permute(0, 2, 3, 1)[~covered]
        assert torch.equal(uncovered, GREY.expand_as(uncovered))


def test_layout_is_a_pure_function_of_seed_and_step_and_varies() -> None:
    tiling = Tiling((9, 9), (4, 4))
    same = [draw_layout(tiling, 4, seed=3, step=5) for _ in range(2)]
    assert same[0] == same[1]
    draws = [draw_layout(tiling, 4, seed=3, step=step) for step in range(60)]
    assert len({(*p.y, *p.x) for p in draws}) > 30
    # The first image reaches every tile and every offset in it.
    assert {p.y[0] for p in draws} == {0, 4, 5}


def test_mosaic_of_one_equals_the_plain_forward_pass() -> None:
    teacher = FixedSizeTeacher(56, mixing=True)
    mosaic = Mosaic(teacher, (56, 56))
    images = torch.rand(5, 3, 56, 56)
    for step in range(3):
        mosaic.begin_step(0, step)
        out = mosaic(images)
        assert out.summary is None
        assert torch.equal(out.spatial, teacher(images).spatial)


def test_mosaic_of_one_with_a_real_teacher() -> None:
    teacher = build("teachers", {"kind": "timm", "model": "tf_efficientnet_lite0", "size": 64})
    mosaic = wrap(teacher, TeacherEntry(teacher={"kind": "timm"}, summary_weight=0, mosaic=True), "t")
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(mosaic(images).spatial, teacher(images).spatial)
        assert mosaic(images[..., :32, :32]).spatial.shape == (2, teacher.spec.spatial, 2, 2)
    assert mosaic.licence == teacher.licence


def test_features_of_a_view_do_not_depend_on_its_neighbours() -> None:
    """For a teacher whose tokens depend on their own pixels only."""
    teacher = FixedSizeTeacher(56)
    mosaic = Mosaic(teacher, (56, 56))
    views = torch.rand(6, 3, 28, 14)
    for step in range(10):
        for each in (teacher, mosaic):
            each.begin_step(7, step)
        teacher.seen.clear()
        found = mosaic(views).spatial
        assert len(teacher.seen) == 1 and len(teacher.seen[0]) == 1, "eight views fit one mosaic"
        alone = teacher.net(views - torch.tensor(teacher.fill).view(1, 3, 1, 1))
        torch.testing.assert_close(found, alone)


def test_uncovered_cells_have_the_mean_colour() -> None:
    teacher = FixedSizeTeacher(56)
    mosaic = Mosaic(teacher, (56, 56))
    mosaic(torch.ones(1, 3, 14, 14))
    image = teacher.seen[-1] - torch.tensor(teacher.fill).view(1, 3, 1, 1)
    assert int((image != 0).any(1).sum()) == 14 * 14


def test_off_by_one_layout_is_detected() -> None:
    """A tile border off the token grid would shift the unpacked features."""
    tiling = Tiling((9, 9), (4, 4))
    images = torch.rand(4, 3, 4, 4)
    layout = draw_layout(tiling, 4, seed=0, step=0)
    moved = MosaicLayout(tiling, layout.mosaics, layout.mosaic, layout.y, [max(0, x - 1) for x in layout.x])
    assert not torch.equal(unpack(pack(images, layout, 1, GREY), moved), images)


def entry(**keys) -> TeacherEntry:
    return TeacherEntry(teacher={"kind": "toy"}, **{"summary_weight": 0, **keys})


def test_incompatible_keys_are_refused() -> None:
    toy = build("teachers", {"kind": "toy"})
    with pytest.raises(ConfigError, match=r"teachers\.t\.mosaic.*summary_weight: 0"):
        wrap(FixedSizeTeacher(), entry(mosaic=True, summary_weight=1.0), "t")
    with pytest.raises(ConfigError, match=r"teachers\.t\.mosaic: this teacher takes images of any size.*`size:`"):
        wrap(toy, entry(mosaic=True), "t")
    with pytest.raises(ConfigError, match="remove one of them"):
        wrap(FixedSizeTeacher(), entry(mosaic=True, upsampler={"kind": "tiles"}), "t")
    assert wrap(toy, entry(), "t") is toy
    mosaic = Mosaic(FixedSizeTeacher(), (56, 56))
    for shape in ((60, 56), (70, 70)):
        with pytest.raises(ConfigError, match="multiples of 14 up to 56x56"):
            mosaic(torch.rand(1, 3, *shape))
    with pytest.raises(ConfigError, match="whole cells"):
        Mosaic(FixedSizeTeacher(56), (60, 60))
    with pytest.raises(ConfigError, match="does not fit a mosaic"):
        Tiling((4, 4), (5, 4))
    with pytest.raises(ValueError, match="layout is for images"):
        pack(torch.rand(2, 3, 4, 4), draw_layout(Tiling((9, 9), (4, 4)), 3, 0, 0), 1, GREY)
    with pytest.raises(ValueError, match="mosaics"):
        unpack(torch.rand(2, 3, 9, 9), draw_layout(Tiling((9, 9), (4, 4)), 3, 0, 0))


@pytest.mark.training
def test_recipe_with_a_mosaic_trains(tmp_path) -> None:
    from agglo.training.loop import train_model

    loaded = recipe.load(
        "quickstart",
        ["teachers={lite0: {kind: timm, size: 64, summary: false, mosaic: true, summary_weight: 0}}",
         "partitions=[{sizes: [32], batch: 8}]", "data.sources=[{kind: photos, split: train}]",
         "data.views.canvas=null", "evals=[]", "train.steps=2", "targets.estimate_images=32"],
        smoke=True,
    )  # fmt: skip
    model = train_model(loaded, tmp_path / "run", quiet=True)
    assert model(torch.rand(1, 3, 32, 32)).heads["lite0"].spatial.shape[1:] == (112, 2, 2)


def test_neighbours_differ_at_every_step() -> None:
    """Features of a mixing teacher therefore differ from step to step."""
    mosaic = Mosaic(FixedSizeTeacher(56, mixing=True), (56, 56))
    views = torch.rand(20, 3, 14, 14)
    mosaic.begin_step(0, 0)
    first = mosaic(views).spatial
    assert torch.equal(mosaic(views).spatial, first)
    mosaic.begin_step(0, 1)
    assert not torch.allclose(mosaic(views).spatial, first)
