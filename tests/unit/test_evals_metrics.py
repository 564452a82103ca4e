"""The numbers of the evals against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import confusion_matrix, jaccard_score, r2_score
from sklearn.neighbors import KNeighborsClassifier

from agglo.evals import depth as depth_eval
from agglo.evals import knn
from agglo.evals._probe import Standard, fit_logistic, fit_ridge, predictions
from agglo.evals.agreement import spatial_agreement
from agglo.evals.base import ProbeError
from agglo.evals.segmentation import _histogram, confusion, miou
from agglo.evals.zero_shot import rank_of
from agglo.types import ConfigError

RNG = np.random.default_rng(0)


def clusters(n: int, classes: int = 5, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    labels = RNG.integers(0, classes, n)
    centres = np.random.default_rng(1).standard_normal((classes, width))
    return torch.tensor(centres[labels] + 1.2 * RNG.standard_normal((n, width))).float(), torch.tensor(labels)


@pytest.mark.parametrize(("k", "queries", "bank"), [(1, 256, 65536), (20, 256, 65536), (20, 7, 30), (20, 64, 13)])
def test_knn_is_the_weighted_vote(monkeypatch: pytest.MonkeyPatch, k: int, queries: int, bank: int) -> None:
    monkeypatch.setattr(knn, "_QUERIES", queries)
    monkeypatch.setattr(knn, "_BANK", bank)
    x, y = clusters(120)
    q, truth = clusters(90)
    found = knn.classify(x, y, q, 5, k, 0.07).numpy()

    a, b = (t.double().numpy() / np.linalg.norm(t.double().numpy(), axis=1, keepdims=True) for t in (q, x))
    brute = []
    for row in a @ b.T:
        nearest = np.argsort(-row)[:k]
        brute.append(np.bincount(y.numpy()[nearest], np.exp(row[nearest] / 0.07), 5).argmax())
    np.testing.assert_array_equal(found, brute)

    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x, y)
    np.testing.assert_array_equal(found, reference.predict(q))
    assert 0.3 < (found == truth.numpy()).mean() < 1  # neither chance nor trivial: the vote matters


def test_knn_weights_and_tiny_temperatures() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[0.9, 0.4]])
    assert knn.classify(bank, labels, query, 2, 3, 1e-4).tolist() == [0]  # the nearest outvotes
    assert knn.classify(bank, labels, query, 2, 3, 100.0).tolist() == [1]  # the majority does
    assert knn.classify(bank, labels, query, 2, 50, 100.0).tolist() == [1]  # k beyond the bank


@pytest.mark.parametrize("missing", [False, True])
def test_miou_and_confusion(missing: bool) -> None:
    truth, found = RNG.integers(0, 6, (2, 4, 40, 30))
    if missing:  # class 3 in neither, class 5 only predicted
        truth[(truth == 3) | (truth == 5)] = 0
        found[found == 3] = 1
    void = RNG.random(truth.shape) < 0.1
    marked = torch.tensor(np.where(void, 255, truth).astype(np.uint8))
    matrix = confusion(marked, torch.tensor(found), 6)
    np.testing.assert_array_equal(matrix.numpy(), confusion_matrix(truth[~void], found[~void], labels=range(6)))
    expected = jaccard_score(truth[~void], found[~void], average="macro")  # labels: those that occur in either
    assert miou(matrix) == pytest.approx(expected, abs=1e-12)


def test_mask_beyond_the_classes_raises() -> None:
    mask = torch.tensor([[0, 4], [255, 1]], dtype=torch.uint8)
    with pytest.raises(ConfigError, match="class 4"):
        confusion(mask, torch.zeros(2, 2), 4)
    with pytest.raises(ConfigError, match="class 4"):
        _histogram(mask, (1, 1), 4)
    with pytest.raises(ProbeError, match="no labelled pixel"):
        miou(torch.zeros(3, 3))


def test_histogram_counts_pixels() -> None:
    mask = torch.tensor([[0, 0, 2, 2], [1, 255, 2, 255]], dtype=torch.uint8)
    expected = torch.tensor([[0.5, 0], [0.25, 0], [0, 0.75]])
    torch.testing.assert_close(_histogram(mask, (1, 2), 3)[0, :, 0], expected)


@pytest.mark.parametrize("decay", [0.1, 0.003])
def test_logistic_probe_reaches_the_optimum(decay: float) -> None:
    x, y = clusters(300, classes=4, width=6)
    weight, bias = fit_logistic(x, torch.nn.functional.one_hot(y, 4).float(), decay, steps=100)
    reference = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=2000).fit(x.double(), y)

    def loss(w: np.ndarray, b: np.ndarray) -> float:
        z = x.double().numpy() @ w.T + b
        z = z - z.max(1, keepdims=True)
        log = z - np.log(np.exp(z).sum(1, keepdims=True))
        return float(-log[np.arange(len(y)), y].mean() + 0.5 * decay * (w**2).sum())

    best = loss(reference.coef_, reference.intercept_)
    assert loss(weight.double().numpy(), bias.double().numpy()) == pytest.approx(best, abs=1e-6)


def test_logistic_probe_takes_soft_and_weighted_labels() -> None:
    # With uninformative features, the bias alone must give the weighted class frequencies.
    y = torch.tensor([[0.5, 0.25, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.25]])
    weight, bias = fit_logistic(torch.zeros(3, 2), y, 0.01, steps=100)
    assert weight.abs().max() == 0
    torch.testing.assert_close(bias.softmax(0), torch.tensor([0.25, 0.625, 0.125]), atol=1e-4, rtol=0)


def test_logistic_probe_reports_divergence() -> None:
    y = torch.eye(2).repeat(10, 1)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    x[4, 1] = float("nan")
    with pytest.raises(ProbeError, match="diverged"):
        fit_logistic(x, y, 0.0, steps=5)
    with pytest.raises(ProbeError, match="no labelled pixel"):
        fit_logistic(torch.zeros(20, 3), y * 0, 0.0, steps=5)


@pytest.mark.parametrize("ridge", [10.0, 0.1, 1e-4])
def test_ridge_equals_scikit_learn(ridge: float) -> None:
    x = RNG.standard_normal((500, 12)) * np.linspace(0.1, 3, 12) + 5
    y = x @ RNG.standard_normal(12) + 0.3 * RNG.standard_normal(500) + 4
    w = RNG.random(500) * (RNG.random(500) < 0.8)
    y_holes = np.where(w > 0, y, np.nan)  # a cell without depth must have no effect
    ((weight, bias),) = fit_ridge(*(torch.tensor(t) for t in (x, y_holes, w)), [ridge])
    reference = Ridge(alpha=ridge * w.sum()).fit(x, y, sample_weight=w)
    np.testing.assert_allclose(weight[0].numpy(), reference.coef_, atol=1e-6)
    assert float(bias) == pytest.approx(reference.intercept_, abs=1e-5)


def test_ridge_survives_collinear_features() -> None:
    x = torch.tensor(RNG.standard_normal((50, 1))).repeat(1, 4).float()
    probes = fit_ridge(x, x[:, 0] * 2 + 1, torch.ones(50), [1e-3, 1e-9])
    torch.testing.assert_close(probes[1][0].sum(), torch.tensor(2.0), atol=1e-4, rtol=0)
    with pytest.raises(ProbeError, match="no valid depth"):
        fit_ridge(x, x[:, 0], torch.zeros(50), [1.0])


def test_depth_metrics() -> None:
    d = RNG.uniform(0.5, 5, (3, 8, 9)).astype(np.float32)
    p = (d * RNG.uniform(0.6, 1.5, d.shape)).astype(np.float32)
    d[0, 0, :3] = 0, np.inf, np.nan
    ok = np.isfinite(d) & (d > 0)
    sums, count = depth_eval.metrics(torch.tensor(p), torch.tensor(d))
    a, b = p[ok].astype(np.float64), d[ok].astype(np.float64)
    assert count == ok.sum() == d.size - 3
    ratio = np.maximum(a / b, b / a)
    expected = [*((ratio < 1.25**k).sum() for k in (1, 2, 3)), ((a - b) ** 2).sum(), (abs(a - b) / b).sum()]
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-12)
    assert 0 < expected[0] < count


def test_cell_depth_is_the_mean_log_of_valid_pixels() -> None:
    depth = torch.tensor([[1.0, 4.0, 0.0, 8.0], [1.0, 4.0, float("inf"), float("nan")]])
    y, w = depth_eval.cell_log_depth(depth, (1, 2))
    torch.testing.assert_close(y, torch.tensor([2.0, 8.0]).log())
    torch.testing.assert_close(w, torch.tensor([1.0, 0.25]))
    assert depth_eval.depth_limits([depth]) == (0.5, 16.0)


def test_agreement_is_variance_weighted_r2() -> None:
    maps = []
    for shape in ((3, 4, 5, 5), (2, 4, 3, 6)):  # batches may differ in grid
        theirs = torch.tensor(RNG.standard_normal(shape) * [[[[1]], [[5]], [[0.2]], [[2]]]] + 30)
        maps.append((theirs + torch.tensor(RNG.standard_normal(shape)), theirs))
    ours, theirs = (np.concatenate([m[i].numpy().transpose(0, 2, 3, 1).reshape(-1, 4) for m in maps]) for i in (0, 1))
    r2, cosine = spatial_agreement(maps)
    assert r2 == pytest.approx(r2_score(theirs, ours, multioutput="variance_weighted"), abs=1e-9)
    a, b = ours - theirs.mean(0), theirs - theirs.mean(0)
    expected = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert cosine == pytest.approx(expected, abs=1e-9)
    assert spatial_agreement([(t, t) for _, t in maps]) == pytest.approx((1, 1))
    mean = torch.tensor(theirs.mean(0))[None, :, None, None]
    assert spatial_agreement([(mean.expand_as(t), t) for _, t in maps])[0] == pytest.approx(0, abs=1e-9)
    flat = torch.ones(1, 2, 3, 3)
    assert spatial_agreement([(flat, flat)])[0] is None


def test_rank_of_counts_better_classes() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.4, 0.4, 0.4], [0.2, 0.1, 0.3]])
    assert rank_of(scores, torch.tensor([1, 2, 1])).tolist() == [0, 2, 2]


def test_standardising() -> None:
    x = torch.tensor(RNG.standard_normal((6, 3, 4, 5)) * [[[[3]], [[0.01]], [[0]]]] + 100).float()
    out = Standard.of(x)(x).double()
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=2e-3, rtol=0)
    torch.testing.assert_close(out[:, :2].std((0, 2, 3), correction=0), torch.ones(2).double(), atol=1e-3, rtol=0)
    assert out[:, 2].abs().max() == 0  # a constant channel becomes 0 and is not divided by its variance


def test_predictions_have_the_size_of_the_truth() -> None:
    features = torch.randn(4, 3, 2, 2)
    truth = [torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(6, 8), torch.zeros(4, 4)]
    weight, bias = torch.randn(2, 3), torch.randn(2)
    found = list(predictions(features, weight, bias, truth))
    assert [tuple(p.shape) for p, _ in found] == [(2, 2, 4, 4), (1, 2, 6, 8), (1, 2, 4, 4)]
    low = torch.einsum("kd,dhw->khw", weight, features[2]) + bias[:, None, None]
    expected = torch.nn.functional.interpolate(low[None], size=(6, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[1][0], expected)
