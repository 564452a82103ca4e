"""PCA pictures: one basis, one colour language; the maths against NumPy; nothing breaks on degenerate maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from agglo.report.picture import fitted, mad_limits, pca_basis, pca_picture, side_by_side, stacked


def random_map(channels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = np.linspace(3, 0.1, channels)[:, None, None]
    return rng.normal(size=(channels, height, width)) * spread + 1


@pytest.mark.parametrize("shape", [(12, 9, 11), (40, 3, 4)])  # more positions than channels, and the reverse
def test_axes_are_the_singular_vectors_of_the_centred_positions(shape: tuple[int, int, int]) -> None:
    features = random_map(*shape)
    rows = features.reshape(shape[0], -1).T
    _, _, v = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    basis = pca_basis([features])
    np.testing.assert_allclose(np.abs((basis.axes * v[:3]).sum(1)), 1, atol=1e-9)
    np.testing.assert_allclose(basis.mean, rows.mean(0), atol=1e-12)
    assert all(axis[np.abs(axis).argmax()] > 0 for axis in basis.axes)


def test_a_mirrored_position_order_gives_the_same_colours() -> None:
    features = random_map(8, 6, 7)
    mirrored = features[:, :, ::-1]
    one, two = pca_basis([features]), pca_basis([mirrored])
    np.testing.assert_allclose(one.project(features)[:, ::-1], two.project(mirrored), atol=1e-9)


def test_maps_have_equal_weight_regardless_of_size() -> None:
    small, large = np.zeros((4, 2, 2)), np.ones((4, 10, 10))
    np.testing.assert_allclose(pca_basis([small, large]).mean, 0.5)


def test_shared_basis_paints_equal_features_equal() -> None:
    a, b = random_map(6, 5, 5, 1), random_map(6, 8, 3, 2)
    b[:, 0, 0] = a[:, 4, 4]
    basis = pca_basis([a, b])
    np.testing.assert_allclose(basis.project(a)[4, 4], basis.project(b)[0, 0])
    assert not np.allclose(basis.project(a)[4, 4], pca_basis([b]).project(b)[0, 0])


def test_outlier_does_not_dim_the_rest() -> None:
    features = random_map(6, 30, 30)
    calm = pca_basis([features]).project(features)
    features[0, 3, 3] += 30  # along the leading axis, so that the axes stay
    loud = pca_basis([features]).project(features)
    assert np.ptp(loud[..., 0][5:]) > 0.6 * np.ptp(calm[..., 0][5:])


@pytest.mark.parametrize("shape", [(5, 1, 1), (5, 1, 2), (1, 4, 4), (2, 3, 3), (384, 1, 3)])
def test_tiny_maps_have_pictures(shape: tuple[int, int, int]) -> None:
    features = random_map(*shape)
    picture = pca_picture(features, pca_basis([features]), (20, 30))
    assert picture.size == (30, 20)
    assert picture.mode == "RGB"


def test_constant_map_is_grey_despite_rounding_noise() -> None:
    noise = np.random.default_rng(0).normal(size=(7, 4, 4)) * 1e-7
    for features in (np.full((7, 4, 4), 3.0), np.full((7, 4, 4), 3.0) + noise, np.zeros((7, 4, 4))):
        picture = np.asarray(pca_picture(features, pca_basis([features]), (8, 8)))
        assert set(picture.ravel()) <= {127, 128}


def test_a_map_of_rank_one_uses_red_only() -> None:
    ramp = np.arange(12.0).reshape(1, 3, 4) * np.array([2.0, 1.0, 0.5]).reshape(3, 1, 1)
    picture = np.asarray(pca_picture(torch.from_numpy(ramp), pca_basis([ramp]), (3, 4), smooth=False))
    assert set(picture[..., 1:].ravel()) <= {127, 128}
    assert np.all(np.diff(picture[..., 0].ravel().astype(int)) > 0)
    assert picture[0, 0, 0] == 0
    assert picture[-1, -1, 0] == 255


def test_blocks_keep_cells_and_smooth_does_not() -> None:
    features = random_map(5, 2, 2)
    basis = pca_basis([features])
    blocks = np.asarray(pca_picture(features, basis, (16, 16), smooth=False))
    assert len(np.unique(blocks.reshape(-1, 3), axis=0)) == 4
    assert len(np.unique(np.asarray(pca_picture(features, basis, (16, 16))).reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], "at least one"),
        ([np.zeros((3, 2, 2)), np.zeros((4, 2, 2))], "3, 4"),
        ([np.full((3, 2, 2), np.nan)], "NaN"),
        ([np.zeros((1, 3, 2, 2))], r"\(D, H, W\)"),
        ([np.zeros((3, 0, 2))], r"\(D, H, W\)"),
    ],
)
def test_maps_without_a_common_basis_are_refused(maps: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pca_basis(maps)


def test_a_map_of_other_width_is_refused() -> None:
    with pytest.raises(ValueError, match="3 channels, the map has 4"):
        pca_basis([random_map(3, 2, 2)]).project(random_map(4, 2, 2))


def test_sheets_contain_their_pictures() -> None:
    red, blue = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (30, 50), "blue")
    plain, labelled = side_by_side([red, blue]), side_by_side([red, blue], ["a", "a very long caption that is cut"])
    assert plain.height == 50
    assert labelled.height > 50
    assert plain.width == labelled.width > 70
    assert plain.getpixel((0, 0)) == (255, 0, 0)
    assert plain.getpixel((plain.width - 1, 49)) == (0, 0, 255)
    sheet = stacked([plain, red])
    assert sheet.getpixel((0, sheet.height - 1)) == (255, 0, 0)
    assert fitted(blue, 100).size == (60, 100)
    with pytest.raises(ValueError, match="one label for each, got 2 and 1"):
        side_by_side([red, blue], ["one"])
    with pytest.raises(ValueError, match="stack"):
        stacked([])


def test_mad_limits_exclude_outliers() -> None:
    values = np.stack([np.arange(9.0), np.zeros(9)], 1)
    values[8, 0] = 100
    low, high = mad_limits(values)
    assert low.tolist() == [1, 0] and high.tolist() == [7, 0]  # 4 is the median and 2 the MAD: 0 is one of two too far
    features = random_map(6, 8, 8)
    features[0, 0, 0] = 1e4
    basis = pca_basis([features], limits="mad")
    assert (basis.high - basis.low < 100).all()
