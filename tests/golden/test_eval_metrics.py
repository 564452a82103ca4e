"""The reference implementation's evaluation numbers: ``golden/radio/eval_metrics`` of ``$AGGLO_SHARED``.

Every metric stored there has its test below.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agglo.evals.knn import classify
from agglo.evals.mode_switch import Pairs
from agglo.evals.rank import lidar, rank_me
from agglo.nn.linalg import Moments, hadamard, is_hadamard_order
from agglo.preprocess import aspect_size
from agglo.report.picture import Basis, mad_limits
from agglo.types import Features

ROOT = Path(__file__).parents[2]
FOLDER = (ROOT / os.environ.get("AGGLO_SHARED", "../shared")).resolve() / "golden" / "radio"
FILE = FOLDER / "eval_metrics.json"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no {FILE}: set AGGLO_SHARED")

METRICS: dict[str, Any] = json.loads(FILE.read_text())["metrics"] if FILE.exists() else {}


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(FOLDER / "eval_metrics.io.safetensors")


def test_every_stored_metric_is_tested() -> None:
    assert set(METRICS) == {"knn", "rank_me", "lidar", "mode_switching", "hadamard", "phi_s", "pca", "resize"}


def test_knn(stored: dict[str, Tensor]) -> None:
    wanted = METRICS["knn"]
    found = classify(
        stored["knn/train_embeddings"],
        stored["knn/train_labels"],
        stored["knn/test_embeddings"],
        wanted["num_classes"],
        wanted["k"],
        wanted["temperature"],
    )
    assert torch.equal(found, stored["knn/predicted"])
    assert int((found == stored["knn/test_labels"]).sum()) == wanted["num_correct"]


def test_rank_me_and_lidar(stored: dict[str, Tensor]) -> None:
    views = stored["ssl/embeddings"]
    assert rank_me(views[:, 0]) == pytest.approx(METRICS["rank_me"], rel=1e-6)
    assert lidar(views) == pytest.approx(METRICS["lidar"], rel=1e-6)


def test_mode_switching(stored: dict[str, Tensor]) -> None:
    wanted = METRICS["mode_switching"]
    pairs = Pairs("golden")
    for ours, theirs in zip(stored["mode_switching/student"], stored["mode_switching/teacher"], strict=True):
        pairs.add(Features(None, ours[None]), Features(None, theirs[None]), ["image"])  # one at a time: sums must merge
    found = pairs.statistics()
    assert 1 - found["cosine"] == pytest.approx(wanted["cos_error"], rel=1e-6)
    for key in ("fidelity", "student_variance", "teacher_variance"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-6)


@pytest.mark.evals
@pytest.mark.parametrize("order", METRICS.get("hadamard", {}))
def test_hadamard(order: str) -> None:
    """Where the reference raises, the order is either constructible all the same, or refused here too."""
    n, wanted = int(order), METRICS["hadamard"][order]
    if isinstance(wanted, str) and not is_hadamard_order(n):
        with pytest.raises(ValueError, match=order):
            hadamard(n)
        return
    found = hadamard(n).double()
    torch.testing.assert_close(found @ found.T, torch.eye(n, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.abs(), torch.full_like(found, n**-0.5), atol=1e-6, rtol=0)


def test_phi_s(stored: dict[str, Tensor]) -> None:
    """``W = alpha H U^T`` with the stored eigenvectors, which are defined up to sign, and agglo's ``H``."""
    x, vectors = stored["phi_s/X"], stored["phi_s/eigenvectors"]
    moments = Moments(x.shape[1])
    moments.update(x)
    torch.testing.assert_close(moments.mean, stored["phi_s/mean"], atol=1e-9, rtol=1e-9)
    covariance = moments.covariance()
    alpha = float(covariance.diagonal().mean().rsqrt())
    assert alpha == pytest.approx(METRICS["phi_s"]["alpha"], rel=1e-6)
    ours = alpha * hadamard(x.shape[1]) @ vectors.T
    torch.testing.assert_close(
        (ours @ covariance @ ours.T).diagonal(), stored["phi_s/Y_cov"].diagonal(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        stored["phi_s/W"] @ covariance @ stored["phi_s/W"].T, stored["phi_s/Y_cov"], atol=1e-6, rtol=0
    )


def test_pca(stored: dict[str, Tensor]) -> None:
    """Colours of a map by stored axes, which are defined up to sign; the reference draws them bilinearly."""
    axes = stored["pca/reduction"].double().numpy()
    features = stored["pca/features"].double().numpy()
    low, high = mad_limits(features @ axes)
    assert low == pytest.approx(stored["pca/color_min"].numpy(), rel=1e-6)
    assert high == pytest.approx(stored["pca/color_max"].numpy(), rel=1e-6)
    h, w = METRICS["pca"]["grid"]
    colours = Basis(np.zeros(len(axes)), axes.T, low, high).project(features.T.reshape(-1, h, w))
    drawn = torch.from_numpy(colours.clip(0, 1)).permute(2, 0, 1)[None]
    drawn = torch.nn.functional.interpolate(drawn, size=METRICS["pca"]["out"], mode="bilinear")[0].permute(1, 2, 0)
    torch.testing.assert_close(drawn, stored["pca/map"].double(), atol=1e-6, rtol=0)


def test_resize() -> None:
    assert METRICS["resize"]
    for row in METRICS["resize"]:
        height, *width = row["resolution"]
        target = height, (width or [height])[0]
        size = row["height"], row["width"]
        assert list(aspect_size(size, target, row["resize_multiple"], inside=row["max_dim"])) == row["out"], row
