"""k nearest neighbours on summaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import check_aspect, encode, summary_of
from agglo.evals._labels import class_names, number_classes
from agglo.evals.base import SCENES_TEST, SCENES_TRAIN, Backbone, Eval, EvalContext, device_of
from agglo.types import ConfigError

_QUERIES = 2048
_BANK = 32768
_GROUP = 32
_PRECISIONS = {"float32": torch.float32, "float16": torch.float16}


class Knn(Eval):
    """Weighted k-nearest-neighbour classification of summaries (Wu et al. 2018, arXiv:1805.01978), RADIO's protocol.

    The bank holds the summaries of ``train``; similarity is the cosine. For each image of ``test``, its k nearest
    neighbours vote for their class with weight ``exp(cos / temperature)``; ties go to the class whose name sorts first.
    Nothing is fitted. For a model without a summary (HOG, SAM) the mean-pooled spatial map is used. An image whose
    class has no image in ``train`` counts as wrong, and a warning names the class.

    ``scenes`` is split by object, so no neighbour shows the same object. It has ten training images per class: at
    k = 20 at least half the neighbours are of other classes, and the weights decide.

    Metrics: ``top1``, the share of images whose class wins the vote, in [0, 1].

    Args:
        k: number of neighbours; at most the size of the bank.
        temperature: of the vote weights; smaller values favour the nearest neighbours.
        vote: ``weighted``; or ``majority``, one vote per neighbour (EUPE's protocol, with k = 10).
        precision: of the stored summaries: ``float32``, or ``float16`` for half the memory. Products are accumulated in
            float32 either way.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        aspect: ``crop``: the centre of each image at the aspect of ``size``; ``keep``: the whole image, scaled to cover
            ``size``, as RADIO does. A teacher with a fixed input size gets crops either way, with a warning.
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
            raise ConfigError(f"evals.knn: k must be at least 1, got {k}")
        if not temperature > 0:
            raise ConfigError(f"evals.knn: temperature must be positive, got {temperature}; RADIO uses 0.07")
        if vote not in ("weighted", "majority"):
            raise ConfigError(f"evals.knn: vote must be weighted or majority, not {vote!r}")
        if precision not in _PRECISIONS:
            raise ConfigError(f"evals.knn: precision must be float32 or float16, not {precision!r}")
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
        stored, queries = summary_of(model, bank), summary_of(model, test)
        test_names = class_names(context.sources.open(self.test), test.index)
        names, labels, truth = number_classes(class_names(context.sources.open(self.train), bank.index), test_names)
        found = classify(stored, labels, queries, len(names), self.k, self.temperature, device=device_of(model))
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
    """Class ``(M,)`` of each query by vote of its k nearest rows of ``bank``, on the CPU.

    Args:
        bank: ``(N, D)``, not necessarily normalised, any float type; read once, in shards.
        labels: ``(N,)`` in 0 .. ``classes`` - 1.
        queries: ``(M, D)``.
        classes: number of classes.
        k: number of neighbours; clamped to N.
        temperature: of the vote weights; infinity for equal votes.
        device: for the computation; the bank's device when None.

    Raises:
        ConfigError: a label outside 0 .. ``classes`` - 1, or different widths.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ConfigError(f"label {wrong} in the bank is outside 0 to {classes - 1}")
    if bank.shape[1] != queries.shape[1]:
        raise ConfigError(f"the bank's vectors have {bank.shape[1]} channels and the queries {queries.shape[1]}")
    cosine, where = neighbours(bank, queries, k, device)
    # Relative to the nearest neighbour: the same vote, and no overflow.
    weights = ((cosine.double() - cosine[:, :1].double()) / temperature).exp()
    found = []
    for near, weight in zip(where.split(65536), weights.split(65536), strict=True):
        votes = torch.zeros(len(near), classes, dtype=torch.float64)
        found.append(votes.scatter_add_(1, labels[near], weight).argmax(1))
    return torch.cat(found)


def neighbours(
    bank: Tensor, queries: Tensor, k: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of ``bank`` with the greatest cosine to each query.

    The bank is read once, in shards; memory beyond the inputs does not depend on N.

    Args:
        bank: ``(N, D)``, not necessarily normalised.
        queries: ``(M, D)``.
        k: number of neighbours; clamped to N.
        device: for the computation; the bank's device when None.

    Returns:
        cosines ``(M, k)`` float32, descending, and rows ``(M, k)``; on the CPU.
    """
    device = torch.device(device or bank.device)
    k = min(k, len(bank))
    best = torch.full((len(queries), k), -torch.inf)
    where = torch.zeros(len(queries), k, dtype=torch.long)
    # Half precision is kept on a GPU: products are exact there and accumulated in float32.
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
    """Float32 rows of unit norm; or, for half precision, the unrounded rows and 1 / norm."""
    if not half:
        full = x.float()
        return F.normalize(full, dim=1, out=None if full is x else full), x.new_ones(())
    return x, torch.linalg.vector_norm(x.float(), dim=1).clamp_min(1e-12).reciprocal()


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` along rows. In long rows only the k groups with the greatest maxima can contain the k largest."""
    rows, width = scores.shape
    groups = width // _GROUP
    if groups < 4 * k or width % _GROUP:
        return torch.topk(scores, min(k, width))
    blocks = scores.view(rows, groups, _GROUP)
    chosen = torch.topk(blocks.amax(2), k).indices
    inner = blocks.gather(1, chosen[..., None].expand(-1, -1, _GROUP)).flatten(1)
    values, at = torch.topk(inner, k)
    return values, chosen.gather(1, at // _GROUP) * _GROUP + at % _GROUP
