"""Text search: does a plain query, or a caption, find its picture?"""

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

    The texts are the source's queries (``photos``), else all captions of its images (the five of each of COCO's, those
    of ``scenes``). Images that share a text (near duplicates) are all right answers to it, and the text counts once.
    Images without a text only compete. Equal scores keep the source's order.

    Metrics: ``recall@1``, ``recall@5`` and ``recall@10``, the share of texts with a right image among the first;
    ``mrr``, the mean of 1 / rank of the first right one. All in [0, 1].

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        template: what is asked; ``{}`` stands for the query or caption.
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
            raise ConfigError(f"evals.retrieval: template {template!r} has no {{}} where the query goes")
        self.size = size
        self.template = template
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        found = self._encoded(model, context)
        ranks = torch.cat([
            first_right(found.scores(rows), found.right[rows.start : rows.stop]) for rows in found.blocks()
        ]).double()  # fmt: skip
        context.records.add_images("mrr", found.asked, 1 / ranks)
        recalls = {f"recall@{k}": float((ranks <= k).double().mean()) for k in (1, 5, 10)}
        return {**recalls, "mrr": float((1 / ranks).mean())}

    def rank(self, model: Backbone, context: EvalContext | None = None) -> list[Ranking]:
        """Every text's ranking of all images, for reports of few.

        Raises:
            TypeError: the model has no text tower.
            ConfigError: the source has neither queries nor captions.
        """
        found = self._encoded(model, context or EvalContext())
        answers = []
        for rows in found.blocks():
            values, order = found.scores(rows).sort(dim=1, descending=True, stable=True)
            for i, scores, places in zip(rows, values.tolist(), order.tolist(), strict=True):
                names = tuple(found.names[j] for j in places)
                right = frozenset(found.names[j] for j in found.right[i])
                answers.append(Ranking(found.asked[i], names, tuple(scores), right))
        return answers

    def _encoded(self, model: Backbone, context: EvalContext) -> _Search:
        source = context.sources.open(self.source)
        texts = _texts(source)
        encode_texts(model, [self.template], "retrieval")  # a model without text says so before images are encoded
        images = encode(model, self.source, self.size, context, want="text")
        right: dict[str, list[int]] = {}
        for place, index in enumerate(images.index):
            for text in dict.fromkeys(texts(index)):
                right.setdefault(text, []).append(place)
        if not right:
            raise ConfigError(f"no image of this {type(source).__name__} has a query or a caption")
        bank = encode_texts(model, [self.template.replace("{}", text) for text in right], "retrieval")
        if images.summary is None or images.summary.shape[1] != bank.shape[1]:
            raise FeatureError(f"{type(model).__name__} puts texts and images into spaces of different width")
        return _Search(images.names, images.summary, tuple(right), bank, tuple(right.values()))


@dataclass(frozen=True, slots=True)
class _Search:
    """Texts and images in one space.

    Args:
        names: of the N images.
        images: ``(N, D)``, unit norm.
        asked: the M texts.
        texts: ``(M, D)``, unit norm.
        right: the images that each text means, as positions, rising.
    """

    names: tuple[str, ...]
    images: Tensor
    asked: tuple[str, ...]
    texts: Tensor
    right: tuple[list[int], ...]

    def blocks(self) -> list[range]:
        """The texts, some at a time: their scores with all images are never held at once."""
        count = len(self.asked)
        return [range(start, min(start + _TEXTS, count)) for start in range(0, count, _TEXTS)]

    def scores(self, rows: range) -> Tensor:
        """Cosines ``(len(rows), N)`` of some texts with all images."""
        return self.texts[rows.start : rows.stop] @ self.images.T


def first_right(scores: Tensor, right: Sequence[Sequence[int]]) -> Tensor:
    """The place ``(M,)``, from 1, of the first right image when each row of ``(M, N)`` is sorted, falling.

    Equal scores keep their order.
    """
    places = []
    for row, own in zip(scores, right, strict=True):
        index = torch.tensor(own)
        best = row[index].max()
        first = int(index[row[index] == best][0])
        places.append(1 + int((row > best).sum()) + int((row[:first] == best).sum()))
    return torch.tensor(places)


def _texts(source: Source) -> Callable[[int], tuple[str, ...]]:
    """What is asked for an image: its query, or its captions; empty where it has none.

    Raises:
        ConfigError: the source knows neither.
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
