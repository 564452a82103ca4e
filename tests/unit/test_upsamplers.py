"""Upsamplers: their contract, FeatSharp's parts against closed forms, its weights on disk."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agglo import recipe
from agglo.config import build, kinds
from agglo.nn.homography import CORNERS, from_corners, inside_mask, warp
from agglo.nn.neighbourhood import local_attention
from agglo.objectives._wrapping import Upsampled, wrap
from agglo.preprocess import resize
from agglo.recipe import TeacherEntry
from agglo.teachers.base import Teacher
from agglo.types import AssetError, ConfigError, Features, FeatureSpec, StorageError
from agglo.upsamplers.featsharp import BIAS_GAIN, FeatSharp, Fusion, Guided, primes
from agglo.upsamplers.tiles import split, stitch

SIZE = (16, 16)


class Square(Teacher):
    """A teacher of one size whose cells are linear maps of their own pixels, plus a fixed pattern."""

    def __init__(self, pattern: float = 0.0, summary: int | None = 5) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 8, 4, 4)
        self.pattern = pattern * torch.randn(8, 4, 4)
        self.pattern -= self.pattern.mean((1, 2), keepdim=True)
        self.spec = FeatureSpec(summary=summary, spatial=8, stride=4, step=16)
        self.licence = "CC0"
        self.calls: list[int] = []
        self.requires_grad_(False).eval()

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        return SIZE

    def forward(self, images: Tensor) -> Features:
        assert images.shape[-2:] == SIZE
        self.calls.append(len(images))
        spatial = self.net(images) + self.pattern
        return Features(None if self.spec.summary is None else spatial.mean((2, 3))[:, :5], spatial)


def featsharp(teacher: Teacher, factor: int = 2, **keys: Any) -> FeatSharp:
    """With statistics, and random values in all weights that start at zero."""
    made = FeatSharp(teacher.spec, SIZE, factor=factor, **keys)
    made.normalizer.update(teacher(torch.rand(16, 3, *SIZE)).spatial)
    made.normalizer.freeze()
    with torch.no_grad():
        for parameter in (made.bias, made.tile_bias, made.fusion.scales):
            parameter.normal_(0, 0.1)
    return made.eval()


# --- every kind ---


@pytest.mark.parametrize("kind", kinds("upsamplers", installed=False))
@pytest.mark.parametrize("factor", [2, 3])
def test_every_kind_keeps_the_contract(kind: str, factor: int) -> None:
    teacher = Square()
    upsampler = featsharp(teacher, factor) if kind == "featsharp" else build(
        "upsamplers", {"kind": kind, "factor": factor}, teacher.spec, SIZE
    )  # fmt: skip
    assert (upsampler.grid, upsampler.finer) == ((4, 4), (4 * factor, 4 * factor))
    images = torch.rand(3, 3, 16 * factor, 16 * factor)
    with torch.inference_mode():
        out = upsampler(teacher, images)
        assert out.spatial.shape == (3, 8, 4 * factor, 4 * factor)
        assert torch.isfinite(out.spatial).all()
        low = teacher(resize(images, SIZE))
        torch.testing.assert_close(out.summary, low.summary)
        assert upsampler.plain(teacher, images[..., :16, :16]).spatial.shape == (3, 8, 4, 4)
        assert upsampler(Square(summary=None), images).summary is None
    with pytest.raises(ConfigError, match=f"{16 * factor}x{16 * factor} pixels, {factor} times"):
        upsampler(teacher, torch.rand(1, 3, 16, 16))
    for bad in (0, 1):
        with pytest.raises(ConfigError, match="at least 2"):
            build("upsamplers", {"kind": kind, "factor": bad}, teacher.spec, SIZE)
    for spec in (FeatureSpec(5, None), FeatureSpec(5, 8, stride=5)):
        with pytest.raises(ConfigError, match="map of whole cells"):
            build("upsamplers", {"kind": kind}, spec, SIZE)
    if kind != "featsharp":
        with pytest.raises(TypeError, match="no trained weights"):
            upsampler.save("nowhere")


def test_tiles_of_a_local_teacher_equal_the_whole_image() -> None:
    """A swap of rows and columns would differ."""
    teacher = Square()
    images = torch.rand(2, 3, 48, 48)
    found = build("upsamplers", {"kind": "tiles", "factor": 3}, teacher.spec, SIZE)(teacher, images).spatial
    wanted = teacher.net(images)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, wanted.mT)
    assert torch.equal(stitch(split(images, 3), 3), images)


def test_bilinear_of_a_ramp_is_a_ramp() -> None:
    teacher = Square()
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    found = build("upsamplers", {"kind": "bilinear"}, teacher.spec, SIZE)(teacher, ramp).spatial[0, 0, 3, 1:-1]
    torch.testing.assert_close(
        found.diff(), found.diff().mean().expand(5), rtol=0.03, atol=0
    )  # border effects of the resize


# --- FeatSharp ---


def test_initial_output_is_the_mean_of_guided_map_and_tiles() -> None:
    teacher = Square()
    made = FeatSharp(teacher.spec, SIZE, factor=2)
    made.normalizer.load_state_dict(featsharp(teacher).normalizer.state_dict())
    with torch.no_grad():
        made.fusion.scales.zero_()
        images = torch.rand(2, 3, 32, 32)
        features = made.encode(teacher, images)
        guided = made.guided[0](made.normalizer(features.low), images)
        tiles = stitch(made.normalizer(features.tiles), 2)
        torch.testing.assert_close(made.sharpen(images, features), (guided + tiles) / 2)


@pytest.mark.parametrize("factor", [2, 3])
def test_output_is_in_the_teachers_space(factor: int) -> None:
    """Every cell of an image of one colour has the teacher's features of that colour."""
    teacher = Square()
    made = featsharp(teacher, factor)
    with torch.no_grad():
        for parameter in (made.bias, made.tile_bias, made.fusion.scales):
            parameter.zero_()
        flat = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 16 * factor, 16 * factor)
        expected = teacher(flat[..., :16, :16]).spatial
        found = made(teacher, flat).spatial
        torch.testing.assert_close(found, expected[..., :1, :1].expand_as(found), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made.plain(teacher, flat[..., :16, :16]).spatial, expected, rtol=1e-4, atol=1e-4)


def test_heads_decay_alternately_with_rows_and_columns() -> None:
    """docs/method.md, 4.1: head ``h`` loses ``2^-((h + 2) // 2)`` per row if ``h`` is even, per column if it is odd."""
    distances = Fusion(16, 4).distances
    assert distances.shape == (4, 7, 7) and bool((distances[:, 3, 3] == 0).all())
    down, across = distances[:, :, 3], distances[:, 3]
    steps = torch.tensor([3.0, 2, 1, 0, 1, 2, 3])
    for head, slope in enumerate((0.5, 0.5, 0.25, 0.25)):
        assert torch.equal(down[head], -slope * steps * (head % 2 == 0))
        assert torch.equal(across[head], -slope * steps * (head % 2 == 1))


def test_teacher_runs_once_on_one_plus_u_squared_images() -> None:
    teacher = Square()
    made = featsharp(teacher, 3)
    teacher.calls.clear()
    made(teacher, torch.rand(2, 3, 48, 48))
    assert teacher.calls == [2 * (1 + 9)]


def test_bias_removes_a_fixed_pattern() -> None:
    """With ``b = -N(pattern)`` both the finer map and the plain pass equal those of the clean teacher."""
    dirty = Square(pattern=1.0)
    clean = Square()
    clean.net.load_state_dict(dirty.net.state_dict())
    made = featsharp(clean)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        made.bias.zero_()
        wanted, plain = made(clean, images).spatial, made.plain(clean, images[..., :16, :16]).spatial
        before = (made(dirty, images).spatial - wanted).abs().max()
        made.bias.copy_(-made.normalizer.multiply(made.normalizer.whiten, dirty.pattern[None])[0] / BIAS_GAIN)
        torch.testing.assert_close(made(dirty, images).spatial, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made.plain(dirty, images[..., :16, :16]).spatial, plain, rtol=1e-4, atol=1e-4)
    assert before > 0.1


def test_every_parameter_gets_a_gradient() -> None:
    teacher = Square()
    made = featsharp(teacher, 6)
    images = torch.rand(1, 3, 96, 96)
    made.sharpen(images, made.encode(teacher, images)).square().mean().backward()
    missing = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize(("number", "found"), [(2, [2]), (3, [3]), (4, [2, 2]), (6, [2, 3]), (7, [7])])
def test_prime_factors(number: int, found: list[int]) -> None:
    assert primes(number) == found


def test_guided_upsampling_keeps_constants_and_follows_edges() -> None:
    stage = Guided(2)
    constant = torch.full((1, 2, 5, 5), 3.0)
    torch.testing.assert_close(stage(constant, torch.rand(1, 3, 20, 20)), torch.full((1, 2, 10, 10), 3.0))
    with torch.no_grad():  # a guide that separates black from white only
        stage.colours = nn.Conv2d(3, 2, 1)
        stage.colours.weight.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])[..., None, None])
        stage.colours.bias.zero_()
        stage.temperature.fill_(math.log(20.0))
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1
    sharp = stage(step, image)[0, 0, 4]
    blurred = F.interpolate(step, (8, 8), mode="bilinear")[0, 0, 4]
    assert sharp[3] < blurred[3] / 1.5 and 1 - sharp[4] < (1 - blurred[4]) / 1.5


# --- local attention ---


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """One query at a time."""
    radius = bias.shape[-1] // 2
    out = torch.zeros(*q.shape[:4], v.shape[-1], dtype=v.dtype)
    height, width = q.shape[2:4]
    for y in range(height):
        for x in range(width):
            rows, columns = (
                range(max(0, y - radius), min(height, y + radius + 1)),
                range(max(0, x - radius), min(width, x + radius + 1)),
            )
            near = [(i, j) for i in rows for j in columns]
            scores = torch.stack(
                [(q[:, :, y, x] * k[:, :, i, j]).sum(-1) + bias[:, i - y + radius, j - x + radius] for i, j in near], -1
            )
            out[:, :, y, x] = (scores.softmax(-1)[..., None] * torch.stack([v[:, :, i, j] for i, j in near], 2)).sum(2)
    return out


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (11, 3), (17, 9)])
@pytest.mark.parametrize("learned", [False, True])
def test_local_attention_equals_the_plain_sum(size: tuple[int, int], learned: bool) -> None:
    q, k = (torch.randn(2, 3, *size, 4, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 3, *size, 6, dtype=torch.float64)
    bias = torch.randn(3, 7, 7, dtype=torch.float64, requires_grad=learned)
    found = local_attention(q, k, v, bias)
    wanted = plain_attention(q, k, v, bias)
    torch.testing.assert_close(found, wanted)
    if learned:
        (one,) = torch.autograd.grad(found.square().sum(), bias)
        (other,) = torch.autograd.grad(wanted.square().sum(), bias)
        torch.testing.assert_close(one, other)


# --- homographies ---


def test_homographies_map_the_corners() -> None:
    corners = torch.tensor(CORNERS, dtype=torch.float64) * 0.7 + 0.1 * torch.rand(5, 4, 2, dtype=torch.float64)
    matrix = from_corners(corners)
    points = torch.cat([torch.tensor(CORNERS, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)], 1)
    moved = torch.einsum("nij,cj->nci", matrix, points)
    torch.testing.assert_close(moved[..., :2] / moved[..., 2:], corners)


def test_warp_by_whole_cells_is_a_slice() -> None:
    """docs/method.md, D-16: with cell centres, a window of half the side is a slice; cells outside are marked."""
    x = torch.rand(1, 2, 8, 8)

    def window(left: float, top: float) -> Tensor:
        box = torch.tensor([[left, top], [left + 1, top], [left + 1, top + 1], [left, top + 1]], dtype=torch.float64)
        return from_corners(box[None])

    torch.testing.assert_close(warp(x, window(-0.5, -0.25), (4, 4)), x[..., 3:7, 2:6])
    assert bool(inside_mask(window(-0.5, -0.25), (4, 4)).all())
    outside = inside_mask(window(-1.5, 0), (4, 4))[0, 0]
    assert outside.tolist() == [[False, False, True, True]] * 4


# --- weights ---


def test_weights_round_trip(tmp_path: Path) -> None:
    teacher = Square()
    made = featsharp(teacher)
    folder = made.save(tmp_path / "run" / "model")
    images = torch.rand(1, 3, 32, 32)
    for place in (folder, tmp_path / "run"):
        again = FeatSharp(teacher.spec, SIZE, factor=2, weights=str(place))
        assert again.trained
        assert torch.equal(again(teacher, images).spatial, made(teacher, images).spatial)
    assert not FeatSharp(teacher.spec, SIZE).trained
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes["upsampler.safetensors"] == modes["upsampler.json"], "other users must be able to read a shared run"


def test_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Square()
    made, folder = featsharp(teacher), tmp_path / "model"
    before = made.save(folder).joinpath("upsampler.safetensors").read_bytes()
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        real(path, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with torch.no_grad():
        made.bias.add_(1)
    with pytest.raises(StorageError, match=r"No space left.*free some space"):
        made.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["upsampler.json", "upsampler.safetensors"]
    assert (folder / "upsampler.safetensors").read_bytes() == before


def test_loading_refuses_weights_that_do_not_fit(tmp_path: Path) -> None:
    teacher = Square()
    folder = featsharp(teacher).save(tmp_path / "made")
    with pytest.raises(ConfigError, match="factor: 2 instead of 3"):
        FeatSharp(teacher.spec, SIZE, factor=3, weights=str(folder))
    with pytest.raises(ConfigError, match=r"objective: \{kind: upsample\}"):
        FeatSharp(teacher.spec, SIZE, weights=str(tmp_path))
    (folder / "upsampler.safetensors").write_bytes(b"short")
    with pytest.raises(AssetError, match="cannot be read"):
        FeatSharp(teacher.spec, SIZE, weights=str(folder))
    whole = featsharp(teacher)
    del whole.tile_bias
    whole.save(folder)
    with pytest.raises(AssetError, match="damaged"):
        FeatSharp(teacher.spec, SIZE, weights=str(folder))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="free some space"):
        featsharp(teacher).save(tmp_path / "file" / "below")
    assert json.loads((folder / "upsampler.json").read_text())["size"] == [16, 16]


# --- as a teacher ---


def entry(**keys: Any) -> TeacherEntry:
    return TeacherEntry(teacher={"kind": "toy"}, upsampler=keys)


def test_wrapped_teacher_uses_the_finer_size_for_large_students() -> None:
    """SigLIP2 in docs/method.md, 3.2: 24 x 24 cells up to a student of 432 pixels, 72 x 72 from 512 on."""

    class Large(Square):
        def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
            return 384, 384

    large = Large()
    large.spec = FeatureSpec(summary=5, spatial=8, stride=16, step=384)
    teacher = wrap(large, entry(kind="tiles", factor=3), "t")
    for size in (128, 192, 224, 256, 384, 432):
        assert teacher.input_size((size, size), 16) == (384, 384)
    for size in (512, 768, 1024, 1152):
        assert teacher.input_size((size, size), 16) == (1152, 1152)
    assert teacher.spec.stride == 16 and teacher.spec.step == 384


def test_wrapped_teacher_runs_at_both_sizes(tmp_path: Path) -> None:
    square = Square()
    made = featsharp(square)
    teacher = wrap(square, entry(kind="featsharp", weights=str(made.save(tmp_path))), "t")
    assert isinstance(teacher, Upsampled) and teacher.licence == "CC0"
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(teacher(images).spatial, made(square, images).spatial)
        small = images[..., :16, :16]
        assert torch.equal(teacher(small).spatial, made.plain(square, small).spatial)
    teacher.train()
    assert not any(module.training for module in teacher.modules())


def test_wrap_refuses_unusable_teachers() -> None:
    with pytest.raises(ConfigError, match=r"teachers\.t\.upsampler.*untrained.*`weights:`"):
        wrap(Square(), entry(kind="featsharp"), "t")
    with pytest.raises(ConfigError, match="any size"):
        wrap(build("teachers", {"kind": "toy"}), entry(kind="tiles"), "t")
    blind = Square()
    blind.spec = FeatureSpec(summary=5, spatial=None)
    with pytest.raises(ConfigError, match="no map to upsample"):
        wrap(blind, entry(kind="tiles"), "t")
    with pytest.raises(ConfigError, match="did you mean 'featsharp'"):
        recipe.load("quickstart", ["teachers.hog.upsampler={kind: featshrap}"])


def test_siglip2_at_its_real_size() -> None:
    """docs/method.md, 1.5 and 4: 24 x 24 cells of 1536 channels become 72 x 72."""
    with torch.device("meta"):
        made = FeatSharp(FeatureSpec(1536, 1536, stride=16, step=384), (384, 384), factor=3)
    assert (made.larger, made.finer) == ((1152, 1152), (72, 72))
    assert made.fusion.heads == 16
    assert 90e6 < sum(parameter.numel() for parameter in made.fusion.parameters()) < 110e6
    assert made.bias.shape == (1536, 24, 24)
