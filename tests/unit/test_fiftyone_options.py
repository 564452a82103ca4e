"""Options, heatmap scales and box pooling of the FiftyOne integration, which need no FiftyOne."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agglo.integrations.fiftyone.encoding import pool
from agglo.integrations.fiftyone.maps import Scale, draw, fit_scales, layers, map_keys
from agglo.integrations.fiftyone.options import Options, parse
from agglo.types import ConfigError


def test_the_options_of_the_plugin_keep_their_names():
    given = {
        "output_type": "spatial", "feature_format": "NLC", "use_mixed_precision": True,
        "use_external_preprocessor": True, "apply_smoothing": True, "smoothing_sigma": 1.51, "batch_size": 16,
        "num_workers": 4,
    }  # fmt: skip
    options = parse(given)
    assert {name: getattr(options, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_typ": "summary"}, r"unknown option 'output_typ'; did you mean 'output_type'"),
        ({"output_type": "spatail"}, r"output_type: 'spatail' is not allowed; did you mean 'spatial'"),
        ({"feature_format": "NHWC"}, r"feature_format: 'NHWC' is not allowed; did you mean 'NCHW'"),
        ({"batch_size": 0}, r"batch_size: 0 is not a whole number of at least 1"),
        ({"num_workers": True}, r"num_workers: True is not a whole number"),
        ({"use_external_preprocessor": "no"}, r"use_external_preprocessor: 'no' is not a bool"),
        ({"smoothing_sigma": 0}, r"smoothing_sigma: 0 is not a positive number"),
        ({"text": "a cup"}, r"text='a cup': a prompt is drawn as a heatmap, with output_type='spatial'"),
        ({"text": 3, "output_type": "all"}, r"text: 3 is not a name or text"),
        ({"patch": (2, 0), "output_type": "spatial"}, r"patch: \(2, 0\) is outside of the image"),
        ({"patch": "middle", "output_type": "spatial"}, r"patch: 'middle' is not a point"),
        ({"heads": ["a", "b"]}, r"heads: a, b: an embedding has one head; output_type='all' gives several"),
        ({"heads": "a", "text": True}, r"heads and text: give one of them"),
        ({"patch_image": "a.jpg", "output_type": "spatial"}, r"patch_image: needs patch=\(x, y\)"),
        ({"maps": [], "output_type": "spatial"}, r"maps: is empty"),
        ({"maps": "attention", "output_type": "spatial"}, r"maps: 'attention' is not allowed"),
        ({"text": ["a cup", "A cup!"], "output_type": "spatial"}, r"two results would have the name 'a_cup'"),
    ],
)
def test_a_wrong_option_is_refused_with_the_next_step(given, message):
    with pytest.raises(ConfigError, match=message):
        parse(given)


def test_a_scale_survives_its_text():
    rng = np.random.default_rng(0)
    images = [{"pca": rng.normal(size=(5, 4, 6)), "norm": rng.random((1, 4, 6))} for _ in range(3)]
    for scale in fit_scales(images).values():
        again = Scale.parse(scale.dump())
        for name in ("low", "high", "mean", "axes"):
            before, after = getattr(scale, name), getattr(again, name)
            assert (before is None) == (after is None)
            assert before is None or np.allclose(before, after, rtol=1e-6)


def test_outlier_tokens_do_not_take_the_first_component():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 16, 16)) * 0.1
    features[2] += np.linspace(-3, 3, 16)
    clean = fit_scales([{"pca": features}])["pca"].axes[0]
    features[5, 3, 3] = features[5, 9, 9] = 500
    found = fit_scales([{"pca": features}])["pca"].axes[0]
    assert found[2] > 0.99
    assert np.allclose(found, clean, atol=0.01)


def test_heatmaps_are_small_and_have_their_values():
    options = parse({"output_type": "spatial", "maps": ["pca", "rgb", "norm", "heads"], "patch": (0, 0), "heads": "t"})
    spatial = torch.randn(2, 7, 5, 3)
    images = list(layers(options, spatial, {"t": torch.randn(2, 4, 10, 6)}, None))
    scales = fit_scales(images)
    drawn = draw(options, images[0], scales)
    assert [each.key for each in drawn] == map_keys(options, ["t"]) == [
        "pca", "red", "green", "blue", "norm", "t", "patch",
    ]  # fmt: skip
    assert {each.bytes.dtype for each in drawn} == {np.dtype(np.uint8)}
    norm = drawn[4]
    values = norm.low + (norm.bytes - 1.0) / 254 * (norm.high - norm.low)
    expected = spatial[0].norm(dim=0).numpy().clip(norm.low, norm.high)
    assert np.abs(values - expected).max() <= (norm.high - norm.low) / 254
    assert drawn[5].bytes.shape == (10, 6)
    assert drawn[6].bytes[0, 0] == 255


def test_smoothing_spreads_a_peak_and_keeps_the_mean():
    values = np.zeros((1, 21, 21), np.float32)
    values[0, 10, 10] = 1
    scale = {"norm": Scale(np.zeros(1), np.ones(1))}
    (sharp,) = draw(Options(maps=("norm",)), {"norm": values}, scale)
    (soft,) = draw(Options(maps=("norm",), apply_smoothing=True, smoothing_sigma=1.0), {"norm": values}, scale)
    assert sharp.bytes.max() == 255
    assert soft.bytes[10, 10] == round(1 + 254 / (2 * np.pi))  # 0 is drawn as nothing
    assert abs(int((soft.bytes - 1).sum()) - 254) < 25


def test_boxes_are_averaged_by_covered_area():
    spatial = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    boxes = np.array(
        [[0, 0, 1, 1], [0.25, 0, 0.25, 1 / 3], [0.125, 0, 0.25, 1 / 3], [0.99, 0.99, 0, 0], [0.9, 0.9, 1, 1]],
        np.float32,
    )
    assert pool(spatial, boxes)[:, 0] == pytest.approx([5.5, 1, 0.5, 11, 11], abs=1e-4)
