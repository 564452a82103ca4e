"""Filters, and weighted mixtures of sources: counted, logged, independent of history."""

import io
import logging
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from agglo.data.loader import Loader, evaluation_batches
from agglo.data.views import Partition
from agglo.recipe import Views
from agglo.sources import _encoded
from agglo.sources.base import FilteredImageError, ReadRequest
from agglo.sources.folder import Folder
from agglo.sources.webdataset import WebDataset
from agglo.types import ConfigError, ImageError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGGLO_CACHE", str(tmp_path / "cache"))


def encoded(image, format="JPEG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noise(number, size=(90, 70)):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Eight images pass; three are small, three have a single colour, one is broken."""
    root = tmp_path / "mixed"
    root.mkdir()
    for number in range(8):
        (root / f"{number}.jpg").write_bytes(encoded(noise(number)))
    (root / "small.jpg").write_bytes(encoded(noise(20, (90, 40))))
    (root / "small.png").write_bytes(encoded(noise(21, (40, 90)), "PNG"))
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "small_turned.jpg").write_bytes(encoded(noise(22, (90, 40)), exif=exif))
    (root / "blank.jpg").write_bytes(encoded(Image.new("RGB", (90, 70), (200, 30, 90))))
    (root / "blank.png").write_bytes(encoded(Image.new("L", (90, 70), 255), "PNG"))
    blank = np.full((70, 90, 3), 128, np.uint8)
    blank[30, 40, 1] += 1  # a range of length 1
    (root / "blank_almost.png").write_bytes(encoded(Image.fromarray(blank), "PNG"))
    (root / "broken.jpg").write_bytes(encoded(noise(30))[:900])
    return root


FIT = {f"mixed/{number}.jpg" for number in range(8)}
PARTITIONS = [Partition([16, 32], batch=4)]


def names(batches):
    return [name for batch in batches for name in batch.names]


def excluded(source):
    counts, bad = Counter(), []
    for index in range(len(source)):
        try:
            source.read(index)
        except FilteredImageError as error:
            counts[error.rule] += 1
        except ImageError as error:
            bad.append(error.name)
    return dict(counts), bad


def test_filters_exclude_by_their_rule(folder):
    assert excluded(Folder(path=str(folder))) == ({}, ["mixed/broken.jpg"])
    assert excluded(Folder(path=str(folder), min_side=70)) == ({"min_side: 70": 3}, ["mixed/broken.jpg"])
    assert excluded(Folder(path=str(folder), min_side=71))[0] == {"min_side: 71": 15}  # the broken one by its header
    assert excluded(Folder(path=str(folder), skip_uniform=True))[0] == {"skip_uniform: true": 3}
    both = Folder(path=str(folder), min_side=41, skip_uniform=True)
    assert excluded(both)[0] == {"min_side: 41": 3, "skip_uniform: true": 3}
    error = FilteredImageError("a", "b", "c")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.name, copy.why, copy.rule, str(copy)) == ("a", "b", "c", "a: b")


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_area_and_aspect_are_filtered_by_the_header_alone(tmp_path, monkeypatch, ending):
    sizes = {"square": (60, 60), "wide": (121, 40), "tall": (40, 120), "small": (30, 59)}
    for name, size in sizes.items():
        noise(1).resize(size).save(tmp_path / f"{name}.{ending}")
    order = sorted(sizes)
    rules = {
        "max_aspect: 3": ({"max_aspect": 3}, {"wide"}),
        "max_aspect: 1.5": ({"max_aspect": 1.5}, {"wide", "tall", "small"}),
        "min_pixels: 3600": ({"min_pixels": 3600}, {"small"}),
        "min_pixels: 4800": ({"min_pixels": 4800}, {"small", "square"}),
        "min_side: 40": ({"min_side": 40, "min_pixels": 3600, "max_aspect": 100}, {"small"}),
    }
    monkeypatch.setattr(_encoded, "decode", lambda data, name, **_: Image.new("RGB", sizes[name.split("/")[1][:-4]]))
    for rule, (keys, left) in rules.items():
        source, met = Folder(path=str(tmp_path), **keys), {}
        for index, name in enumerate(order):
            for read in (source.read, lambda i, s=source: s.read_part(i, lambda size: ReadRequest(1, size[0]))):
                try:
                    read(index)
                except FilteredImageError as error:
                    met[name] = error.rule
        assert met == dict.fromkeys(left, rule)

    def refuse(data, name, **_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(_encoded, "decode", refuse)
    with pytest.raises(FilteredImageError, match=r"121x40 pixels, its aspect ratio is 3\.02, above 3"):
        Folder(path=str(tmp_path), max_aspect=3).read(order.index("wide"))
    for keys in ({"max_aspect": 0.5}, {"max_aspect": -1}, {"min_pixels": -1}):
        with pytest.raises(ConfigError, match=next(iter(keys))):
            Folder(path=str(tmp_path), **keys)


def test_one_differing_pixel_is_not_a_single_colour(tmp_path):
    pixels = np.full((70, 90, 3), 128, np.uint8)
    pixels[1, 2] += 1  # all three channels: a range of length 1.7, missed by a coarse sample
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert Folder(path=str(tmp_path), skip_uniform=True).read(0).size == (90, 70)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mb", [0, 10])
def test_filtered_images_are_replaced_counted_and_logged_once(folder, workers, cache_mb, caplog):
    source = Folder(path=str(folder), min_side=70, skip_uniform=True)
    loader = Loader([source], None, PARTITIONS, Views(), 1, workers, cache_mb=cache_mb)
    with caplog.at_level(logging.WARNING, "agglo"):
        batches = list(loader.iterate(0, 20))
    assert set(names(batches)) == FIT
    assert loader.filtered == {"min_side: 70": 3, "skip_uniform: true": 3}
    assert list(loader.skipped) == ["mixed/broken.jpg"]
    assert {name for batch in batches for name in batch.skipped} == {"mixed/broken.jpg"}
    logged = sorted(record.getMessage().partition(" by ")[0] for record in caplog.records)
    assert logged == [
        "excluded 1 so far",
        "excluded 1 so far",
        "skipped mixed/broken.jpg: " + loader.skipped["mixed/broken.jpg"],
    ]
    resumed = Loader([source], None, PARTITIONS, Views(), 1, 0, cache_mb=cache_mb)
    for a, b in zip(resumed.iterate(13, 20), batches[13:], strict=True):
        assert torch.equal(a.images, b.images) and a.names == b.names


def test_filtered_images_are_read_once(folder, monkeypatch):
    reads = Counter()
    read = Folder.encoded

    def counted(self, index):
        reads[self.name(index)] += 1
        return read(self, index)

    monkeypatch.setattr(Folder, "encoded", counted)
    loader = Loader([Folder(path=str(folder), min_side=70)], None, PARTITIONS, Views(), workers=0, cache_mb=0)
    list(loader.iterate(0, 30))
    assert [reads[f"mixed/small{end}"] for end in (".jpg", ".png", "_turned.jpg")] == [1, 1, 1]
    assert reads["mixed/0.jpg"] > 3


def test_filter_that_excludes_all_images_is_an_error(folder):
    loader = Loader([Folder(path=str(folder), min_side=500)], None, PARTITIONS, Views(), workers=0)
    with pytest.raises(ConfigError, match=r"none of its 15 images can be read; 15 excluded by min_side: 500"):
        loader.batch(0)
    loader = Loader([Folder(path=str(folder), min_side=500)], None, PARTITIONS, Views(), workers=1)
    with pytest.raises(ConfigError, match=r"15 excluded by min_side"):
        list(loader.iterate(0, 2))


def test_evaluation_batches_skip_filtered_images(folder):
    (batch,) = evaluation_batches(Folder(path=str(folder), min_side=70, skip_uniform=True), 16, 100)
    assert len(batch.indices) == 8
    assert len(batch.skipped) == 7


# ---------------------------------------------------------------------------------------------------- several kinds


@pytest.fixture
def sources(folder, tmp_path):
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        for number in range(5):
            data = encoded(noise(50 + number, (120, 80)))
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data if number != 3 else data[:700] + bytes(len(data) - 700)))
    made = [Folder(path=str(folder), min_side=70, skip_uniform=True), WebDataset(shards=str(shard))]
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(noise(70 + number)), "path": None} for number in range(6)]
    rows = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    datasets.disable_progress_bars()
    rows.save_to_disk(tmp_path / "rows")
    from agglo.sources.huggingface import HuggingFace

    return [*made, HuggingFace(dataset=str(tmp_path / "rows"))]


def loader(sources, workers=0, **options):
    policy = Views(scale=(0.2, 1))
    return Loader(sources, [6, 3, 1], [Partition([16, 24], 5), Partition([40], 2)], policy, 7, workers, **options)


def test_weights_hold_at_every_step(sources):
    drawn = names(loader(sources).iterate(0, 100))
    prefixes = ("mixed/", "shard/", "rows/")
    for count in (10, 37, 200, len(drawn)):
        for prefix, share in zip(prefixes, (0.6, 0.3, 0.1), strict=True):
            assert abs(sum(name.startswith(prefix) for name in drawn[:count]) - share * count) <= 1
    ours = [name for name in drawn if name.startswith("rows/")]
    for start in range(0, len(ours) - 6, 6):
        assert len(set(ours[start : start + 6])) == 6  # every image once per pass


@pytest.mark.parametrize(("workers", "cache_mb"), [(0, 0), (1, 0), (2, 0), (2, 1)])
def test_batches_are_equal_for_any_workers_and_after_resume(sources, workers, cache_mb):
    straight = list(loader(sources).iterate(0, 12))
    whole = list(loader(sources, workers, cache_mb=cache_mb).iterate(0, 12))
    resumed = list(loader(pickle.loads(pickle.dumps(sources)), workers, cache_mb=cache_mb).iterate(5, 12))
    for got, wanted in ((whole, straight), (resumed, straight[5:])):
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a.images, b.images)
            assert (a.names, a.views, a.step, a.partition) == (b.names, b.views, b.step, b.partition)
    assert not any(torch.equal(straight[0].images, batch.images) for batch in straight[1:])
