"""The numbers of the evals against torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics import functional
from torchmetrics.functional import classification

from agglo.evals import depth
from agglo.evals._answers import binary
from agglo.evals.promptable import overlap
from agglo.evals.segmentation import confusion, miou
from agglo.evals.zero_shot import rank_of

DRAW = torch.Generator().manual_seed(0)


def test_mean_intersection_over_union() -> None:
    truth = torch.randint(0, 6, (4, 20, 30), generator=DRAW)
    found = torch.where(torch.rand(truth.shape, generator=DRAW) < 0.6, truth, (truth + 1) % 6)
    truth[torch.rand(truth.shape, generator=DRAW) < 0.1] = 255
    expected = classification.multiclass_jaccard_index(found, truth, 6, average="macro", ignore_index=255)
    assert miou(confusion(truth.to(torch.uint8), found, 6)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_accuracy_of_the_first_k(k: int) -> None:
    scores, truth = torch.randn(200, 12, generator=DRAW), torch.randint(0, 12, (200,), generator=DRAW)
    scores[torch.arange(200), truth] += 1
    expected = classification.multiclass_accuracy(scores, truth, 12, average="micro", top_k=k)
    assert float((rank_of(scores, truth) < k).double().mean()) == pytest.approx(float(expected), abs=1e-6)


def test_yes_and_no() -> None:
    predicted, true = (torch.rand(300, generator=DRAW) < share for share in (0.6, 0.5))
    found = binary(list(zip(predicted.tolist(), true.tolist(), strict=True)))
    for name in ("accuracy", "precision", "recall"):
        expected = getattr(classification, f"binary_{name}")(predicted.int(), true.int())
        assert found[name] == pytest.approx(float(expected), abs=1e-6)
    assert found["f1"] == pytest.approx(float(classification.binary_f1_score(predicted.int(), true.int())), abs=1e-6)


def test_overlap_of_masks() -> None:
    a, b = (torch.rand(5, 16, 12, generator=DRAW) < 0.5 for _ in range(2))
    expected = [float(classification.binary_jaccard_index(x.int(), y.int())) for x, y in zip(a, b, strict=True)]
    assert overlap(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_depth() -> None:
    truth = 0.5 + 4 * torch.rand(1, 30, 40, generator=DRAW)
    found = truth * (0.7 + 0.7 * torch.rand(truth.shape, generator=DRAW))
    numbers = depth.measure([(found[0], truth[0])])
    wanted = functional.mean_squared_error(found, truth, squared=False)
    assert numbers["rmse"] == pytest.approx(float(wanted), abs=1e-6)
    relative = functional.mean_absolute_percentage_error(found.double(), truth.double())
    assert numbers["abs_rel"] == pytest.approx(float(relative), abs=1e-6)
    assert np.isfinite(list(numbers.values())).all()
