"""The reference implementation's evaluation numbers: ``golden/radio/eval_metrics`` of ``$AGGLO_SHARED``.

Every metric stored there has its test below, but for two that agglo does not have: ``pca`` (its pictures are drawn
between percentiles, with one basis for all) and ``resize`` (its evals crop, they do not keep the aspect).
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agglo.evals.knn import classify
from agglo.evals.mode_switch import Pairs
from agglo.evals.rank import lidar, rank_me
from agglo.nn.linalg import Moments, hadamard, is_hadamard_order
from agglo.types import Features

ROOT = Path(__file__).parents[2]
FOLDER = (ROOT / os.environ.get("AGGLO_SHARED", "../shared")).resolve() / "golden" / "radio"
FILE = FOLDER / "eval_metrics.json"

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no {FILE}: set AGGLO_SHARED")

METRICS: dict[str, Any] = json.loads(FILE.read_text())["metrics"] if FILE.exists() else {}


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(FOLDER / "eval_metrics.io.safetensors")


def test_every_stored_metric_is_looked_at() -> None:
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
