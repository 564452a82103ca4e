"""Views: pure functions of (seed, step, sample), with geometry that matches the rendered pixels."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from agglo.data.views import Partition, Quota, draw_resolution, draw_view, generator, image_at, mixup, render
from agglo.preprocess import crop_box, fit
from agglo.recipe import Views
from agglo.types import ConfigError, View
from support.datasets import draw_indices

PARTITIONS = [Partition([64, 96], batch=8, weight=3), Partition([(128, 96)], batch=2, weight=1)]


# --- randomness and quotas ---


def test_generator_depends_on_each_argument():
    keys = list(itertools.product([0, 1, -1, 2**63], [0, 1, 2**40], [0, 1], [0, 1]))
    draws = {key: tuple(generator(*key).random(4)) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert all(tuple(generator(*key).random(4)) == draws[key] for key in reversed(keys))


def test_neighbouring_generators_are_independent():
    first = np.array([generator(0, step, sample).random() for step in range(60) for sample in range(60)])
    assert abs(first.mean() - 0.5) < 0.02
    assert abs(first.var() - 1 / 12) < 0.01
    for lag in (1, 60):  # neighbouring samples, neighbouring steps
        assert abs(np.corrcoef(first[:-lag], first[lag:])[0, 1]) < 0.06


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=6).filter(any),
    start=st.integers(0, 10**13),
)
def test_quota_counts_are_exact(weights, start):
    quota = Quota(weights)
    counts = quota.before(start)
    assert sum(counts) == start
    shares = np.array(weights) / sum(weights)
    for draw in range(start, start + 40):
        chosen, seen = quota.choice(draw)
        assert weights[chosen] > 0
        assert seen == counts[chosen]
        counts[chosen] += 1
    assert quota.before(start + 40) == counts
    levels = math.ceil(math.log2(len(weights)))
    assert (np.abs(np.array(quota.before(1000)) - shares * 1000) <= levels / 2 + 1e-3).all()


def test_quota_starts_with_the_most_frequent_choice():
    assert Quota([1, 99]).choice(0)[0] == 1
    assert Quota([99, 1]).choice(0)[0] == 0


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_quota_refuses_invalid_weights(weights):
    with pytest.raises(ConfigError, match="weights"):
        Quota(weights)


def test_resolution_follows_weights_and_counts_samples():
    draws = [draw_resolution(5, step, PARTITIONS) for step in range(400)]
    assert Counter(d.partition for d in draws) == {0: 300, 1: 100}
    start = 0
    for draw in draws:
        assert draw.start == start
        assert draw.batch == PARTITIONS[draw.partition].batch
        start += draw.batch
    sizes = Counter(d.size for d in draws)
    assert set(sizes) == {(64, 64), (96, 96), (128, 96)}
    assert abs(sizes[64, 64] - 150) < 45  # five standard deviations
    assert [draw_resolution(5, s, PARTITIONS) for s in reversed(range(400))] == draws[::-1]
    assert [draw_resolution(6, s, PARTITIONS).size for s in range(400)] != [d.size for d in draws]


def test_resolution_refuses_empty_partitions():
    for partitions in ([], [Partition([], 4)], [Partition([32], 0)]):
        with pytest.raises(ConfigError, match="partitions"):
            draw_resolution(0, 0, partitions)


def test_every_epoch_is_a_new_permutation():
    lengths, weights = [7, 30], [1, 2]
    drawn = list(itertools.chain(*(draw_indices(3, s, 10, lengths, weights) for s in range(0, 900, 10))))
    assert Counter(source for source, _ in drawn) == {0: 300, 1: 600}
    passes = {}
    for source, length in enumerate(lengths):
        sequence = [index for s, index in drawn if s == source]
        passes[source] = [tuple(sequence[i : i + length]) for i in range(0, len(sequence) - length + 1, length)]
        assert all(sorted(p) == list(range(length)) for p in passes[source])
    assert len(set(passes[1])) == 20
    assert draw_indices(3, 450, 10, lengths, weights) == drawn[450:460]
    assert draw_indices(4, 0, 10, lengths, weights) != drawn[:10]


def test_sources_of_equal_length_are_shuffled_differently():
    orders = [[image_at(0, source, p, 20) for p in range(20)] for source in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_weights_default_to_lengths():
    drawn = draw_indices(0, 0, 40, [10, 30])
    assert len(set(drawn)) == 40


# --- drawing ---

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@settings(max_examples=200, deadline=None)
@given(source=SIZES, size=st.tuples(st.integers(1, 300), st.integers(1, 300)), step=st.integers(0, 10**6))
def test_crops_stay_inside_and_keep_the_aspect(source, size, step):
    policy = Views()
    view = draw_view(source, size, policy, generator(0, step, 0))
    x0, y0, x1, y1 = view.box
    slack = 1e-6 * max(source)
    assert -slack <= x0 < x1 <= source[1] + slack
    assert -slack <= y0 < y1 <= source[0] + slack
    stretch = view.scale[1] / view.scale[0]  # horizontal over vertical extent, relative to the view
    assert policy.aspect[0] * (1 - 1e-6) <= stretch <= policy.aspect[1] * (1 + 1e-6)
    area = (x1 - x0) * (y1 - y0) / (source[0] * source[1])
    assert area <= policy.scale[1] * (1 + 1e-6)
    aspect = size[1] / size[0]
    widest = source[1] / source[0] / aspect
    if 0.8 < widest < 1.25:  # nearly the view's shape: every area fits
        assert area >= policy.scale[0] * (1 - 1e-6)


def test_distribution_of_crops():
    policy = Views(scale=(0.25, 0.5), flip=0.25)
    views = [draw_view((100, 200), (64, 64), policy, generator(1, 0, i)) for i in range(3000)]
    boxes = np.array([v.box for v in views])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 20_000
    assert abs(area.mean() - 0.375) < 0.01
    assert abs(area.var() - 0.25**2 / 12) < 0.001
    assert abs(np.mean([v.flip for v in views]) - 0.25) < 0.04
    slide = boxes[:, 0] / (200 - boxes[:, 2] + boxes[:, 0])
    assert abs(slide.mean() - 0.5) < 0.03
    assert np.corrcoef(slide, area)[0, 1] < 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", (0, 1)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.5)),
        ("aspect", (0, 1)),
        ("aspect", (2, 1)),
        ("flip", 1.1),
        ("mixup", -0.1),
    ],
)
def test_policy_errors_name_the_key(key, value):
    with pytest.raises(ValidationError, match=key):
        Views(**{key: value})


# --- rendering ---


def blob(size, x, y, radius=6.0):
    """A smooth bright spot centred on the continuous point (x, y) of a black image."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    bright = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2))
    return Image.fromarray(np.repeat(bright[..., None], 3, 2).round().astype(np.uint8))


def centroid(pixels):
    weight = pixels[0].double().numpy()
    rows, columns = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
    return (weight * columns).sum() / weight.sum(), (weight * rows).sum() / weight.sum()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("side", [24, 64, 200])
def test_rendered_pixels_match_the_geometry(flip, side):
    policy = Views(scale=(0.6, 0.9), flip=float(flip))
    image = blob((300, 400), 210.5, 140.25)
    for sample in range(6):
        view = draw_view((300, 400), (side, side + 8), policy, generator(0, 0, sample))
        assert view.flip == flip
        x, y = centroid(render(image, view))
        u, v = view.to_view(210.5, 140.25)
        assert abs(x - u) < 0.1
        assert abs(y - v) < 0.1
        assert view.to_source(u, v) == pytest.approx((210.5, 140.25))


@pytest.mark.parametrize("side", [32, 100])
def test_view_is_black_outside_the_image(side):
    image = Image.new("RGB", (100, 80), "white")
    scale = side / 100
    view = View(size=(side, side), scale=(scale, scale), offset=(20 * scale, -30 * scale))
    out = render(image, view)[0]
    x0, y1 = round(20 * scale), round(50 * scale)
    assert (out[: y1 - 2, x0 + 2 :] == 255).all()
    assert (out[:, : x0 - 2] == 0).all()
    assert (out[y1 + 2 :] == 0).all()
    dot = render(blob((80, 100), 40.5, 55.0), view)
    assert centroid(dot) == pytest.approx(view.to_view(40.5, 55.0), abs=0.1)


def test_identity_view_returns_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    view = View(size=(20, 30), scale=(1, 1), offset=(0, 0))
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    assert (render(Image.fromarray(pixels), view) == expected).all()
    mirrored = View(size=(20, 30), scale=(1, 1), offset=(0, 0), flip=True)
    assert (render(Image.fromarray(pixels), mirrored) == expected.flip(-1)).all()


@pytest.mark.parametrize("source", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (33, 7)])
def test_degenerate_images_render(source, size):
    image = Image.new("RGB", source[::-1], "teal")
    views = [draw_view(source, size, Views(), generator(0, 0, i)) for i in range(20)]
    whole = [fit(image, size, mode) * 255 for mode in ("crop", "stretch")]
    for out in [*(render(image, view) for view in views), *whole]:
        assert out.shape == (3, *size)
        assert (out.flatten(1).round() == torch.tensor([[0], [128], [128]])).all()


def test_centre_crop_of_evaluation_images():
    assert crop_box((100, 300), (50, 50)) == (100, 0, 200, 100)
    assert crop_box((300, 100), (50, 25)) == (0, 50, 100, 250)
    halves = Image.new("RGB", (300, 100), "black")
    halves.paste("white", (150, 0, 300, 100))
    cropped, stretched = fit(halves, (50, 50)), fit(halves, (50, 25), "stretch")
    assert (cropped.shape, stretched.shape) == ((3, 50, 50), (3, 50, 25))
    assert cropped.mean(0)[:, :20].max() == 0 and cropped.mean(0)[:, 30:].min() == 1
    assert stretched[:, :, :8].max() == 0 and stretched[:, :, 17:].min() == 1


# --- mixup ---


def test_mixup_blends_pairs_of_the_batch():
    images = torch.eye(6).view(6, 1, 1, 6).expand(6, 3, 2, 6).contiguous()
    out = mixup(images, 0, 0, 1.0)
    weights = out[:, 0, 0]  # row i: share of each image in blend i
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert ((weights > 0).sum(1) <= 2).all()
    assert (weights.diagonal() >= 0.5).all()
    assert len(set(weights.diagonal().tolist())) > 2  # every image has its own share
    assert torch.equal(mixup(images, 0, 0, 1.0), out)
    assert not torch.equal(mixup(images, 0, 1, 1.0), out)
    assert mixup(images, 0, 0, 0.0) is images


def test_mixup_share_of_steps_and_weights():
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    outs = [mixup(images, 7, step, 0.5) for step in range(2000)]
    assert abs(np.mean([out is images for out in outs]) - 0.5) < 0.05
    shares = np.array([float(out[1]) for out in outs if out is not images and float(out[1]) < 1])
    assert abs(shares.mean() - 0.75) < 0.02  # uniform in [1/2, 1]
    assert abs(shares.var() - 0.25 / 12) < 0.003
