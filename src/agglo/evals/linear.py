"""Classification by a linear probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.evals._features import encode, summary_of
from agglo.evals._labels import class_names, number_classes
from agglo.evals._probe import Standard, best_logistic, rank_of
from agglo.evals.base import SCENES_TEST, SCENES_TRAIN, SCENES_VAL, Backbone, Eval, EvalContext
from agglo.types import ConfigError


class Linear(Eval):
    """Linear classification: multinomial logistic regression on frozen summaries, as in CLIP (arXiv:2103.00020).

    - features are standardised per channel by the mean and standard deviation of ``train``;
    - minimised over ``W (K, D)``, ``b (K)`` by full-batch L-BFGS from zero:
      ``mean_i CE(y_i, W x_i + b) + decay / 2 ||W||^2``; no bias decay, no augmentation, no seed;
    - ``decay`` maximises the top-1 accuracy on ``val``; ties: the stronger.

    For a model without a summary the mean-pooled spatial map is used. An image whose class has no image in ``train``
    counts as wrong, and a warning names the class.

    Metrics: ``top1`` and ``top5``, the share of images whose class is among the k highest logits, in [0, 1].

    Args:
        decay: candidate L2 penalties.
        steps: maximum number of L-BFGS iterations per penalty.
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        train: a labelled source, for fitting.
        val: the same; chooses the penalty.
        test: the same; measured.
    """

    def __init__(
        self,
        *,
        decay: list[float] | tuple[float, ...] = (1.0, 0.1, 0.01, 0.001, 0.0001),
        steps: int = 100,
        size: int | tuple[int, int] = 128,
        train: Mapping[str, Any] = SCENES_TRAIN,
        val: Mapping[str, Any] = SCENES_VAL,
        test: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if not decay or min(decay) < 0:
            raise ConfigError(f"evals.linear: decay must be a list of non-negative numbers; got {list(decay)}")
        if steps < 1:
            raise ConfigError(f"evals.linear: steps must be at least 1, got {steps}")
        self.decay = tuple(sorted(decay, reverse=True))
        self.steps = steps
        self.size = size
        self.train = train
        self.val = val
        self.test = test

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        splits = (self.train, self.val, self.test)
        train, val, test = (encode(model, one, self.size, context, want="summary") for one in splits)
        train_names, val_names, test_names = (
            class_names(context.sources.open(one), found.index)
            for one, found in zip(splits, (train, val, test), strict=True)
        )
        names, labels, truth = number_classes(train_names, test_names)
        number = {name: i for i, name in enumerate(names)}
        chooser = torch.tensor([number.get(name, -1) for name in val_names])
        standard = Standard.of(summary_of(model, train)[..., None, None])
        x, x_val, x_test = (standard(summary_of(model, one)[..., None, None])[..., 0, 0] for one in (train, val, test))
        y = F.one_hot(labels, len(names)).float()
        probe = best_logistic(
            x,
            y,
            self.decay,
            self.steps,
            lambda one: float((_logits(x_val, one).argmax(1) == chooser).double().mean()),
            "linear",
            context.report,
        )
        rank = rank_of(_logits(x_test, probe), truth)
        context.records.add_by_class("top1", test.names, test_names, (rank < 1).double())
        return {f"top{k}": float((rank < k).double().mean()) for k in (1, 5)}


def _logits(x: Tensor, probe: tuple[Tensor, Tensor]) -> Tensor:
    return x @ probe[0].T + probe[1]
