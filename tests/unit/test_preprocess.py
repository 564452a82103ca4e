"""Tensors, legal sizes and the conditioner."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agglo.preprocess import (
    Conditioner,
    aspect_size,
    check_size,
    crop_box,
    crop_map,
    fit,
    legal_sizes_near,
    load_image,
    nearest_size,
    resize,
    snap,
    to_batch,
    to_tensor,
)
from agglo.types import ImageError

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(RGB.transpose(2, 0, 1).astype(np.float64) / 255).float()


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RGB),
        RGB,
        RGB[::-1].copy()[::-1],  # negative strides
        RGB.astype(np.uint16) * 257,
        (RGB / 255).astype(np.float64),
        (RGB / 255).astype(np.float32),
        torch.from_numpy(RGB).permute(2, 0, 1),
        EXPECTED,
        EXPECTED.double(),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)
def test_all_image_types_give_the_same_tensor(image):
    out = to_tensor(image)
    assert out.dtype == torch.float32
    assert out.shape == (3, 4, 6)
    assert out.is_contiguous()
    torch.testing.assert_close(out, EXPECTED, atol=1e-7, rtol=0)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_matrix_is_an_array():
    grey = np.asmatrix(RGB[..., 0])
    torch.testing.assert_close(to_tensor(grey), to_tensor(RGB[..., 0]))


def test_grey_and_alpha():
    grey = RGB[..., 0]
    for image in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None], Image.fromarray(grey)):
        torch.testing.assert_close(to_tensor(image), EXPECTED[:1].expand(3, -1, -1))
    rgba = np.dstack([RGB, np.full(RGB.shape[:2], 51, np.uint8)])
    torch.testing.assert_close(to_tensor(rgba), EXPECTED * 0.2 + 0.8)
    torch.testing.assert_close(to_tensor(torch.from_numpy(rgba).permute(2, 0, 1)), EXPECTED * 0.2 + 0.8)
    torch.testing.assert_close(to_tensor(Image.fromarray(rgba)), EXPECTED * 0.2 + 0.8, atol=1 / 255, rtol=0)
    assert to_tensor(np.array([[True, False]]))[1].tolist() == [[1, 0]]


def test_tiny_overshoot_of_resampling_is_clamped():
    assert to_tensor(torch.tensor([[1.0004, -0.0004]])).aminmax() == (0, 1)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (RGB.astype(np.float32), "divide by 255"),
        ((RGB / 127.5 - 1).astype(np.float32), "not normalised"),
        (RGB.astype(np.int64), "int64.*cast to uint8"),
        (RGB.transpose(2, 0, 1), r"transpose\(1, 2, 0\)"),
        (torch.from_numpy(RGB), r"permute\(2, 0, 1\)"),
        (RGB[None], "one image at a time"),
        (EXPECTED[None], "one image at a time"),
        (np.zeros((7, 6, 5), np.uint8), "expected"),
        (np.zeros(4, np.uint8), "expected"),
        (torch.zeros(5, 4, 6), "expected"),
        (np.zeros((0, 6, 3), np.uint8), "no pixels"),
        (torch.zeros(3, 0, 4), "no pixels"),
        (np.full((2, 2), np.nan, np.float32), "NaN"),
        (torch.full((3, 2, 2), float("inf")), "infinity"),
    ],
)
def test_bad_images_raise_with_a_hint(image, why):
    with pytest.raises(ImageError, match=why):
        to_tensor(image)


def test_other_types_are_type_errors():
    for call in (to_tensor, load_image):
        with pytest.raises(TypeError, match="list"):
            call([[0, 1]])


def test_load_image_reads_paths_and_files_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.ascontiguousarray(RGB[::-1, ::-1])).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        forms = [str(tmp_path / "a.png"), tmp_path / "a.png", io.BytesIO((tmp_path / "a.png").read_bytes()), opened]
        for form in forms:
            torch.testing.assert_close(load_image(form), EXPECTED)
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        load_image(tmp_path / "nowhere.png")


def test_truncated_pil_image_is_an_image_error(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with Image.open(tmp_path / "b.png") as opened:
        for call in (to_tensor, load_image):
            with pytest.raises(ImageError, match="truncated"):
                call(opened)


def test_batches():
    batch = torch.from_numpy(RGB).permute(2, 0, 1)[None]
    torch.testing.assert_close(to_batch(batch), EXPECTED[None])
    assert to_batch(batch[:, :1]).shape == (1, 3, 4, 6)
    with pytest.raises(ImageError, match=r"permute\(0, 3, 1, 2\)"):
        to_batch(torch.from_numpy(RGB)[None])
    with pytest.raises(ImageError, match="divide by 255"):
        to_batch(batch.float())
    with pytest.raises(ImageError, match="no pixels"):
        to_batch(batch[:0])
    with pytest.raises(ImageError, match="expected"):
        to_batch(EXPECTED)


@given(side=st.integers(1, 5000), step=st.integers(1, 64))
def test_legal_sizes(side, step):
    lower, upper = legal_sizes_near(side, step)
    legal = [k * step for k in range(1, side // step + 3)]
    below = [s for s in legal if s <= side]
    assert lower == (below[-1] if below else step)
    assert upper == min(s for s in legal if s >= side)
    near, _ = nearest_size((side, step), step)
    assert near in legal
    assert abs(near - side) == min(abs(s - side) for s in legal)
    if side % step:
        with pytest.raises(ValueError, match=f"width {side} .*{lower}.*"):
            check_size(step, side, step)
    else:
        check_size(side, step, step)


def test_size_ties_round_to_even_multiples():
    assert nearest_size((24, 40), 16) == (32, 32)  # 1.5 and 2.5 steps
    assert nearest_size((1, 7), 16) == (16, 16)


def test_check_size_names_both_sides():
    with pytest.raises(ValueError, match=r"220x230.*height 220 and width 230.*16.*208 or 224.*224 or 240"):
        check_size(220, 230, 16)
    with pytest.raises(ValueError, match="height 0"):
        check_size(0, 16, 16)
    with pytest.raises(ValueError, match="step"):
        nearest_size((4, 4), 0)


def test_snap():
    images = torch.rand(2, 3, 32, 48)
    assert snap(images, 16) is images
    assert resize(images, (32, 48)) is images
    out = snap(torch.rand(2, 3, 50, 30), 16)
    assert out.shape == (2, 3, 48, 32)
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    half = resize(ramp, (32, 32))[0, 0, 0]
    torch.testing.assert_close(half[4:-4], ramp[0, 0, 0].view(32, 2).mean(1)[4:-4])  # a linear ramp stays linear
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    flat = resize(board.float().expand(1, 3, 64, 64), (16, 16))
    assert (flat - 0.5).abs().max() < 0.05  # antialiased: a checkerboard is grey, not aliased


def test_conditioner():
    conditioner = Conditioner((0.5, 0.4, 0.3), (0.1, 0.2, 0.25))
    x = torch.rand(2, 3, 4, 5)
    expected = (x.double().numpy() - np.reshape([0.5, 0.4, 0.3], (3, 1, 1))) / np.reshape([0.1, 0.2, 0.25], (3, 1, 1))
    np.testing.assert_allclose(conditioner(x).numpy(), expected, atol=1e-5)
    assert {k: tuple(v.shape) for k, v in conditioner.state_dict().items()} == {
        "mean": (3, 1, 1),
        "std": (3, 1, 1),
    }
    with pytest.raises(ValueError, match="three"):
        Conditioner((0.5,), (0.5,))
    with pytest.raises(ValueError, match="positive"):
        Conditioner((0, 0, 0), (1, 0, 1))


def test_sizes_that_keep_the_aspect() -> None:
    assert aspect_size((300, 600), (224, 224), 16) == (224, 448)
    assert aspect_size((300, 600), (224, 224), 16, inside=True) == (112, 224)
    assert aspect_size((600, 300), (224, 448), 1) == (896, 448)  # covers both sides
    assert aspect_size((10, 1000), (32, 32), 16, inside=True) == (16, 32)  # never less than a step


WIDE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(24, 24), (30, 30), (16, 40), (30, 50)])
def test_fit_crops_the_centre(size: tuple[int, int]) -> None:
    box = crop_box((30, 50), size)
    expected = to_tensor(WIDE.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))
    found = fit(WIDE, size)
    assert found.shape == (3, *size)
    assert torch.equal(found, expected)
    assert crop_map(np.asarray(WIDE)[..., 0], size).shape == (box[3] - box[1], box[2] - box[0])


def test_fit_stretches_the_whole_image() -> None:
    assert torch.equal(fit(WIDE, (20, 20), "stretch"), to_tensor(WIDE.resize((20, 20), Image.Resampling.BICUBIC)))
    linear = fit(WIDE, (20, 20), "stretch", resample=Image.Resampling.BILINEAR)
    assert torch.equal(linear, to_tensor(WIDE.resize((20, 20), Image.Resampling.BILINEAR)))
    assert torch.equal(fit(WIDE, (30, 50), "stretch"), to_tensor(WIDE))


def test_fit_pads_at_the_right_and_the_bottom() -> None:
    found = fit(WIDE, (25, 25), "pad", fill=(0.1, 0.2, 0.3))
    assert torch.equal(found[:, :15], fit(WIDE, (15, 25), "stretch"))
    assert torch.equal(found[:, 15:], torch.tensor((0.1, 0.2, 0.3))[:, None, None].expand(3, 10, 25))
