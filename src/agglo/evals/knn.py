"""k nearest neighbours on summaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import check_aspect, encode
from agglo.evals._labels import class_names, number_classes
from agglo.evals.base import SCENES_TEST, SCENES_TRAIN, Backbone, Eval, EvalContext, FeatureError, device_of
from agglo.types import ConfigError

_QUERIES = 2048
_BANK = 32768
_GROUP = 32
_PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


class Knn(Eval):
    """Weighted k-nearest-neighbour classification of summaries (RADIO's protocol, METHOD 7; Wu et al. 2018).

    The bank holds the summaries of ``train``; likeness is the cosine. Each image of ``test`` gives its k nearest a vote
    of ``exp(cos / temperature)`` for their class; the class with most votes wins, equal votes go to the class whose
    name comes first. Nothing is fitted. A model without a summary (HOG, SAM) is measured by its mean-pooled spatial
    map. An image of a class that ``train`` lacks counts as wrong, and a warning names the class.

    ``scenes`` splits by object, so no neighbour shows the same object; a class of it has ten training images, so that
    at k = 20 half the votes are of other classes at best, and only their weights decide.

    Metrics: ``top1``, in [0, 1].

    Args:
        k: neighbours that vote; at most the size of the bank.
        temperature: the smaller, the more the nearest decides.
        vote: ``weighted``; or ``majority``, one vote each (EUPE's protocol, with k = 10).
        precision: in which summaries are kept: ``float32``, or ``float16``, which takes half the memory. Products are
            summed in float32 either way.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        aspect: ``crop``: the middle of each image, in the aspect of ``size``; ``keep``: the whole image, scaled so that
            it covers ``size``, RADIO's way. Teachers with one fixed canvas are shown crops either way, with a warning.
        train: a labelled source, for the bank.
        test: a labelled source, for the queries.
    """

    def __init__(
        self,
        *,
        k: int = 20,
        temperature: float = 0.07,
        vote: Literal["weighted", "majority"] = "weighted",
        precision: Literal["float32", "float16"] = "float32",
        size: int | tuple[int, int] = 128,
        aspect: Literal["crop", "keep"] = "crop",
        train: Mapping[str, Any] = SCENES_TRAIN,
        test: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if k < 1:
            raise ConfigError(f"evals.knn: k is at least 1, got {k}")
        if not temperature > 0:
            raise ConfigError(f"evals.knn: temperature must be positive, got {temperature}; 0.07 is RADIO's")
        if vote not in ("weighted", "majority"):
            raise ConfigError(f"evals.knn: vote is weighted or majority, not {vote!r}")
        if precision not in _PRECISIONS:
            raise ConfigError(f"evals.knn: precision is float32 or float16, not {precision!r}")
        self.k = k
        self.precision = precision
        self.temperature = temperature if vote == "weighted" else float("inf")
        self.size = size
        self.aspect = check_aspect("knn", aspect)
        self.train = train
        self.test = test

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        precision = _PRECISIONS[self.precision]
        bank, test = (
            encode(model, each, self.size, context, want="summary", aspect=self.aspect, precision=precision)
            for each in (self.train, self.test)
        )
        if bank.summary is None or test.summary is None:
            raise FeatureError(f"{type(model).__name__} returned neither a summary nor a spatial map")
        test_names = class_names(context.sources.open(self.test), test.index)
        names, labels, truth = number_classes(class_names(context.sources.open(self.train), bank.index), test_names)
        found = classify(
            bank.summary, labels, test.summary, len(names), self.k, self.temperature, device=device_of(model)
        )
        right = (found == truth).double()
        context.records.add_by_class("top1", test.names, test_names, right)
        return {"top1": float(right.mean())}


def classify(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    k: int,
    temperature: float,
    device: torch.device | str | None = None,
) -> Tensor:
    """The class ``(M,)`` that the k nearest of ``bank`` vote each query into, on the CPU.

    Args:
        bank: ``(N, D)``, any length of vector, any float type; read once, a shard at a time.
        labels: ``(N,)`` in 0 .. ``classes`` - 1.
        queries: ``(M, D)``.
        classes: how many classes there are.
        k: neighbours; at most N are used.
        temperature: of the votes; infinity makes each neighbour's the same.
        device: where to compute; where the bank lies if None.

    Raises:
        ConfigError: a label outside 0 .. ``classes`` - 1, or vectors of different width.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ConfigError(f"a neighbour has label {wrong}; {classes} classes are numbered 0 to {classes - 1}")
    if bank.shape[1] != queries.shape[1]:
        raise ConfigError(f"the bank's vectors have {bank.shape[1]} channels and the queries {queries.shape[1]}")
    cosine, where = neighbours(bank, queries, k, device)
    # Relative to the nearest, which changes no decision and cannot overflow.
    weights = ((cosine.double() - cosine[:, :1].double()) / temperature).exp()
    found = []
    for near, weight in zip(where.split(65536), weights.split(65536), strict=True):
        votes = torch.zeros(len(near), classes, dtype=torch.float64)
        found.append(votes.scatter_add_(1, labels[near], weight).argmax(1))
    return torch.cat(found)


def neighbours(
    bank: Tensor, queries: Tensor, k: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of ``bank`` with the greatest cosine, for each query.

    The bank passes once, in shards; beside one shard and one block of similarities nothing grows with N but the inputs.

    Args:
        bank: ``(N, D)``, any length of vector.
        queries: ``(M, D)``.
        k: how many; at most N.
        device: where to compute; where the bank lies if None.

    Returns:
        cosines ``(M, k)`` float32, falling, and rows ``(M, k)``; on the CPU.
    """
    device = torch.device(device or bank.device)
    k = min(k, len(bank))
    best = torch.full((len(queries), k), -torch.inf)
    where = torch.zeros(len(queries), k, dtype=torch.long)
    # Half precision stays half on a GPU: its products are exact there and summed in float32.
    half = device.type == "cuda" and bank.dtype in (torch.float16, torch.bfloat16) and bank.dtype == queries.dtype
    for start in range(0, len(bank), _BANK):
        shard, scale = _directions(bank[start : start + _BANK].to(device), half)
        for row in range(0, len(queries), _QUERIES):
            part, own = _directions(queries[row : row + _QUERIES].to(device), half)
            cosine = torch.mm(part, shard.T, out_dtype=torch.float32) if half else part @ shard.T
            if half:
                cosine = cosine.mul_(own[:, None]).mul_(scale)
            values, index = _largest(cosine, k)
            rows = slice(row, row + len(part))
            both = torch.cat((best[rows], values.cpu()), 1)
            best[rows], keep = torch.topk(both, k)
            where[rows] = torch.cat((where[rows], index.cpu() + start), 1).gather(1, keep)
    return best, where


def _directions(x: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """Rows of unit norm, float32; or the rows as they are with 1 / norm, which rounds nothing."""
    if not half:
        full = x.float()
        return F.normalize(full, dim=1, out=None if full is x else full), x.new_ones(())
    return x, torch.linalg.vector_norm(x.float(), dim=1).clamp_min(1e-12).reciprocal()


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` along rows. In long rows only the k groups with the greatest maxima can hold one of the k largest."""
    rows, width = scores.shape
    groups = width // _GROUP
    if groups < 4 * k or width % _GROUP:
        return torch.topk(scores, min(k, width))
    blocks = scores.view(rows, groups, _GROUP)
    chosen = torch.topk(blocks.amax(2), k).indices
    inner = blocks.gather(1, chosen[..., None].expand(-1, -1, _GROUP)).flatten(1)
    values, at = torch.topk(inner, k)
    return values, chosen.gather(1, at // _GROUP) * _GROUP + at % _GROUP
