"""What is left of classification when pictures are corrupted?"""

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
from agglo.evals._features import encode
from agglo.evals._labels import class_names, number_classes
from agglo.evals._windows import Changed
from agglo.evals.base import SCENES_TEST, SCENES_TRAIN, Backbone, Eval, EvalContext, FeatureError, device_of, input_size
from agglo.evals.knn import classify
from agglo.preprocess import crop
from agglo.types import ConfigError


class Robustness(Eval):
    """Classification by nearest neighbours and drift of the summary under common corruptions.

    The bank is clean; the queries are corrupted after they are brought to the size that the model sees, so that a
    corruption is as strong for every model and picture. Corruptions and strengths follow ImageNet-C (Hendrycks and
    Dietterich 2019); they are made here, so numbers compare with each other only.

    - ``top1``: of clean queries, as ``knn`` measures it;
    - ``top1_corrupted``: the mean over corruptions and severities; ``kept``, that over ``top1`` (0 where ``top1`` is);
    - ``cosine``: of a corrupted picture's summary with its clean one, both less the mean clean summary;
    - ``top1/<corruption>`` and ``cosine/<corruption>``: the means over severities.

    Args:
        corruptions: names; all when None.
        severities: 1 (weak) to 5.
        k: neighbours that vote, by ``exp(cos / temperature)``.
        temperature: of the votes.
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
            hint = "" if wrong is None else nearest(wrong, CORRUPTIONS)
            raise ConfigError(
                f"evals.robustness: corruptions holds {'nothing' if wrong is None else repr(wrong)}{hint}; there are "
                + ", ".join(CORRUPTIONS)
            )
        if not severities or not set(severities) <= {1, 2, 3, 4, 5}:
            raise ConfigError(f"evals.robustness: severities are 1 to 5, got {list(severities)}")
        if k < 1 or not temperature > 0:
            raise ConfigError(f"evals.robustness: k is at least 1 and temperature positive, got {k} and {temperature}")
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
        if bank.summary is None or clean.summary is None:
            raise FeatureError(f"{type(model).__name__} returned neither a summary nor a spatial map")
        source, labels = context.sources.open(self.test), class_names(context.sources.open(self.test), clean.index)
        names, known, truth = number_classes(class_names(context.sources.open(self.train), bank.index), labels)
        stored, mean, device = bank.summary, clean.summary.mean(0), device_of(model)

        def right(summary: Tensor) -> Tensor:
            found = classify(stored, known, summary, len(names), self.k, self.temperature, device=device)
            return (found == truth).double()

        top1 = float(right(clean.summary).mean())
        corrupted: dict[str, float] = {}
        own = torch.zeros(len(labels), dtype=torch.float64)
        for name in self.corruptions:
            hits, cosines = [], []
            for severity in self.severities:
                context.report(f"{name} {severity}")
                changed = Changed(source, self._change(model, name, severity), f"{name}{severity}", list(clean.index))
                found = encode(model, changed, self.size, context, want="summary", share=False).summary
                if found is None or len(found) != len(clean.summary):
                    raise FeatureError(f"{type(model).__name__} returned no summary of {name} pictures")
                hits.append(right(found))
                cosines.append(F.cosine_similarity((found - mean).double(), (clean.summary - mean).double(), dim=1))
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
        """Show the picture as the model would see it, corrupted."""
        size = input_size(model, self.size)

        def change(image: Image.Image, index: int) -> Image.Image:
            draw = np.random.default_rng([self.seed, index, severity, zlib.crc32(name.encode())])
            return corrupt(crop(image, size), name, severity, draw)

        return change
