"""The loader: batches depend on the step alone; unreadable images do not stop a run."""

import gc
import logging
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from agglo.data.loader import Loader, evaluation_batches
from agglo.data.views import Partition
from agglo.recipe import Views
from agglo.sources.base import Source
from agglo.sources.folder import Folder
from agglo.types import ConfigError, ImageError
from support.datasets import draw_indices

PARTITIONS = [Partition([16, 24], batch=6, weight=2), Partition([32], batch=3, weight=1)]


class Noise(Source):
    """Images of many sizes; those in ``bad`` cannot be read; counts reads."""

    def __init__(self, length, bad=(), tag="noise"):
        self.length, self.bad, self.tag, self.reads = length, frozenset(bad), tag, []

    def __len__(self):
        return self.length

    def name(self, index):
        return f"{self.tag}/{index}"

    def read(self, index):
        self.reads.append(index)
        if index in self.bad:
            raise ImageError(self.name(index), "is broken")
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (20 + index, 30 + 2 * index, 3), dtype=np.uint8))


def loader(*sources, workers=0, weights=None, seed=0, **options):
    sources = sources or (Noise(11, bad=[3]), Noise(5, bad=[0, 4], tag="more"))
    return Loader(sources, weights, PARTITIONS, Views(), seed, workers, **options)


def same(a, b):
    return torch.equal(a.images, b.images) and (a.views, a.names, a.step, a.partition, a.skipped) == (
        b.views,
        b.names,
        b.step,
        b.partition,
        b.skipped,
    )


@pytest.fixture(scope="module")
def straight():
    return list(loader().iterate(0, 12))


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("cache_mb", [0, 100])
def test_batches_do_not_depend_on_threads_or_cache(straight, workers, cache_mb):
    batches = list(loader(workers=workers, cache_mb=cache_mb).iterate(0, 12))
    assert len(batches) == 12
    assert all(same(a, b) for a, b in zip(batches, straight, strict=True))


def test_batches_do_not_depend_on_order_or_history(straight):
    one = loader()
    for step in np.random.default_rng(0).permutation(12).tolist() * 2:
        assert same(one.batch(step), straight[step])
    resumed = list(loader(workers=2).iterate(7, 12))
    assert all(same(a, b) for a, b in zip(resumed, straight[7:], strict=True))


def test_batches_depend_on_seed_and_step(straight):
    assert not same(loader(seed=1).batch(0), straight[0])
    assert len({batch.images.numpy().tobytes() for batch in straight}) == 12


def test_batch_fields_are_consistent(straight):
    assert {b.images.shape[1:] for b in straight} <= {(3, 16, 16), (3, 24, 24), (3, 32, 32)}
    assert {b.partition for b in straight} == {0, 1}
    for step, batch in enumerate(straight):
        assert batch.step == step
        assert batch.images.dtype == torch.float32
        assert 0 <= batch.images.min() < batch.images.max() <= 1
        assert len(batch.images) == len(batch.views) == len(batch.names) == PARTITIONS[batch.partition].batch
        assert all(view.size == tuple(batch.images.shape[2:]) for view in batch.views)


def test_every_image_is_seen_once_per_epoch():
    batches = list(loader(Noise(8), Noise(4, tag="more"), weights=[2, 1]).iterate(0, 200))
    names = [name for batch in batches for name in batch.names]
    for tag, length in (("noise", 8), ("more", 4)):
        own = [n for n in names if n.startswith(tag)]
        assert abs(len(own) - len(names) * length / 12) <= 1
        for i in range(0, len(own) - length + 1, length):
            assert sorted(own[i : i + length]) == sorted(f"{tag}/{k}" for k in range(length))
    drawn = draw_indices(0, 0, 6, [8, 4], [2, 1])
    assert batches[0].names == [f"{('noise', 'more')[s]}/{i}" for s, i in drawn]


def test_unreadable_images_are_replaced_named_once_and_counted(caplog):
    source = Noise(10, bad=[2, 7])
    one = loader(source)
    with caplog.at_level(logging.WARNING, "agglo"):
        batches = list(one.iterate(0, 20))
    assert one.skipped == {"noise/2": "is broken", "noise/7": "is broken"}
    assert sorted(r.getMessage() for r in caplog.records) == [
        "skipped noise/2: is broken",
        "skipped noise/7: is broken",
    ]
    names = [name for batch in batches for name in batch.names]
    assert not {"noise/2", "noise/7"} & set(names)
    assert set(names) == {f"noise/{i}" for i in range(10)} - {"noise/2", "noise/7"}
    drawn = [i for _, i in draw_indices(0, 0, len(names), [10])]
    assert all(name == f"noise/{i}" for name, i in zip(names, drawn, strict=True) if i not in (2, 7))
    first = next(b for b in batches if b.skipped)
    assert set(first.skipped) <= {"noise/2", "noise/7"}
    assert source.reads.count(2) == source.reads.count(7) == 1


def test_bad_file_in_a_folder_does_not_stop_a_run(tmp_path):
    for i in range(6):
        Image.new("RGB", (40, 30), (i * 40, 0, 0)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "4.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:400])
    one = loader(Folder(path=str(tmp_path)), workers=2)
    assert len(list(one.iterate(0, 10))) == 10
    assert list(one.skipped) == [f"{tmp_path.name}/4.jpg"]
    batches = list(evaluation_batches(Folder(path=str(tmp_path)), 16, 4))
    assert [b.indices for b in batches] == [[0, 1, 2, 3], [5]]
    assert [list(b.skipped) for b in batches] == [[], [f"{tmp_path.name}/4.jpg"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_source_without_readable_images_is_an_error(workers):
    one = loader(Noise(5), Noise(3, bad=range(3), tag="rotten"), workers=workers)
    with pytest.raises(ConfigError, match=r"data\.sources\.1: none of its 3 images.*rotten/\d: is broken"):
        list(one.iterate(0, 3))


def test_decoded_images_are_cached_within_the_budget():
    source = Noise(10)
    one = loader(source)
    list(one.iterate(0, 30))
    assert sorted(source.reads) == list(range(10))
    uncached = Noise(10)
    list(loader(uncached, cache_mb=0).iterate(0, 30))
    assert len(uncached.reads) > 100


def test_large_images_are_shrunk_with_and_without_cache():
    class Large(Noise):
        def read(self, index):
            return super().read(index).resize((900, 300))

    batches = [list(loader(Large(4), max_side=90, cache_mb=mb).iterate(0, 8)) for mb in (0, 50)]
    assert all(same(a, b) for a, b in zip(*batches, strict=True))
    for batch in batches[0]:
        for view in batch.views:
            assert view.box[2] <= 90 + 1e-6
            assert view.box[3] <= 30 + 1e-6


def test_other_errors_are_raised_at_their_batch():
    class Faulty(Noise):
        def read(self, index):
            raise RuntimeError("the disk is on fire")

    for workers in (0, 2):
        with pytest.raises(RuntimeError, match="disk is on fire"):
            next(loader(Faulty(3), workers=workers).iterate(0, 5))


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("agglo-loader")]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_threads_end_with_the_generator(error):
    class Slow(Noise):
        def read(self, index):
            time.sleep(0.02)
            return super().read(index)

    source = Slow(8)
    batches = loader(source, workers=2, cache_mb=0).iterate(0, 10_000)
    next(batches)
    assert loader_threads()
    began = time.monotonic()
    if error is None:
        batches.close()
    else:
        with pytest.raises(error):
            batches.throw(error())
    assert time.monotonic() - began < 0.5
    assert not loader_threads()
    reads = len(source.reads)
    time.sleep(0.1)
    assert len(source.reads) == reads


def test_prefetch_is_bounded():
    source = Noise(8)
    batches = loader(source, workers=1, cache_mb=0).iterate(0, 1000)
    next(batches)
    time.sleep(0.3)
    # One batch was returned; at most two more are ready or in progress.
    assert len(source.reads) <= 6 * 3
    batches.close()


@pytest.mark.parametrize(
    ("sources", "weights", "partitions", "why"),
    [
        ([], None, PARTITIONS, "at least one"),
        ([Noise(3), Noise(0)], None, PARTITIONS, r"sources\.1.*empty"),
        ([Noise(3)], [1, 2], PARTITIONS, "2 weights for 1"),
        ([Noise(3)], [0], PARTITIONS, "weights"),
        ([Noise(3)], None, [], "partitions"),
    ],
)
def test_invalid_arguments_are_refused_on_construction(sources, weights, partitions, why):
    with pytest.raises(ConfigError, match=why):
        Loader(sources, weights, partitions, Views())


def test_evaluation_batches_cover_and_stretch():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255  # the centre

    class Centre(Noise):
        def read(self, index):
            return Image.fromarray(pixels)

    ((indices, images, skipped),) = evaluation_batches(Centre(2), 20, 5)
    assert (indices, skipped) == ([0, 1], {})
    assert images.dtype == torch.float32
    assert images.shape == (2, 3, 20, 20)
    assert (images == 1).all()
    ((_, images, _),) = evaluation_batches(Centre(1), (20, 60), 5, "stretch")
    np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy() * 255, pixels, atol=1e-4)


def test_evaluation_batches_report_every_unreadable_image():
    batches = list(evaluation_batches(Noise(9, bad=[1, 3, 4, 5, 8]), 16, 3))
    assert [b.indices for b in batches] == [[0, 2], [6, 7]]
    assert [sorted(b.skipped) for b in batches] == [["noise/1"], ["noise/3", "noise/4", "noise/5", "noise/8"]]
    with pytest.raises(ConfigError, match=r"none of the source's 2 images.*noise/0: is broken"):
        list(evaluation_batches(Noise(2, bad=[0, 1]), 16, 3))
    with pytest.raises(ValueError, match="cover or stretch"):
        next(evaluation_batches(Noise(2), 16, 3, "squeeze"))


def test_canvas_renders_the_same_crops_at_more_pixels(tmp_path):
    for index in range(3):
        Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / f"{index}.png")
    source = Folder(path=str(tmp_path))
    partitions, policy = [Partition(sizes=[16, 48], batch=2)], Views()
    plain = Loader([source], None, partitions, policy, workers=0)
    large = Loader([source], None, partitions, policy, workers=0, canvas=32)
    for step in range(6):
        small, big = plain.batch(step), large.batch(step)
        assert small.size == big.size == tuple(small.images.shape[-2:])
        assert tuple(big.images.shape[-2:]) == tuple(max(32, side) for side in small.size)
        assert small.names == big.names
        for one, two in zip(small.views, big.views, strict=True):
            assert one.box == pytest.approx(two.box)
            assert one.flip == two.flip


def test_unreadable_image_does_not_keep_batches_alive(tmp_path):
    for index in range(2):
        Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    loader = Loader([Folder(path=str(tmp_path))], None, [Partition(sizes=[16], batch=4)], Views(), workers=0)
    alive = [weakref.ref(loader.batch(step).images) for step in range(12)]
    gc.collect()
    assert loader.skipped
    assert not any(reference() is not None for reference in alive)
    assert len(loader._bad) == 1
    assert all(isinstance(why, tuple) for why in loader._bad.values())  # not exceptions with tracebacks
