"""Consistency of features across resolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from agglo.config import nearest
from agglo.evals._features import check, need_spatial, read_batches
from agglo.evals.base import SCENES_TEST, Backbone, Eval, EvalContext, FeatureError, device_of, frozen, input_size
from agglo.preprocess import fit
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features

SELF = "self"

_LEAST = 1e-12
"""Errors are at least this share of the target's variance, so that the fidelity of a perfect copy is finite."""


class ModeSwitch(Eval):
    """Agreement and fidelity against resolution: the "mode switch" of RADIOv2.5 (arXiv:2412.07679).

    A multi-teacher student trained at few resolutions may follow one teacher at some of them and another at others. At
    each of ``sizes`` the student's head is compared with its teacher at the size that the teacher requires (a fixed
    canvas stays fixed). With ``T`` the teacher's map, ``T'`` the same resized bilinearly (``align_corners=True``) to
    the grid of the head's map ``S``, over all images and cells:

    - ``<teacher>/cosine@R``: the mean of ``cos(S, T')``, one minus RADIO's ``cos_error``;
    - ``<teacher>/fidelity@R``: ``var(T) / mean (S - T')^2``; 1 for the best constant, clamped to 1e12;
    - ``<teacher>/summary_cosine@R``, if both have a summary.

    Per teacher also ``fidelity``, the mean over sizes, and ``steadiness``, the minimum fidelity over the maximum: 1 if
    resolution does not matter.

    Without teachers, or for a model without heads (a teacher, for example), the model is compared with itself:
    ``self/...`` compares each size with the features at ``reference``. ``R`` is the size in the settings; the input has
    the nearest legal size.

    Args:
        teachers: by the names of the student's heads.
        sizes: sides in pixels; RADIO uses all multiples of a patch from 196 to 1536.
        reference: the side that ``self`` compares with; the largest of ``sizes`` when None. It gets no metric.
        source: of the images.
    """

    needs_heads = True

    def __init__(
        self,
        teachers: Mapping[str, Teacher] | None = None,
        /,
        *,
        sizes: list[int] | tuple[int, ...] = (64, 96, 128, 192, 256),
        reference: int | None = None,
        source: Mapping[str, Any] = SCENES_TEST,
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ConfigError(f"evals.mode_switch: sizes must be a list of sides, at least 1 pixel; got {list(sizes)}")
        if len(set(sizes)) < 2:
            raise ConfigError(f"evals.mode_switch: sizes must have at least two different sides, got {sizes[0]} alone")
        self.teachers = teachers
        self.sizes = tuple(sorted(set(sizes)))
        self.reference = max(sizes) if reference is None else reference
        self.source = source

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        need_spatial(model, "mode_switch")
        curves: dict[str, dict[int, Pairs]] = {}
        with frozen(model, *(self.teachers or {}).values()):
            for _, names, images in read_batches(context.sources.open(self.source), [], context):
                self._add(model, names, images, curves)
        return {key: value for name, curve in curves.items() for key, value in _metrics(name, curve).items()}

    def _add(
        self, model: Backbone, names: Sequence[str], images: Sequence[Image.Image], curves: dict[str, dict[int, Pairs]]
    ) -> None:
        """Compare one batch at every size."""
        fixed: Features | None = None
        for size in self.sizes:
            view = input_size(model, size)
            out = model(_batch(images, view, model))
            heads: Mapping[str, Features] = getattr(out, "heads", None) or {}
            if not self.teachers or not heads:
                if size == self.reference:
                    continue
                if fixed is None:
                    fixed = model(_batch(images, input_size(model, self.reference), model))
                curves.setdefault(SELF, {}).setdefault(size, Pairs(SELF)).add(out, fixed, names)
                continue
            for name, teacher in self.teachers.items():
                if name not in heads:
                    raise ConfigError(f"the model has no head for teacher {name!r}{nearest(name, heads)}")
                target = teacher(_batch(images, teacher.input_size(view, model.spec.stride), teacher))
                curves.setdefault(name, {}).setdefault(size, Pairs(name)).add(heads[name], target, names)


def _batch(images: Sequence[Image.Image], view: tuple[int, int], model: object) -> Tensor:
    return torch.stack([fit(image, view) for image in images]).to(device_of(model))


def _metrics(name: str, curve: Mapping[int, Pairs]) -> dict[str, float]:
    """Metrics of one teacher over sizes."""
    found: dict[str, float] = {}
    fidelities = []
    for size, pairs in sorted(curve.items()):
        statistics = pairs.statistics()
        found |= {f"{name}/{key}@{size}": value for key, value in statistics.items() if not key.endswith("variance")}
        if "fidelity" in statistics:
            fidelities.append(statistics["fidelity"])
    if fidelities:
        found[f"{name}/fidelity"] = sum(fidelities) / len(fidelities)
        found[f"{name}/steadiness"] = min(fidelities) / max(fidelities)
    return found


class Pairs:
    """Statistics of a student's and its teacher's features, batch by batch.

    Args:
        name: of the teacher, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.summary: list[Tensor] = []
        self.cosine = self.error = 0.0
        self.cells = self.numbers = 0
        self.student, self.teacher = _Spread(), _Spread()

    def add(self, student: Features, teacher: Features, names: Sequence[str]) -> None:
        """Add a batch.

        Raises:
            FeatureError: NaN, infinity, or different widths; names image or teacher.
        """
        pair = (student, f"{self.name} student's"), (teacher, f"{self.name} teacher's")
        a, b = (check(one.summary, f"{who} summary", names, 2) for one, who in pair)
        if a is not None and b is not None:
            self._same(a, b)
            self.summary.append(F.cosine_similarity(a.double(), b.double(), dim=1))
        a, b = (check(one.spatial, f"{who} spatial", names, 4) for one, who in pair)
        if a is None or b is None:
            return
        self._same(a, b)
        self.teacher.add(b)
        self.student.add(a)
        b = F.interpolate(b.double(), size=a.shape[-2:], mode="bilinear", align_corners=True)
        a = a.double()
        self.cosine += float(F.cosine_similarity(a, b, dim=1).sum())
        self.error += float((a - b).square().sum())
        self.cells += a[:, 0].numel()
        self.numbers += a.numel()

    def _same(self, a: Tensor, b: Tensor) -> None:
        if a.shape[1] != b.shape[1]:
            raise FeatureError(f"{self.name!r}: the student has {a.shape[1]} channels and the teacher {b.shape[1]}")

    def statistics(self) -> dict[str, float]:
        """``cosine``, ``fidelity``, ``student_variance`` and ``teacher_variance`` of the maps; ``summary_cosine``.

        Variances are over all elements of the maps, with n - 1.

        Raises:
            FeatureError: the teacher is constant.
        """
        found: dict[str, float] = {}
        if self.cells:
            student, teacher = self.student.variance(), self.teacher.variance()
            # Rounding leaves a constant a variance of about (eps * mean)^2.
            if teacher <= (1e-6 * self.teacher.mean) ** 2:
                raise FeatureError(f"{self.name!r} is constant everywhere: fidelity is undefined")
            found = {
                "cosine": self.cosine / self.cells,
                "fidelity": teacher / max(self.error / self.numbers, _LEAST * teacher),
                "student_variance": student,
                "teacher_variance": teacher,
            }
        if self.summary:
            found["summary_cosine"] = float(torch.cat(self.summary).mean())
        return found


class _Spread:
    """Streaming variance of all elements, in float64 (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = 0.0

    def add(self, x: Tensor) -> None:
        variance, mean = (float(value) for value in torch.var_mean(x.double(), correction=0))
        delta, total = mean - self.mean, self.count + x.numel()
        self.squares += variance * x.numel() + delta**2 * self.count * x.numel() / total
        self.mean += delta * x.numel() / total
        self.count = total

    def variance(self) -> float:
        """Variance with n - 1."""
        return self.squares / max(1, self.count - 1)
