"""Text search: does a plain query find its picture?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agglo.evals._features import FeatureError, encode, encode_texts, open_source
from agglo.evals._records import record_images
from agglo.evals.base import Backbone, Eval, Progress
from agglo.types import ConfigError

HELD_OUT: dict[str, Any] = {"kind": "photos", "split": "heldout"}


@dataclass(frozen=True, slots=True)
class Ranking:
    """One query's answer.

    Args:
        query: the text.
        names: the images, best first.
        scores: their cosines with the query, falling.
        right: the images that the query means.
    """

    query: str
    names: tuple[str, ...]
    scores: tuple[float, ...]
    right: frozenset[str]

    @property
    def rank(self) -> int:
        """Position of the first right image, from 1."""
        return 1 + next(i for i, name in enumerate(self.names) if name in self.right)


class Retrieval(Eval):
    """Text-to-image search: each query ranks all images of the source by cosine (as in CLIP, Radford et al. 2021).

    Images that share a query (near duplicates) are all right answers to it, and the query counts once. Images without
    a query only compete. Equal scores keep the source's order.

    Metrics: ``recall@1`` and ``recall@5``, the share of queries with a right image among the first; ``mrr``, the mean
    of 1 / rank of the first right one. All in [0, 1].

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        template: what is asked; ``{}`` stands for the query.
        source: images with ``query(index) -> str | None``.
    """

    needs_text = True

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 224,
        template: str = "{}",
        source: Mapping[str, Any] = HELD_OUT,
    ) -> None:
        if "{}" not in template:
            raise ConfigError(f"evals.retrieval: template {template!r} has no {{}} where the query goes")
        self.size = size
        self.template = template
        self.source = source

    def run(self, model: Backbone, progress: Progress | None = None) -> dict[str, float]:
        answers = self.rank(model, progress)
        ranks = torch.tensor([answer.rank for answer in answers], dtype=torch.float64)
        record_images("mrr", [answer.query for answer in answers], 1 / ranks)
        return {
            "recall@1": float((ranks <= 1).double().mean()),
            "recall@5": float((ranks <= 5).double().mean()),
            "mrr": float((1 / ranks).mean()),
        }

    def rank(self, model: Backbone, progress: Progress | None = None) -> list[Ranking]:
        """Every query's ranking, for reports.

        Raises:
            TypeError: the model has no text tower.
            ConfigError: the source has no queries.
        """
        source = open_source(self.source)
        query: Callable[[int], str | None] | None = getattr(source, "query", None)
        if query is None:
            raise ConfigError(
                f"{type(source).__name__} has no queries: use a source such as {{kind: photos, split: heldout}}"
            )
        encode_texts(model, [self.template], "retrieval")  # a model without text says so before images are encoded
        images = encode(model, self.source, self.size, want="text", progress=progress)
        right: dict[str, set[str]] = {}
        for name, index in zip(images.names, images.index, strict=True):
            text = query(index)
            if text:
                right.setdefault(text, set()).add(name)
        if not right:
            raise ConfigError(f"no image of this {type(source).__name__} has a query")
        texts = encode_texts(model, [self.template.replace("{}", text) for text in right], "retrieval")
        if images.summary is None or images.summary.shape[1] != texts.shape[1]:
            raise FeatureError(f"{type(model).__name__} puts texts and images into spaces of different width")
        scores: Tensor = texts @ images.summary.T
        values, order = scores.sort(dim=1, descending=True, stable=True)
        return [
            Ranking(
                text, tuple(images.names[j] for j in order[i].tolist()), tuple(values[i].tolist()), frozenset(found)
            )
            for i, (text, found) in enumerate(right.items())
        ]
