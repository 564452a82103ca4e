"""k nearest neighbours on summaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import FeatureError, class_names, encode, open_source
from agglo.evals.base import Backbone, Eval, Progress
from agglo.types import ConfigError

SCENES_TRAIN: dict[str, Any] = {"kind": "scenes", "split": "train"}
SCENES_TEST: dict[str, Any] = {"kind": "scenes", "split": "test"}

_QUERIES = 256
_BANK = 65536


class Knn(Eval):
    """Weighted k-nearest-neighbour classification of summaries (RADIO's protocol, METHOD 7; Wu et al. 2018).

    The bank holds the L2-normalised summaries of ``train``. Each image of ``test`` gives its k nearest a vote of
    ``exp(cos / temperature)`` for their class; the class with most votes wins, equal votes go to the class whose name
    comes first. Nothing is fitted. A model without a summary (HOG, SAM) is measured by its mean-pooled spatial map.
    An image of a class that ``train`` lacks counts as wrong. ``scenes`` splits by object, so no neighbour shows the
    same object. The default k is smaller than RADIO's 20 because a class of ``scenes`` has few training images.

    Metrics: ``top1``, in [0, 1].

    Args:
        k: neighbours that vote; at most the size of the bank.
        temperature: the smaller, the more the nearest decides.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        train: a labelled source, for the bank.
        test: a labelled source, for the queries.
    """

    def __init__(
        self,
        *,
        k: int = 10,
        temperature: float = 0.07,
        size: int | tuple[int, int] = 128,
        train: Mapping[str, Any] = SCENES_TRAIN,
        test: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if k < 1:
            raise ConfigError(f"evals.knn: k is at least 1, got {k}")
        if not temperature > 0:
            raise ConfigError(f"evals.knn: temperature must be positive, got {temperature}; 0.07 is RADIO's")
        self.k = k
        self.temperature = temperature
        self.size = size
        self.train = train
        self.test = test

    def run(self, model: Backbone, progress: Progress | None = None) -> dict[str, float]:
        bank = encode(model, self.train, self.size, want="summary", progress=progress)
        test = encode(model, self.test, self.size, want="summary", progress=progress)
        if bank.summary is None or test.summary is None:
            raise FeatureError(f"{type(model).__name__} returned neither a summary nor a spatial map")
        bank_names = class_names(open_source(self.train), bank.index)
        test_names = class_names(open_source(self.test), test.index)
        names = sorted(set(bank_names))
        number = {name: i for i, name in enumerate(names)}
        labels = torch.tensor([number[name] for name in bank_names])
        truth = torch.tensor([number.get(name, -1) for name in test_names])
        found = classify(bank.summary, labels, test.summary, len(names), self.k, self.temperature)
        return {"top1": float((found == truth).double().mean())}


def classify(bank: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """The class ``(M,)`` that the k nearest of ``bank`` vote each query into.

    Args:
        bank: ``(N, D)``, any length of vector.
        labels: ``(N,)`` in 0 .. ``classes`` - 1.
        queries: ``(M, D)``.
        classes: how many classes there are.
        k: neighbours; at most N are used.
        temperature: of the votes.
    """
    bank = F.normalize(bank, dim=1)
    k = min(k, len(bank))
    found = []
    for query in queries.split(_QUERIES):
        query = F.normalize(query, dim=1)
        best = torch.empty(len(query), 0)
        where = torch.empty(len(query), 0, dtype=torch.long)
        for start in range(0, len(bank), _BANK):  # never more than _QUERIES x _BANK similarities at once
            cosine, index = torch.topk(query @ bank[start : start + _BANK].T, min(k, len(bank) - start, _BANK))
            best, keep = torch.topk(torch.cat((best, cosine), 1), min(k, best.shape[1] + cosine.shape[1]))
            where = torch.cat((where, index + start), 1).gather(1, keep)
        # Relative to the nearest, which changes no decision and cannot overflow.
        weights = ((best.double() - best[:, :1].double()) / temperature).exp()
        votes = torch.zeros(len(query), classes, dtype=torch.float64).scatter_add_(1, labels[where], weights)
        found.append(votes.argmax(1))
    return torch.cat(found)
