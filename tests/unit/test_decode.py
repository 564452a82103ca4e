"""Every kind of image file becomes upright 8-bit RGB, or an ImageError with the reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from agglo.decoding import decode
from agglo.preprocess import fit, load_image, read_image
from agglo.types import ImageError
from support.datasets import small_png


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


def upside(orientation: int, stored: np.ndarray, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(stored), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})).getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_pixels_are_read_without_orientation(kind, orientation):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = 255
    out = np.asarray(decode(upside(orientation, stored, kind), "x", upright=False))
    assert out.shape == stored.shape
    assert np.abs(out.astype(int) - stored).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("upright", [True, False])
def test_size_of_the_ground_truth_chooses_the_frame_of_a_sideways_image(kind, upright):
    data = upside(6, np.zeros((16, 32, 3), np.uint8), kind)
    assert decode(data, "x", upright=upright, size=(16, 32)).size == (32, 16)
    assert decode(data, "x", upright=upright, size=(32, 16)).size == (16, 32)
    assert decode(data, "x", upright=upright, size=(9, 9)).size == ((16, 32) if upright else (32, 16))


def tag(data: bytes, kind: bytes, content: bytes, *, broken: bool = False) -> bytes:
    """A PNG with one more chunk behind its header."""
    check = zlib.crc32(kind + content) + broken
    return data[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check) + data[33:]


def segment(data: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with one more segment behind its first marker."""
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def test_damaged_metadata_costs_no_readable_image(colours):
    png = encoded(Image.fromarray(colours)).getvalue()
    jpeg = encoded(Image.fromarray(colours), "JPEG").getvalue()
    plain = np.asarray(decode(jpeg, "x"))
    for kind, content in ((b"tEXt", b"a"), (b"eXIf", b"MM"), (b"iCCP", b"x"), (b"pHYs", b"1"), (b"gAMA", b"1")):
        for broken in (False, True):
            assert (np.asarray(decode(tag(png, kind, content, broken=broken), "x")) == colours).all()
    long = b"k\0\0" + zlib.compress(bytes(1 << 21))  # Pillow refuses texts above a megabyte
    assert (np.asarray(decode(tag(png, b"zTXt", long), "x")) == colours).all()
    for marker, content in (
        (0xE1, b"Exif\0\0II"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xEE, b"Adobe"),
        (0xE0, b"JFIF\0"),
        (0xFE, b""),
    ):
        assert (np.asarray(decode(segment(jpeg, marker, content), "x")) == plain).all()


def test_damaged_comment_leaves_the_orientation():
    stored = np.zeros((16, 32, 3), np.uint8)
    assert decode(tag(upside(6, stored, "PNG"), b"tEXt", b"a", broken=True), "x").size == (16, 32)
    assert decode(segment(upside(6, stored), 0xE2, b"ICC_PROFILE\0"), "x").size == (16, 32)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of corrupt EXIF
@pytest.mark.parametrize("seed", range(8))
def test_random_exif_costs_no_readable_image(seed, colours):
    rng = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    image = Image.fromarray(colours)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = bytearray(exif.tobytes())
        for at in rng.integers(6, len(data), 6):
            data[at] = rng.integers(256)
        file = encoded(image, kind, exif=bytes(data)).getvalue()
        assert decode(file, "x").size == read_image(Image.open(io.BytesIO(file))).size


def test_wrong_offset_of_the_exif_directory_of_a_tiff(colours):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, colours, photometric="rgb", extratags=[(34665, 4, 1, 0x7FFFFFFF, True)])
    assert (np.asarray(decode(file.getvalue(), "x")) == colours).all()


ARRAYS = {
    "uint8": np.arange(60, dtype=np.uint8).reshape(4, 5, 3),
    "uint16": np.arange(20, dtype=np.uint16).reshape(4, 5) * 3276,
    "float32": np.arange(20, dtype=np.float32).reshape(4, 5) / 20,
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ARRAYS)
@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dark", [True, False])
def test_tiff_layouts_are_read_rightly_or_refused(order, dtype, layout, packed, dark):
    """Each of these is right, or refused by name: Pillow reads several of them as other pixels without an error."""
    tifffile = pytest.importorskip("tifffile")
    array = ARRAYS[dtype]
    for channels in (1, 2, 3):
        colour = channels == 3
        if not dark and colour:
            continue
        grey = array if array.ndim == 2 else array[..., 0]
        values = np.stack([grey] * channels, -1) if channels > 1 else grey
        stored = np.moveaxis(values, -1, 0) if channels > 1 and layout == "separate" else values
        file = io.BytesIO()
        tifffile.imwrite(
            file, stored, byteorder=order, photometric="rgb" if colour else "minisblack" if dark else "miniswhite",
            planarconfig=layout if channels > 1 else None, compression="deflate" if packed else None,
            extrasamples=["unspecified"] if channels == 2 else None,
        )  # fmt: skip
        scale = {"uint8": 1, "uint16": 1 / 257, "float32": 255}[dtype]
        expected = grey * scale if dark else 255 - grey * scale
        try:
            out = np.asarray(decode(file.getvalue(), "x")).astype(float)
        except ImageError:
            continue
        if channels != 2:  # a second channel may be alpha
            assert np.abs(out - expected[..., None]).max() <= 1.6


@pytest.mark.parametrize(
    ("dtype", "order", "options", "why"),
    [
        ("float32", ">", {"compression": "deflate"}, "compressed big-endian 32-bit"),
        ("uint16", "<", {"photometric": "miniswhite"}, "16-bit samples in which 0 is white"),
        ("int8", "<", {}, "signed 8-bit"),
        ("int16", ">", {}, "big-endian signed 16-bit"),
    ],
)
def test_tiff_layouts_that_pillow_reads_wrongly_are_named(dtype, order, options, why):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 5), dtype), byteorder=order, **options)
    with pytest.raises(ImageError, match=f"TIFF with {why}.*is not supported; save it as PNG"):
        decode(file.getvalue(), "x")
    with pytest.raises(ImageError, match=f"TIFF with {why}"):
        read_image(Image.open(file))


def test_unsigned_samples_that_pillow_loads_as_negative_are_named():
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, np.array([[0, 2**31 - 1]], np.uint32))
    assert np.asarray(decode(file.getvalue(), "x"))[0, :, 0].tolist() == [0, 255]
    file = io.BytesIO()
    tifffile.imwrite(file, np.array([[0, 2**31]], np.uint32))
    for form in (file.getvalue(), Image.open(file)):
        with pytest.raises(ImageError, match="unsigned samples from 2147483648 is not supported"):
            read_image(form)


def test_twelve_bits_per_sample_are_named(tmp_path):
    """Pillow loads 4095, white, as 4095 of 65535."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 6), 4095, np.uint16))
    data = bytearray((tmp_path / "a.tif").read_bytes())
    at = data.index((258).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    data[at + 8 : at + 10] = (12).to_bytes(2, "little")
    with pytest.raises(ImageError, match="TIFF with 12-bit samples is not supported"):
        decode(bytes(data), "x")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_with_a_transparent_level(bits):
    levels = np.arange(2**bits, dtype=np.uint8)[None]
    file = small_png(levels, bits, transparent=1)
    expected = np.where(levels == 1, 255, levels * (255 // (2**bits - 1)))
    assert np.asarray(decode(file, "x"))[..., 0].tolist() == expected.tolist()


def test_transparent_level_of_16_bits():
    file = small_png(np.array([[0, 1000, 65535]]), 16, transparent=1000)
    assert np.asarray(decode(file, "x"))[0, :, 0].tolist() == [0, 255, 255]


ONE_DOOR = np.kron(np.random.default_rng(3).integers(0, 256, (2, 3, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_image_has_the_same_pixels_in_every_form(tmp_path, orientation):
    data = upside(orientation, ONE_DOOR, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    expected = np.asarray(decode(data, "x"))
    with (tmp_path / "a.png").open("rb") as file, Image.open(tmp_path / "a.png") as image:
        forms = [
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            file,
            image,
        ]
        forms += [image.copy(), expected, expected[::-1][::-1], torch.from_numpy(expected.copy()).permute(2, 0, 1)]
        for form in forms:
            assert (np.asarray(read_image(form)) == expected).all()
            assert (load_image(form).mul(255).round().byte().permute(1, 2, 0).numpy() == expected).all()
            assert image.size == (24, 16)  # the caller's image is not changed
    assert (
        np.asarray(fit(Image.open(tmp_path / "a.png"), expected.shape[:2])) * 255 == expected.transpose(2, 0, 1)
    ).all()


def test_sixteen_bits_have_the_same_pixels_in_every_form(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (6, 7)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep).save(tmp_path / "a.tif")
    expected = np.rint(deep / 257)
    for form in (tmp_path / "a.png", tmp_path / "a.tif", Image.open(tmp_path / "a.png"), deep, deep.astype(">u2")):
        assert (np.asarray(read_image(form))[..., 0] == expected).all()
        assert np.abs(load_image(form)[0].numpy() * 255 - expected).max() < 1e-4


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ImageError, match="pipe or a device"):
            decode(path)


def test_existing_paths_are_taken_literally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~", "~nobody", "$HOME.png", "a[1]*.png"):
        Image.new("RGB", (2, 3)).save(name, "PNG")
        assert read_image(name).size == (2, 3)


def test_heic_files_are_named():
    with pytest.raises(ImageError, match=r"HEIC files cannot be read; convert"):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
