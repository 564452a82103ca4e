"""Text-to-image retrieval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agglo.evals._features import encode, encode_texts
from agglo.evals.base import Backbone, Eval, EvalContext, FeatureError
from agglo.sources.base import Source
from agglo.types import ConfigError

HELD_OUT: dict[str, Any] = {"kind": "photos", "split": "heldout"}

_TEXTS = 1024


@dataclass(frozen=True, slots=True)
class Ranking:
    """All images ranked for one query.

    Args:
        query: the text.
        names: of the images, best first.
        scores: cosines with the query, descending.
        right: names of the relevant images.
    """

    query: str
    names: tuple[str, ...]
    scores: tuple[float, ...]
    right: frozenset[str]

    @property
    def rank(self) -> int:
        """Position of the first relevant image, from 1."""
        return 1 + next(i for i, name in enumerate(self.names) if name in self.right)


class Retrieval(Eval):
    """Text-to-image retrieval: each text ranks all images of the source by cosine (as in CLIP, arXiv:2103.00020).

    The texts are the source's queries (``photos``), else all captions of its images (five per image of COCO, those of
    ``scenes``). A text of several images (near duplicates) counts once, and all of them are relevant. Images without a
    text are distractors. Ties keep the source's order.

    Metrics: ``recall@1``, ``recall@5`` and ``recall@10``, the share of texts with a relevant image among the first k;
    ``mrr``, the mean of 1 / rank of the first relevant image. All in [0, 1].

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        template: of the text; ``{}`` is replaced by the query or caption.
        source: images with ``query(index) -> str | None``, with ``captions(index)``, or whose ``annotation(index)`` has
            ``captions`` or ``caption``.
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
            raise ConfigError(f"evals.retrieval: template {template!r} has no {{}} for the query")
        self.size = size
        self.template = template
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        found = self._encoded(model, context)
        ranks = torch.cat([
            first_right(found.scores(rows), found.right[rows.start : rows.stop]) for rows in found.blocks()
        ]).double()  # fmt: skip
        context.records.add_images("mrr", found.queries, 1 / ranks)
        recalls = {f"recall@{k}": float((ranks <= k).double().mean()) for k in (1, 5, 10)}
        return {**recalls, "mrr": float((1 / ranks).mean())}

    def rank(self, model: Backbone, context: EvalContext | None = None) -> list[Ranking]:
        """Rank all images for every text.

        Raises:
            TypeError: the model has no text tower.
            ConfigError: the source has neither queries nor captions.
        """
        found = self._encoded(model, context or EvalContext())
        rankings = []
        for rows in found.blocks():
            values, order = found.scores(rows).sort(dim=1, descending=True, stable=True)
            for i, scores, columns in zip(rows, values.tolist(), order.tolist(), strict=True):
                names = tuple(found.names[j] for j in columns)
                right = frozenset(found.names[j] for j in found.right[i])
                rankings.append(Ranking(found.queries[i], names, tuple(scores), right))
        return rankings

    def _encoded(self, model: Backbone, context: EvalContext) -> _Search:
        source = context.sources.open(self.source)
        texts = _texts(source)
        encode_texts(model, [self.template], "retrieval")  # raises before images are encoded
        images = encode(model, self.source, self.size, context, want="text")
        right: dict[str, list[int]] = {}
        for row, index in enumerate(images.index):
            for text in dict.fromkeys(texts(index)):
                right.setdefault(text, []).append(row)
        if not right:
            raise ConfigError(f"no image of this {type(source).__name__} has a query or a caption")
        bank = encode_texts(model, [self.template.replace("{}", text) for text in right], "retrieval")
        if images.summary is None or images.summary.shape[1] != bank.shape[1]:
            raise FeatureError(f"{type(model).__name__} embeds texts and images in different widths")
        return _Search(images.names, images.summary, tuple(right), bank, tuple(right.values()))


@dataclass(frozen=True, slots=True)
class _Search:
    """Unit-norm embeddings of N images and M texts, and the indices of the relevant images of each text, ascending."""

    names: tuple[str, ...]
    images: Tensor
    queries: tuple[str, ...]
    texts: Tensor
    right: tuple[list[int], ...]

    def blocks(self) -> list[range]:
        """Ranges of texts, to bound the memory of their scores."""
        count = len(self.queries)
        return [range(start, min(start + _TEXTS, count)) for start in range(0, count, _TEXTS)]

    def scores(self, rows: range) -> Tensor:
        """Cosines ``(len(rows), N)`` of a range of texts with all images."""
        return self.texts[rows.start : rows.stop] @ self.images.T


def first_right(scores: Tensor, right: Sequence[Sequence[int]]) -> Tensor:
    """Rank ``(M,)``, from 1, of the first relevant image by descending scores ``(M, N)``; ties keep their order."""
    ranks = []
    for row, own in zip(scores, right, strict=True):
        index = torch.tensor(own)
        best = row[index].max()
        first = int(index[row[index] == best][0])
        ranks.append(1 + int((row > best).sum()) + int((row[:first] == best).sum()))
    return torch.tensor(ranks)


def _texts(source: Source) -> Callable[[int], tuple[str, ...]]:
    """The query or the captions of an image; empty if it has none.

    Raises:
        ConfigError: the source has neither.
    """
    query: Callable[[int], str | None] | None = getattr(source, "query", None)
    captions: Callable[[int], Sequence[str]] | None = getattr(source, "captions", None)
    annotation: Callable[[int], Any] | None = getattr(source, "annotation", None)

    def annotated(index: int) -> tuple[str, ...]:
        known = None if annotation is None else annotation(index)
        one = getattr(known, "caption", None)
        return tuple(getattr(known, "captions", None) or ([one] if one else ()))

    if query is not None:
        return lambda index: (text,) if (text := query(index)) else ()
    if captions is not None:
        return lambda index: tuple(captions(index))
    if annotation is None:
        raise ConfigError(
            f"{type(source).__name__} has no queries or captions: use a source such as "
            "{kind: photos, split: heldout}, {kind: coco} or {kind: scenes}"
        )
    return annotated
