"""Every kind of image file becomes upright 8-bit RGB, or an ImageError that says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from agglo.preprocess import decode
from agglo.types import ImageError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def pixels(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    out = decode(encoded(image, kind, **options), "x")
    assert out.mode == "RGB"
    return np.asarray(out)


@pytest.fixture
def colours():
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_rgb_is_unchanged(colours):
    assert (pixels(Image.fromarray(colours)) == colours).all()


def test_greyscale_and_bilevel_are_expanded():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    assert (pixels(Image.fromarray(grey)) == grey[..., None]).all()
    bits = Image.fromarray((grey > 100).astype(np.uint8) * 255).convert("1")
    assert (pixels(bits)[..., 1] == np.where(grey > 100, 255, 0)).all()


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_is_composited_over_white(alpha, colours):
    rgba = np.dstack([colours, np.full(colours.shape[:2], alpha, np.uint8)])
    expected = colours * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(pixels(Image.fromarray(rgba)) - expected).max() <= 1
    grey = np.dstack([colours[..., 0], rgba[..., 3]])
    assert np.abs(pixels(Image.fromarray(grey, "LA")) - expected[..., :1]).max() <= 1


def test_palette_with_and_without_a_transparent_entry(colours):
    image = Image.fromarray(colours[:1, :2].repeat(2, 0)).quantize(4, dither=Image.Dither.NONE)
    assert (pixels(image) == colours[:1, :2]).all()
    clear = image.getpixel((0, 0))
    out = pixels(image, transparency=clear)
    assert (out[:, 0] == 255).all()
    assert (out[:, 1] == colours[0, 1]).all()


def test_transparent_colour_of_an_rgb_png(colours):
    out = pixels(Image.fromarray(colours), transparency=tuple(int(c) for c in colours[2, 3]))
    assert (out[2, 3] == 255).all()
    assert (out[0] == colours[0]).all()


def test_cmyk_is_the_complement():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    for kind in ("TIFF", "JPEG"):
        assert np.abs(pixels(cmyk, kind).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greyscale_keeps_its_range(kind):
    deep = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    assert pixels(Image.fromarray(deep), kind)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_32_bit_integers_that_hold_16_bit_samples():
    deep = np.array([[0, 257, 65535]], np.int32)
    assert pixels(Image.fromarray(deep), "TIFF")[0, :, 0].tolist() == [0, 1, 255]


def test_other_integer_ranges_are_stretched():
    deep = np.array([[-100, 0, 100_000]], np.int32)
    assert pixels(Image.fromarray(deep), "TIFF")[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 0.5, 1], [0, 128, 255]), ([0, 100.4, 255], [0, 100, 255]), ([-1, 0, 1], [0, 128, 255]), ([7, 7], [7, 7])],
)
def test_floats(values, expected):
    assert pixels(Image.fromarray(np.array([values], np.float32)), "TIFF")[0, :, 0].tolist() == expected


def test_constant_floats_outside_any_range_are_black():
    assert not pixels(Image.fromarray(np.full((2, 2), -3, np.float32)), "TIFF").any()


def test_nan_raises():
    with pytest.raises(ImageError, match="NaN"):
        decode(encoded(Image.fromarray(np.array([[np.nan]], np.float32)), "TIFF"), "x")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (6, 4), c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    out = pixels(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (out == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(kind, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white where a person sees the top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),  # the camera was turned: shown after a clockwise quarter turn
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = pixels(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert out.shape == upright.shape
    assert np.abs(out.astype(int) - upright).max() < 10


def test_damaged_exif_is_ignored(colours):
    out = pixels(Image.fromarray(colours), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert (out == colours).all()


def test_one_pixel_is_legal():
    assert (pixels(Image.new("RGB", (1, 1), "teal")) == [0, 128, 128]).all()


def test_result_holds_no_file_and_no_metadata(tmp_path, colours):
    exif = Image.Exif()
    exif[0x010E] = "a long description"
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    out = decode(tmp_path / "a.png")
    assert type(out) is Image.Image
    assert out.info == {}
    (tmp_path / "a.png").unlink()
    assert (np.asarray(out) == colours).all()


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def whole(kind: str) -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), kind).getvalue()


BAD = {
    "empty": (b"", "empty"),
    "text": (b"this is not an image at a", "not an image.*25 bytes.*this is"),
    "header only": (whole("JPEG")[:3], "not an image"),
    "half a jpeg": (whole("JPEG")[:1500], "truncated"),
    "half a png": (whole("PNG")[:1500], "truncated"),
    "flipped png": (whole("PNG")[:200] + b"\0" * 400 + whole("PNG")[600:], "damaged|truncated"),
    "bomb": (bomb(), "too large"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "EPS"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("from_path", [True, False])
def test_bad_files_raise_with_a_reason(name, from_path, tmp_path):
    data, why = BAD[name]
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"(?s)^holiday/bad.jpg: .*({why})") as caught:
        decode(path if from_path else io.BytesIO(data), "holiday/bad.jpg")
    assert caught.value.name == "holiday/bad.jpg"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_any_truncation_is_an_image_or_an_image_error(kind):
    data = whole(kind)
    outcomes = set()
    for end in range(0, len(data), max(1, len(data) // 40)):
        try:
            outcomes.add(decode(io.BytesIO(data[:end]), "x").size)
        except ImageError:
            outcomes.add("error")
    assert "error" in outcomes
    assert outcomes <= {"error", (64, 64)}


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        decode(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="folder"):
        decode(tmp_path)
