"""The contract of an eval, the context that it runs in, and the errors it raises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from agglo.evals._cache import FeatureCache, SourcePool
from agglo.evals._cache import FeatureStore as FeatureStore
from agglo.model.model import Model
from agglo.preprocess import nearest_size
from agglo.teachers.base import Teacher
from agglo.types import AggloError, ConfigError, Features, FeatureSpec

SCENES_TRAIN: dict[str, Any] = {"kind": "scenes", "split": "train"}
SCENES_VAL: dict[str, Any] = {"kind": "scenes", "split": "val"}
SCENES_TEST: dict[str, Any] = {"kind": "scenes", "split": "test"}

Progress = Callable[[str], None]
"""Called with a progress message during long work."""

Place = Literal["data", "answers", "weights", "output"]
"""Role of a file or folder in the eval whose key names it.

- ``data``: ground truth (a benchmark's own file); its content is part of the data's hash.
- ``answers``: another program's output for the model; its content is part of a measurement's identity, and the answers
  of two models are comparable.
- ``weights``: a fixed part of the eval, by hub name or path; the content of a path is part of the protocol.
- ``output``: written to; an eval that writes is never skipped.
"""


class Inapplicable(AggloError, TypeError):
    """The model lacks what the eval needs (a text tower, a summary, a spatial map). A suite skips the eval."""


class FeatureError(AggloError, ValueError):
    """A model returned features that cannot be measured (NaN, infinity, a wrong shape); names the image."""


class ProbeError(AggloError, RuntimeError):
    """A probe diverged or had no training data: no metric is reported for it."""


class Backbone(Protocol):
    """What an eval measures: a Model, a Teacher, any module that encodes images."""

    spec: FeatureSpec

    def __call__(self, images: Tensor) -> Features:
        """RGB ``(B, 3, H, W)`` in [0, 1] to features."""
        ...


@dataclass(slots=True)
class Records:
    """Values of single images and classes behind an eval's metrics.

    Paired comparison of two models, bootstrap intervals and lists of failures are made from them.

    Args:
        images: metric → image (or ``first -> second`` for a pair of images) → value. The mean over the images is the
            eval's metric of that name where the metric is a mean (``top1``); a ratio of sums (``miou``) is not.
        classes: metric → class → value, for the classes that occur.
    """

    images: dict[str, dict[str, float]] = field(default_factory=dict)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)

    def add_images(self, metric: str, names: Sequence[str], values: Tensor | Sequence[float]) -> None:
        """Record one value per image."""
        self.images.setdefault(metric, {}).update(zip(names, _numbers(values), strict=True))

    def add_classes(self, metric: str, names: Sequence[str], values: Tensor | Sequence[float]) -> None:
        """Record one value per class."""
        self.classes.setdefault(metric, {}).update(zip(names, _numbers(values), strict=True))

    def add_by_class(self, metric: str, names: Sequence[str], labels: Sequence[str], values: Tensor) -> None:
        """Record one value per image, and per class the mean over its images."""
        self.add_images(metric, names, values)
        groups: dict[str, list[float]] = {}
        for label, value in zip(labels, _numbers(values), strict=True):
            groups.setdefault(label, []).append(value)
        classes = sorted(groups)
        self.add_classes(metric, classes, [sum(groups[name]) / len(groups[name]) for name in classes])


def _numbers(values: Tensor | Sequence[float]) -> list[float]:
    return values.double().tolist() if isinstance(values, Tensor) else [float(value) for value in values]


@dataclass(slots=True)
class EvalContext:
    """What an eval reads from and writes to beside the model. The evals of a suite share ``sources`` and ``features``.

    Args:
        progress: called with short phrases as the eval moves on.
        records: filled with the values of single images and classes.
        sources: opened sources, read ahead.
        features: encoded image sets, so that each is encoded once per model and size.
    """

    progress: Progress | None = None
    records: Records = field(default_factory=Records)
    sources: SourcePool = field(default_factory=SourcePool)
    features: FeatureCache = field(default_factory=FeatureCache)

    def report(self, phrase: str) -> None:
        """Pass a phrase to ``progress``, if there is one."""
        if self.progress is not None:
            self.progress(phrase)


class Eval(ABC):
    """One benchmark. The keyword-only constructor arguments are its protocol.

    Attributes:
        needs_text: only models with ``encode_text`` and ``encode_image`` can be measured.
        lower_is_better: names of the metrics that are better when lower; all others are better when higher.
        deterministic: the same call returns the same numbers; False for evals that measure time.
        needs_heads: heads other than the text-aligned ones are read, so all must be loaded.
        bundled: runs with its defaults; False for evals of files that do not come with agglo.
        revision: incremented when the arithmetic changes; results of different revisions are not comparable.
        places: the keys that name files or folders (one, or a list), and what those are to the eval. A path is never
            part of the protocol.
    """

    needs_text: bool = False
    needs_heads: bool = False
    lower_is_better: frozenset[str] = frozenset()
    deterministic: bool = True
    bundled: bool = True
    revision: int = 1
    places: ClassVar[Mapping[str, Place]] = {}

    def run(self, model: Backbone, context: EvalContext | None = None) -> dict[str, float]:
        """Measure ``model``.

        Args:
            model: any backbone.
            context: shared with other evals, or to receive progress and records; None creates one for this call.

        Returns:
            Metrics by name.

        Raises:
            TypeError: the model lacks what this eval needs (a text tower, a summary, a spatial map).
            FeatureError: the model returned NaN or infinity.
            ProbeError: a probe diverged or there is nothing to measure on.
        """
        return self.measure(model, context or EvalContext())

    @abstractmethod
    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        """Implement :meth:`run`; deterministic unless the class declares otherwise."""

    def members(self, key: str) -> Sequence[str] | None:
        """Names, relative to the data folder ``key``, of the files that are read; None for all of them."""
        return None


# --- models -----------------------------------------------------------------------------------------------------------


@contextmanager
def frozen(*models: object) -> Iterator[None]:
    """Inference mode with every module in eval mode; each module's own mode is restored afterwards."""
    modes = [(m, m.training) for model in models if isinstance(model, nn.Module) for m in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: object) -> torch.device:
    """The device of the model's parameters, or of its buffers; the CPU if it has neither."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def step_of(model: Backbone) -> int:
    """Input sides of a model are multiples of this many pixels: a patch, or a whole window of patches."""
    return model.step() if isinstance(model, Model) else max(1, model.spec.step)


def input_size(model: Backbone, size: int | Sequence[int]) -> tuple[int, int]:
    """``(H, W)`` of the model's input for a view of ``size``: what a teacher requires, else the nearest legal size.

    Raises:
        ConfigError: ``size`` is neither a side nor a pair of sides.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ConfigError(f"size must be one number of pixels or a pair (height, width), at least 1; got {size}")
    if isinstance(model, Teacher):
        return model.input_size((pair[0], pair[1]), model.spec.stride)
    return nearest_size((pair[0], pair[1]), step_of(model))


def view_of_all(model: Backbone, size: int | tuple[int, int], aspect: str | None) -> tuple[int, int] | None:
    """``(H, W)`` of the model's input for all images of an eval with these keys; None if it varies."""
    one = input_size(model, size)
    return None if aspect == "keep" and getattr(model, "canvas", None) is None else one
