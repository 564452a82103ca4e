"""Agreement of a student's heads with its teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.config import nearest
from agglo.evals._features import check, read_batches
from agglo.evals.base import Backbone, Eval, EvalContext, FeatureError, Inapplicable, device_of, frozen, input_size
from agglo.nn.geometry import align
from agglo.preprocess import fit
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features

HELD_OUT: list[dict[str, Any]] = [{"kind": "photos", "split": "heldout"}, {"kind": "scenes", "split": "test"}]


class Agreement(Eval):
    """Agreement of each head with its teacher, in the teacher's feature space, on held-out images.

    The student's input is the image at ``size``, the teacher's at the size it requires; their maps are resized to the
    smaller grid per axis by area averaging (``docs/method.md``, 3.3 and D-11). With features ``y`` of the teacher and
    ``y'`` of the head, over all images and cells, and ``m`` the mean of ``y``:

    - ``<teacher>/summary_cosine``: the mean of ``cos(y', y)``;
    - ``<teacher>/spatial_r2``: ``1 - sum ||y' - y||^2 / sum ||y - m||^2``, the explained variance: 1 for a perfect
      copy, 0 for the constant ``m``, negative for anything worse;
    - ``<teacher>/spatial_cosine``: the mean of ``cos(y' - m, y - m)``; centred, because a large common mean makes any
      two maps similar.

    A metric is omitted where the teacher has no such output or the student no head for it.

    Args:
        teachers: by the names of the student's heads.
        size: pixels, side or ``(H, W)``; snapped to what the student can take.
        sources: of the images; pooled.
    """

    needs_heads = True

    def __init__(
        self,
        teachers: Mapping[str, Teacher] | None = None,
        /,
        *,
        size: int | tuple[int, int] = 128,
        sources: list[dict[str, Any]] = HELD_OUT,
    ) -> None:
        if not sources:
            raise ConfigError("evals.agreement: sources is empty; name one, such as {kind: photos, split: heldout}")
        self.teachers = teachers
        self.size = size
        self.sources = sources

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        if not self.teachers:
            raise Inapplicable(
                "agreement compares a student with its teachers: pass them, "
                "evaluate(model, [...], teachers={name: teacher}) or Agreement({name: teacher})"
            )
        pairs = {name: _Pairs(name) for name in self.teachers}
        with frozen(model, *self.teachers.values()):
            for options in self.sources:
                self._collect(model, options, pairs, context)
        return {metric: value for pair in pairs.values() for metric, value in pair.metrics().items()}

    def _collect(
        self, model: Backbone, options: Mapping[str, Any], pairs: Mapping[str, _Pairs], context: EvalContext
    ) -> None:
        view = input_size(model, self.size)
        for _, names, images in read_batches(context.sources.open(options), [], context):
            batch = torch.stack([fit(image, view) for image in images])
            heads: Mapping[str, Features] | None = getattr(model(batch.to(device_of(model))), "heads", None)
            if not heads:
                raise Inapplicable(f"agreement compares heads with teachers: this {type(model).__name__} has no heads")
            for name, teacher in (self.teachers or {}).items():
                if name not in heads:
                    raise ConfigError(f"the model has no head for teacher {name!r}{nearest(name, heads)}")
                size = teacher.input_size(view, model.spec.stride)
                shown = batch if size == view else torch.stack([fit(image, size) for image in images])
                pairs[name].add(heads[name], teacher(shown.to(device_of(teacher))), names)


class _Pairs:
    """Features of one head and its teacher, batch by batch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cosines: list[Tensor] = []
        self.maps: list[tuple[Tensor, Tensor]] = []

    def add(self, head: Features, teacher: Features, names: list[str]) -> None:
        pair = (
            (check(f.summary, f"{who} summary", names, 2), check(f.spatial, f"{who} spatial", names, 4))
            for f, who in ((head, f"{self.name} head's"), (teacher, f"{self.name} teacher's"))
        )
        for a, b in zip(*pair, strict=True):
            if a is None or b is None:
                continue
            if a.shape[1] != b.shape[1]:
                raise FeatureError(f"head {self.name!r} has {a.shape[1]} channels and its teacher {b.shape[1]}")
            if a.ndim == 2:
                self.cosines.append(F.cosine_similarity(a.double(), b.double(), dim=1))
            else:
                self.maps.append(align(a, b))

    def metrics(self) -> dict[str, float]:
        found = {}
        if self.cosines:
            found[f"{self.name}/summary_cosine"] = float(torch.cat(self.cosines).mean())
        if self.maps:
            r2, cosine = spatial_agreement(self.maps)
            if r2 is None:
                raise FeatureError(f"teacher {self.name!r} is constant over all cells: agreement is undefined")
            found |= {f"{self.name}/spatial_r2": r2, f"{self.name}/spatial_cosine": cosine}
        return found


def spatial_agreement(maps: list[tuple[Tensor, Tensor]]) -> tuple[float | None, float]:
    """R^2 and mean centred cosine of ``(head, teacher)`` batches ``(B, D, h, w)``, summed in float64.

    The maps of a pair have one grid. R^2 is None if the teacher's features have no variance.
    """
    cells = sum(teacher[:, 0].numel() for _, teacher in maps)
    mean = torch.stack([teacher.double().sum((0, 2, 3)) for _, teacher in maps]).sum(0) / cells
    centre = mean[None, :, None, None]
    residual = variance = cosine = 0.0
    for head, teacher in maps:
        head, teacher = head.double() - centre, teacher.double() - centre
        residual += float((head - teacher).square().sum())
        variance += float(teacher.square().sum())
        cosine += float(F.cosine_similarity(head, teacher, dim=1).sum())
    return (1 - residual / variance if variance > 0 else None), cosine / cells
