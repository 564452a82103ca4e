"""Robustness of classification to common corruptions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from agglo.config import nearest
from agglo.evals._corrupt import CORRUPTIONS, corrupt
from agglo.evals._features import encode, summary_of
from agglo.evals._labels import class_names, number_classes
from agglo.evals._windows import Changed
from agglo.evals.base import SCENES_TEST, SCENES_TRAIN, Backbone, Eval, EvalContext, FeatureError, device_of, input_size
from agglo.evals.knn import classify
from agglo.preprocess import crop
from agglo.types import ConfigError


class Robustness(Eval):
    """kNN accuracy and drift of the summary under common corruptions.

    The bank is clean; queries are corrupted after they are resized to the model's input, so that a corruption is
    equally strong for every model and image. Corruptions and severities follow ImageNet-C (Hendrycks and Dietterich
    2019, arXiv:1903.12261) but are implemented here: numbers are not comparable with those on the ImageNet-C files.

    - ``top1``: of clean queries, as ``knn`` measures it;
    - ``top1_corrupted``: the mean over corruptions and severities; ``kept``: ``top1_corrupted / top1`` (0 if ``top1``
      is 0);
    - ``cosine``: between the summaries of a corrupted and its clean image, both minus the mean clean summary;
    - ``top1/<corruption>`` and ``cosine/<corruption>``: the means over severities.

    Args:
        corruptions: names; all when None.
        severities: 1 (weak) to 5.
        k: number of neighbours, with vote weights ``exp(cos / temperature)``.
        temperature: of the vote weights.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        seed: of the noise.
        train: a labelled source, for the bank.
        test: a labelled source, for the queries.
    """

    def __init__(
        self,
        *,
        corruptions: list[str] | tuple[str, ...] | None = None,
        severities: list[int] | tuple[int, ...] = (1, 3, 5),
        k: int = 20,
        temperature: float = 0.07,
        size: int | tuple[int, int] = 128,
        seed: int = 0,
        train: Mapping[str, Any] = SCENES_TRAIN,
        test: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        chosen = tuple(CORRUPTIONS) if corruptions is None else tuple(corruptions)
        wrong = next((name for name in chosen if name not in CORRUPTIONS), None)
        if wrong is not None or not chosen:
            problem = "is empty" if wrong is None else f"contains {wrong!r}{nearest(wrong, CORRUPTIONS)}"
            raise ConfigError(f"evals.robustness: corruptions {problem}; choose from {', '.join(CORRUPTIONS)}")
        if not severities or not set(severities) <= {1, 2, 3, 4, 5}:
            raise ConfigError(f"evals.robustness: severities must be 1 to 5, got {list(severities)}")
        if k < 1 or not temperature > 0:
            raise ConfigError(
                f"evals.robustness: k must be at least 1, temperature positive; got {k} and {temperature}"
            )
        self.corruptions = chosen
        self.severities = tuple(severities)
        self.k = k
        self.temperature = temperature
        self.size = size
        self.seed = seed
        self.train = train
        self.test = test

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        bank = encode(model, self.train, self.size, context, want="summary")
        clean = encode(model, self.test, self.size, context, want="summary")
        stored, reference = summary_of(model, bank), summary_of(model, clean)
        source, labels = context.sources.open(self.test), class_names(context.sources.open(self.test), clean.index)
        names, known, truth = number_classes(class_names(context.sources.open(self.train), bank.index), labels)
        mean, device = reference.mean(0), device_of(model)

        def right(summary: Tensor) -> Tensor:
            found = classify(stored, known, summary, len(names), self.k, self.temperature, device=device)
            return (found == truth).double()

        top1 = float(right(reference).mean())
        corrupted: dict[str, float] = {}
        own = torch.zeros(len(labels), dtype=torch.float64)
        for name in self.corruptions:
            hits, cosines = [], []
            for severity in self.severities:
                context.report(f"{name} {severity}")
                change, read = self._change(model, name, severity), context.sources.reader(source)
                changed = Changed(source, change, f"{name}{severity}", list(clean.index), read)
                found = encode(model, changed, self.size, context, want="summary", share=False).summary
                if found is None or len(found) != len(reference):
                    raise FeatureError(f"{type(model).__name__} returned no summary of {name} images")
                hits.append(right(found))
                cosines.append(F.cosine_similarity((found - mean).double(), (reference - mean).double(), dim=1))
            corrupted[f"top1/{name}"] = float(torch.stack(hits).mean())
            corrupted[f"cosine/{name}"] = float(torch.stack(cosines).mean())
            own += torch.stack(hits).mean(0)
        count = len(self.corruptions)
        context.records.add_by_class("top1_corrupted", clean.names, labels, own / count)
        both = {
            kind: sum(corrupted[f"{kind}/{name}"] for name in self.corruptions) / count for kind in ("top1", "cosine")
        }
        return {
            "top1": top1,
            "top1_corrupted": both["top1"],
            "kept": both["top1"] / top1 if top1 else 0.0,
            "cosine": both["cosine"],
            **corrupted,
        }

    def _change(self, model: Backbone, name: str, severity: int) -> Callable[[Image.Image, int], Image.Image]:
        """Crop an image to the model's input, then corrupt it."""
        size = input_size(model, self.size)

        def change(image: Image.Image, index: int) -> Image.Image:
            draw = np.random.default_rng([self.seed, index, severity, zlib.crc32(name.encode())])
            return corrupt(crop(image, size), name, severity, draw)

        return change
