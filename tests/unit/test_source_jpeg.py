"""Partial reading: the same pixels as whole images, or as close as shrinking allows."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from agglo.data import pixels
from agglo.data.loader import Loader
from agglo.data.pixels import align_view, resample
from agglo.data.views import Partition, _shuffled, draw_view, generator, image_at, render
from agglo.preprocess import decode
from agglo.recipe import Views
from agglo.sources import _encoded, _jpeg
from agglo.sources._encoded import EncodedSource
from agglo.sources.base import PartialImage, ReadRequest, Source
from agglo.sources.folder import Folder
from agglo.sources.photos import Photos
from agglo.types import ImageError


class Files(EncodedSource):
    """Encoded images in memory."""

    def __init__(self, *files, **options):
        super().__init__(**options)
        self.files = files

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return f"files/{index}"

    def encoded(self, index):
        return self.files[index]


def photo(name="coffee"):
    source = Photos(split="all")
    return source.read([source.name(i) for i in range(len(source))].index(f"photos/{name}"))


def jpeg(image, **options):
    out = io.BytesIO()
    image.save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


def part(data, shrink=1, rows=None):
    return Files(data).read_part(0, lambda size: ReadRequest(shrink, size[0] if rows is None else rows))


@pytest.fixture(scope="module")
def picture():
    return photo().crop((40, 30, 301, 200))  # 261 x 170: odd, and not a multiple of a block


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(_jpeg, "_simplejpeg", lambda: None)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


FORMS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "rgb": {"keep_rgb": True},
    **{f"orientation {n}": turned(n) for n in range(1, 9)},
}


@pytest.mark.parametrize("form", FORMS)
def test_full_request_equals_decode(picture, form, decoder):
    data = jpeg(picture, **FORMS[form])
    whole = np.asarray(decode(io.BytesIO(data)))
    got = part(data)
    np.testing.assert_array_equal(got.array, whole)
    assert got.size == whole.shape[:2]
    assert _jpeg.parse_frame(data) is not None


def test_greyscale(picture, decoder):
    data = jpeg(picture.convert("L"))
    np.testing.assert_array_equal(part(data, 2, 50).array[:25], part(data, 2).array[:25])
    np.testing.assert_array_equal(part(data).array, np.asarray(decode(io.BytesIO(data))))


@pytest.mark.parametrize("form", ["4:2:0", "4:2:2", "4:4:4", "restarts", "rgb", "progressive", "orientation 6"])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_requested_rows_equal_those_of_the_whole_image(picture, form, shrink, decoder):
    data = jpeg(picture, **FORMS[form])
    whole = part(data, shrink)
    saved = []
    for rows in (1, 16, 17, 100, 169, 170):
        got = part(data, shrink, rows)
        count = -(-rows // got.shrink)
        assert len(got.array) >= count
        np.testing.assert_array_equal(got.array[:count], whole.array[:count])
        assert (got.size, got.shrink) == (whole.size, whole.shrink)
        saved.append(len(whole.array) - len(got.array))
    assert (saved[0] > 0) == (form not in ("progressive", "orientation 6"))


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_both_decoders_agree_bit_for_bit(picture, shrink, monkeypatch):
    pytest.importorskip("simplejpeg")
    data = jpeg(picture)
    fast = part(data, shrink, 80)
    monkeypatch.setattr(_jpeg, "_simplejpeg", lambda: None)
    slow = part(data, shrink, 80)
    np.testing.assert_array_equal(fast.array, slow.array)
    assert fast.array.shape[1] == -(-picture.width // shrink)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_images_stay_aligned_when_shrunk(orientation):
    for size in ((261, 170), (264, 168)):
        image = photo().resize(size)
        data = jpeg(image, subsampling=0, **turned(orientation))
        got = part(data, 4)
        shrunk = np.asarray(Image.fromarray(part(data).array).reduce(got.shrink), np.float32)
        height, width = (side // got.shrink for side in got.size)
        assert np.abs(got.array[:height, :width] - shrunk[:height, :width]).mean() < 3
        assert got.shrink == (4 if orientation == 1 or size == (264, 168) else got.shrink) and got.shrink in (1, 2, 4)


def test_other_formats_are_read_whole(picture, decoder):
    png = io.BytesIO()
    picture.save(png, "PNG")
    for data in (png.getvalue(), jpeg(picture.convert("CMYK")), jpeg(picture)[:-2] + b"\xff\xff\xd9" + b"\0" * 70):
        source = Files(data)
        got = source.read_part(0, lambda size: pytest.fail("partial reading is impossible"))
        assert isinstance(got, Image.Image)
        assert got.mode == "RGB" and got.tobytes() == source.read(0).tobytes() == decode(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize("cache_mb", [0, 1, 64])
def test_whole_images_are_rendered_exactly(cache_mb):
    """Neither aligned to the pixel grid nor resampled by the fast path: bit-exact for PNG files."""
    files = []
    for name in ("coffee", "china"):
        out = io.BytesIO()
        photo(name).save(out, "PNG")
        files.append(out.getvalue())
    source = Files(*files)
    loader = Loader([source], None, PARTITIONS, Views(), 5, workers=0, cache_mb=cache_mb)
    policy, flips = Views(), set()
    for step in range(4):
        batch = loader.batch(step)
        for sample, (image, view, name) in enumerate(zip(batch.images, batch.views, batch.names, strict=True)):
            whole = source.read(int(name[-1]))
            assert view == draw_view((whole.height, whole.width), batch.size, policy, generator(5, step, sample))
            assert torch.equal(image, render(whole, view) / torch.tensor(255.0))
            flips.add(view.flip)
    assert flips == {False, True}
    assert len(loader._cache) == {0: 0, 1: 1, 64: 2}[cache_mb]


@pytest.mark.parametrize("rows", [8, 170])
def test_damage_is_detected_for_any_part(picture, rows):
    data = jpeg(picture)
    for bad in (data[:-2000], data[:300], b"", data[:2] + b"\xff\xd9"):
        with pytest.raises(ImageError, match="files/0"):
            part(bad, 2, rows)
        with pytest.raises(ImageError, match="files/0"):
            Files(bad).read(0)
    np.testing.assert_array_equal(part(data + b"\0" * 20, 2, rows).array, part(data, 2, rows).array)


def test_invalid_headers_are_left_to_pillow(picture):
    data = bytearray(jpeg(picture))
    at = _jpeg.parse_frame(bytes(data)).at
    data[at : at + 2] = b"\0\0"
    assert _jpeg.parse_frame(bytes(data)) is None
    assert _jpeg.parse_frame(b"\xff\xd8\xff\xd9") is None
    assert _jpeg.parse_frame(b"\xff\xd8\xff\xc0\x00\x03\x08\xff\xd9") is None
    for cut in range(0, 700, 7):
        _jpeg.parse_frame(bytes(data[:cut]) + b"\xff\xd9")  # never raises


@pytest.mark.parametrize("name", ["china", "coffee", "chelsea", "retina"])
def test_views_of_shrunk_images_are_close_to_those_of_whole_images(name):
    """At twice the view's resolution and more: mean absolute error below 2/255 over the views, below 4/255 in each."""
    image = photo(name)
    image = image.crop((0, 0, image.width // 2 * 2 - 1, image.height // 2 * 2 - 1))  # odd sides
    data = jpeg(image, quality=92)
    whole = decode(io.BytesIO(data))
    shrinks, errors = set(), []
    for sample in range(40):
        rng = generator(3, 0, sample)
        side = int(rng.integers(24, 160))
        view, need = align_view(draw_view((whole.height, whole.width), (side, side), Views(), rng), whole.size[::-1])
        if max(view.scale) > 0.5:
            continue
        got = resample(part(data, *need), view).astype(np.float32)
        error = np.abs(got - render(whole, view).numpy())
        shrinks.add(need.shrink)
        errors.append(error.mean())
        moved = np.abs(np.roll(got, 1, axis=2) - render(whole, view).numpy()).mean()
        assert moved > 1.5 * error.mean()  # a shift by one pixel would be detected
    assert np.mean(errors) < 2 and max(errors) < 4 and len(errors) > 8
    assert len(shrinks) > 1 or shrinks == {2}


def test_resample_equals_render_up_to_rounding():
    image = photo("china")
    pixels = PartialImage(np.asarray(image), 1, (image.height, image.width))
    for sample in range(12):
        rng = generator(1, 0, sample)
        size = (int(rng.integers(20, 300)), int(rng.integers(20, 300)))
        view, _ = align_view(draw_view(pixels.size, size, Views(aspect=(1, 1)), rng), pixels.size)
        x0, y0, x1, y1 = (round(side) for side in view.box)
        cut = image.crop((x0, y0, x1, y1)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        expected = np.asarray(cut).transpose(2, 0, 1)
        expected = expected[:, :, ::-1] if view.flip else expected
        got = resample(pixels, view)
        difference = np.abs(got.astype(int) - expected)
        assert difference.max() <= 6 and difference.mean() < 0.4
        inner = render(image, view).numpy()[:, 4:-4, 4:-4].astype(int)
        assert np.abs(got[:, 4:-4, 4:-4] - inner).mean() < 1


def test_aligned_views_move_little_and_equally_at_every_size():
    rng = np.random.default_rng(0)
    for sample in range(300):
        full = (int(rng.integers(1, 1500)), int(rng.integers(1, 1500)))
        boxes, needs = [], []
        for side in (8, 64, 224):
            drawn = draw_view(full, (side, side), Views(scale=(0.01, 1)), generator(0, 0, sample))
            view, need = align_view(drawn, full)
            boxes.append(view.box)
            needs.append(need)
            limit = max(1.0, min(8, min(full) / 64))
            assert np.abs(np.subtract(view.box, drawn.box)).max() <= limit
            x0, y0, x1, y1 = view.box
            assert -1e-6 <= x0 < x1 <= full[1] + 1e-6 and -1e-6 <= y0 < y1 <= full[0] + 1e-6
            assert view.flip == drawn.flip and view.size == drawn.size
            for edge in view.box:
                assert edge / need.shrink == pytest.approx(round(edge / need.shrink), abs=1e-6)
            assert need.rows == pytest.approx(y1)
            assert need.shrink == 1 or need.shrink * max(view.scale) <= 1
        np.testing.assert_allclose(boxes, [boxes[0]] * 3, atol=1e-6)
        assert needs[0].shrink >= needs[1].shrink >= needs[2].shrink


# ---------------------------------------------------------------------------------------------------- the loader

PARTITIONS = [Partition([48, 96], batch=5, weight=2), Partition([160], batch=3)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("china", "coffee", "chelsea", "rocket", "astronaut")):
        (root / f"{number}.jpg").write_bytes(jpeg(photo(name), **turned(1 + number % 3)))
    photo("camera").save(root / "5.png")
    (root / "6.jpg").write_bytes(jpeg(photo("coffee"))[:-3000])
    (root / "7.jpg").write_bytes(b"no image")
    return root


def batches(tree, start=0, stop=8, **options):
    loader = Loader([Folder(path=str(tree))], None, PARTITIONS, Views(), 5, **{"workers": 0, **options})
    return list(loader.iterate(start, stop)), loader


def same(a, b):
    return torch.equal(a.images, b.images) and (a.views, a.names, a.skipped) == (b.views, b.names, b.skipped)


@pytest.fixture(scope="module")
def straight(tree):
    return batches(tree)[0]


@pytest.mark.parametrize(("workers", "cache_mb"), [(0, 0), (1, 3), (2, 0), (2, 500)])
def test_batches_do_not_depend_on_workers_or_memory(tree, straight, workers, cache_mb):
    """3 MB hold some of the images: those are decoded whole, the others in part."""
    got, loader = batches(tree, workers=workers, cache_mb=cache_mb)
    assert all(same(a, b) for a, b in zip(got, straight, strict=True))
    assert bool(loader._kept) == bool(cache_mb)
    spent = sum({id(p.array): p.array.nbytes for kept in loader._kept.values() for p in kept.values()}.values())
    spent += sum(image.width * image.height * 4 for image in loader._cache.values())
    assert spent == cache_mb * 2**20 - loader._room <= cache_mb * 2**20
    resumed, _ = batches(tree, start=5, workers=workers, cache_mb=cache_mb)
    assert all(same(a, b) for a, b in zip(resumed, straight[5:], strict=True))


@pytest.mark.parametrize(("together", "held", "wait"), [(1, 1 << 40, 1), (3, 1 << 40, 3), (8, 0, 1), (8, 300_000, 4)])
def test_grouping_of_images_does_not_change_pixels(tree, straight, monkeypatch, together, held, wait):
    monkeypatch.setattr(pixels, "_TOGETHER", together)
    monkeypatch.setattr(pixels, "_HELD", held)
    waited, finish = [], pixels.BatchRenderer._render

    def counted(renderer):
        waited.append(len(renderer._waiting))
        finish(renderer)

    monkeypatch.setattr(pixels.BatchRenderer, "_render", counted)
    assert all(same(a, b) for a, b in zip(batches(tree)[0], straight, strict=True))
    assert max(waited) == wait


@pytest.mark.parametrize("width", [1, 2, 6, 12, 223, 224])
def test_mirror_images(width):
    array = np.random.default_rng(width).integers(0, 256, (3, 5, width), dtype=np.uint8)
    np.testing.assert_array_equal(pixels._mirrored(array), array[:, :, ::-1])
    turned = array.transpose(1, 0, 2)
    np.testing.assert_array_equal(pixels._mirrored(turned), turned[:, :, ::-1])


def test_views_match_the_pixels(tree, straight):
    source = Folder(path=str(tree))
    index = {source.name(i): i for i in range(len(source))}
    for batch in straight:
        for image, view, name in zip(batch.images, batch.views, batch.names, strict=True):
            whole = render(source.read(index[name]), view)
            assert float((image * 255 - whole).abs().mean()) < 4


def test_only_the_needed_resolution_is_decoded(tree, monkeypatch):
    shapes = []
    decode_part = _jpeg._decode
    monkeypatch.setattr(_jpeg, "_decode", lambda *a: shapes.append(a[1:]) or decode_part(*a))
    batches(tree, cache_mb=0)
    assert {shrink for _, shrink in shapes} >= {1, 2, 4}
    full = len(shapes)
    shapes.clear()
    batches(tree, cache_mb=500)
    assert len(shapes) < full


def test_sources_without_partial_reading_are_read_whole(tree):
    class Plain(Source):
        def __init__(self):
            self.inner = Folder(path=str(tree))

        def __len__(self):
            return len(self.inner)

        def name(self, index):
            return self.inner.name(index)

        def read(self, index):
            return self.inner.read(index)

    with pytest.raises(NotImplementedError):
        Plain().read_part(0, lambda size: ReadRequest(1, 1))
    loader = Loader([Plain()], None, PARTITIONS, Views(), 5, workers=0)
    for step in range(3):
        batch = loader.batch(step)
        for image, view, name in zip(batch.images, batch.views, batch.names, strict=True):
            index = next(i for i in range(len(loader.sources[0])) if loader.sources[0].name(i) == name)
            assert torch.equal(image, render(loader.sources[0].read(index), view) / torch.tensor(255.0))


def test_source_that_shrinks_less_than_requested_is_reused(tree):
    class Reluctant(Files):
        reads = 0

        def read_part(self, index, need):
            type(self).reads += 1
            return super().read_part(index, lambda size: ReadRequest(1, need(size).rows))

    data = (tree / "0.jpg").read_bytes()
    loader = Loader([Reluctant(data)], None, PARTITIONS, Views(), 5, workers=0)
    list(loader.iterate(0, 12))
    assert Reluctant.reads <= 4  # once per requested resolution, not once per view


def test_long_sources_are_shuffled_without_a_permutation(monkeypatch):
    from agglo.data import views

    orders = [image_at(3, 1, p, 1000) for p in range(1000)]
    assert orders == generator(3, 0, 1, views._ORDER).permutation(1000).tolist()  # unchanged order
    monkeypatch.setattr(views, "_LONG", 500)
    for length in (501, 1000, 1024, 1025):
        passes = [[image_at(3, 1, p, length) for p in range(k * length, (k + 1) * length)] for k in (0, 1)]
        assert sorted(passes[0]) == sorted(passes[1]) == list(range(length))
        assert passes[0] != passes[1]
        places = np.array(passes[0])
        assert abs(np.corrcoef(places, np.arange(length))[0, 1]) < 0.2
        assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.2
    assert len({_shuffled(p, 10**9, (1, 2, 3, 4, 5, 6)) for p in range(2000)}) == 2000


def test_uniform_filter_checks_the_whole_image(monkeypatch):
    monkeypatch.setattr(_encoded, "_NEARLY_BLANK", 500.0)  # check every whole image; none is uniform
    data = jpeg(photo().resize((200, 160)))
    assert part(data, 2).shrink == 2
    Files(data, skip_uniform=True).read_part(0, lambda size: ReadRequest(8, 8))
