"""Every kind of eval keeps the contract, on a small untrained model."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.config import build, find, kinds
from agglo.evals.base import Eval
from agglo.teachers.toy import Toy
from agglo.types import FeatureSpec, Output

FEW: dict[str, dict[str, Any]] = {
    "knn": {"k": 3},
    "segmentation": {"steps": 5, "decay": [0.1]},
    "agreement": {"sources": [{"kind": "photos"}]},
    "linear": {"steps": 5, "decay": [0.1]},
    "mode_switch": {"sizes": [64, 96]},
    "rank": {"views": 1},
    "robustness": {"corruptions": ["contrast"], "severities": [5]},
    "latency": {"repeats": 3},
}


class RandomProjection(nn.Module):
    """Encodes images by a fixed random projection and texts by their letters."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy(summary=26, channels=26)
        self.spec = FeatureSpec(26, 26, stride=16, step=16)

    def forward(self, images: Tensor) -> Output:
        out = self.toy(images)
        return Output(out.summary, out.spatial, {"toy": out})

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self(images).summary, dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        letters = [[1e-3 + text.count(chr(97 + index)) for index in range(26)] for text in texts]
        return F.normalize(torch.tensor(letters), dim=-1)


BUNDLED = [kind for kind in kinds("evals", installed=False) if find("evals", kind).bundled]
"""Kinds that need no files of the user; the others are covered by their own tests."""


@pytest.mark.evals
@pytest.mark.parametrize("kind", BUNDLED)
def test_eval_returns_finite_reproducible_numbers(kind: str) -> None:
    model = RandomProjection().eval()
    program = ({"toy": Toy(summary=26, channels=26, seed=1)},) if kind == "agreement" else ()
    made: Eval = build("evals", {"kind": kind, **FEW.get(kind, {})}, *program)
    numbers = made.run(model)
    assert numbers
    assert all(isinstance(value, float) and math.isfinite(value) for value in numbers.values())
    assert made.lower_is_better <= set(numbers)
    again = made.run(model)
    assert again == numbers if made.deterministic else again.keys() == numbers.keys()
    assert not model.training
