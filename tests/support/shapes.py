"""The contracts' calls with array shapes checked by jaxtyping: within one call, one letter is one size.

``b`` is the batch, ``y x`` an image in pixels, ``h w`` a grid in cells, ``d`` channels, ``s`` the width of a summary;
``*grid`` is any number of dimensions. Names in braces are read from the arguments.
"""

from __future__ import annotations

from beartype import beartype
from jaxtyping import Bool, Float, Float32, jaxtyped
from torch import Tensor

from agglo.heads.base import Head
from agglo.losses.base import Loss
from agglo.normalizers.base import Normalizer
from agglo.students.base import Student
from agglo.teachers.base import Teacher
from agglo.text.base import TextTower

typed = jaxtyped(typechecker=beartype)


@typed
def encode(
    student: Student, images: Float[Tensor, "b 3 y x"]
) -> tuple[
    Float[Tensor, "b {student.spec.summary}"],
    Float[Tensor, "b {student.spec.spatial} y//{student.spec.stride} x//{student.spec.stride}"],
]:
    """A student's summary and spatial map."""
    out = student(images)
    return out.summary, out.spatial  # pyright: ignore[reportReturnType]


@typed
def teach(
    teacher: Teacher, images: Float[Tensor, "b 3 y x"]
) -> tuple[
    Float[Tensor, "b {teacher.spec.summary}"] | None,
    Float[Tensor, "b {teacher.spec.spatial} y//{teacher.spec.stride} x//{teacher.spec.stride}"] | None,
]:
    """A teacher's summary and spatial map; None for the one that its spec lacks."""
    out = teacher(images)
    assert (out.summary is None) == (teacher.spec.summary is None), "summary and spec disagree"
    assert (out.spatial is None) == (teacher.spec.spatial is None), "spatial map and spec disagree"
    return out.summary, out.spatial


@typed
def project(head: Head, x: Float[Tensor, "b {head.source} *grid"]) -> Float[Tensor, "b {head.target} *grid"]:
    """A head's output: other channels, the same positions."""
    return head(x)


@typed
def measure(
    loss: Loss,
    prediction: Float[Tensor, "b d *grid"],
    target: Float[Tensor, "b d *grid"],
    mask: Bool[Tensor, "b 1 *grid"] | None = None,
) -> Float32[Tensor, ""]:
    """A loss: one float32 number per batch."""
    return loss(prediction, target) if mask is None else loss(prediction, target, mask)


@typed
def measure_by_image(
    loss: Loss,
    prediction: Float[Tensor, "b d *grid"],
    target: Float[Tensor, "b d *grid"],
    mask: Bool[Tensor, "b 1 *grid"] | None = None,
) -> Float32[Tensor, "b"]:
    """A loss, one float32 number per image."""
    return loss.by_image(prediction, target, mask)


@typed
def normalize(normalizer: Normalizer, features: Float[Tensor, "b d *grid"]) -> Float[Tensor, "b d *grid"]:
    """Targets from teacher features."""
    return normalizer(features)


@typed
def denormalize(normalizer: Normalizer, targets: Float[Tensor, "b d *grid"]) -> Float[Tensor, "b d *grid"]:
    """Teacher features from targets."""
    return normalizer.inverse(targets)


@typed
def encode_text(tower: TextTower, texts: list[str]) -> Float32[Tensor, "{len(texts)} {tower.width}"]:
    """One vector per text."""
    return tower.encode(texts)
