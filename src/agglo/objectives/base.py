"""The contract of an objective: which module learns, from which targets, by which loss, and what is exported."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from agglo.config import Strict, build, find
from agglo.model.creation import create
from agglo.nn.placement import Placement
from agglo.objectives._wrapping import wrap
from agglo.recipe import STUDENT, Recipe, from_dict
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec

CONSTANT = 1e-6
"""A :func:`spread` below this is rounding: the features are the same everywhere."""


@dataclass(frozen=True, slots=True)
class Target:
    """Features of a view, and where the view lies.

    Args:
        features: of the view, float32.
        placement: of the view's pixels on the rendered image that all views of a step are cut from.
    """

    features: Features
    placement: Placement

    def cells(self, spatial: Tensor) -> Placement:
        """The placement of the cells of a map ``(B, C, h, w)`` of this view."""
        height, width = spatial.shape[-2:]
        return self.placement.with_grid((height, width))


Targets = Mapping[str, Target]


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation of an objective: the scalar to minimise, and its terms by name, detached and unweighted."""

    loss: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step has besides images and targets.

    Args:
        step, total: index of the step, from 0, and the number of steps of the run.
        placement: of the model's view; None for the whole image.
        window: side, in patches, of the ViTDet windows of this step; None for the model's own.
        heads_only: stop gradients before the student.
        average: features of the EMA student on a view of its own, without heads; None leaves the MESA term out.
        mesa_ramp: factor in [0, 1] on the weight of that term.
    """

    step: int = 0
    total: int = 1
    placement: Placement | None = None
    window: int | None = None
    heads_only: bool = False
    average: Target | None = None
    mesa_ramp: float = 1.0


@runtime_checkable
class Trainable(Protocol):
    """What the training loop needs of the module that learns (:meth:`Objective.build_model`).

    It is an :class:`torch.nn.Module` that can be copied (``copy.deepcopy``). If it is the recipe's student, the loop
    also uses the interface of :class:`agglo.Model`.
    """

    @property
    def spec(self) -> FeatureSpec:
        """Its ``stride`` is the patch that views and shifts are counted in."""
        ...

    def save(self, folder: Path, /) -> Path:
        """Write the module to a folder, as the run's ``initial/`` and ``model/``."""
        ...


class Objective(nn.Module, ABC):
    """Base class of training objectives. The training loop calls, in this order:

    1. :meth:`build_model`: the module that learns;
    2. the constructor, with ``(recipe, model, teachers, /)`` and the keys of the recipe's ``objective:`` as
       keyword-only parameters;
    3. :meth:`fit` on the targets of ``targets.estimate_images`` images, where :attr:`needs_statistics`;
    4. :meth:`forward` once per step; parameters of the objective itself are trained with the model's;
    5. :meth:`fold` on a copy of the averaged model, which is then saved as the run's ``model/``.

    The objective's state is part of every checkpoint; teachers are frozen and never saved.

    Attributes:
        trains_student: whether the module that learns is the recipe's student (an :class:`agglo.Model`, measured after
            training). If not, the recipe may have no ``student:`` and no stages.
        unused: keys of the recipe that the objective does not use, as dotted paths with ``*`` for every teacher. They
            are refused unless they have their default value.
        untrained_upsampler: whether a teacher may have an upsampler without trained weights, because the run trains it.
        needs_targets: whether :meth:`forward` reads targets; otherwise it gets none, and none are computed.
        cacheable: whether targets may be read from a feature cache, which holds the teachers' final features. By
            default: if the class does not override :meth:`compute`.
        example: changes that turn a small recipe with three teachers into one of this objective, of a few seconds. The
            contract tests train it.
    """

    trains_student: ClassVar[bool] = True
    unused: ClassVar[Sequence[str]] = ()
    untrained_upsampler: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    cacheable: ClassVar[bool] = True
    example: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "cacheable" not in vars(cls):
            cls.cacheable = cls.compute is Objective.compute

    @classmethod
    def build_model(
        cls, recipe: Recipe, teachers: Mapping[str, Teacher], *, initialize: bool = True
    ) -> tuple[nn.Module, dict[str, Teacher]]:
        """The untrained module, which is also :class:`Trainable`, and the teachers that give its targets.

        Args:
            recipe: the run.
            teachers: by name, as :func:`build_teachers` returns them.
            initialize: load the weights that training starts from; False where a checkpoint will be loaded.
        """
        return create(recipe, teachers, initialize=initialize), dict(teachers)

    @property
    def needs_statistics(self) -> bool:
        """Whether :meth:`fit` must run before the first step."""
        return False

    def fit(self, batches: Iterable[Targets]) -> list[str]:
        """Estimate statistics of the targets, and freeze them.

        Returns:
            Notes for the user, one line each.

        Raises:
            ConfigError: no batch, or targets that are not finite, constant or too few.
        """
        del batches
        return []

    def compute(self, name: str, teacher: Teacher, images: Tensor) -> dict[str, Features]:
        """The target features of one teacher for its view ``(B, 3, H, W)``, by target name."""
        return {name: teacher(images)}

    @abstractmethod
    def forward(
        self,
        model: Any,
        images: Tensor,
        targets: Targets,
        context: StepContext = StepContext(),
    ) -> Result:
        """The loss of one batch.

        With several processes each has a part of the batch; the mean of their losses is the loss of the whole batch.

        Args:
            model: what :meth:`build_model` returned, in training mode.
            images: the model's view, RGB ``(B, 3, H, W)`` in [0, 1].
            targets: by target name.
            context: see :class:`StepContext`.
        """

    def fold(self, model: Any) -> Any:
        """Turn the trained module into the one that is exported, in place, and return it."""
        return model

    def unfold(self, model: Any, names: Collection[str]) -> None:
        """Undo :meth:`fold`, in place, for the heads of these teachers, which come from an exported model."""

    @staticmethod
    def no_weight_decay(model: Any) -> set[str]:
        """Names of parameters without weight decay, besides biases, norms and scalars; by default a student's."""
        return {f"student.{name}" for name in model.student.no_weight_decay()}

    @staticmethod
    def next_steps(folder: str, model: Any = None) -> str:
        """Commands to try after training, one per line.

        Args:
            folder: the run folder, quoted for a shell.
            model: the trained model; only what it can do is offered. None for every command.
        """
        has_text = model is None or any(head.text is not None for head in model.head_configs.values())
        suffix = "parquet" if find_spec("pyarrow") else "npz"
        commands = {
            f'agglo search --photos "a cup of coffee" --model {folder}': has_text,
            f"agglo view YOUR_IMAGE.jpg -o view.png --model {folder}": model is None or model.spec.spatial is not None,
            f"agglo embed YOUR_FOLDER -o embeddings.{suffix} --model {folder}": model is None
            or model.spec.summary is not None,
        }
        return "\n".join(command for command, possible in commands.items() if possible)


def objective_kind(recipe: Recipe) -> type[Objective]:
    """The class of a recipe's objective."""
    return find("objectives", recipe.objective["kind"])


# --- keys of a recipe -------------------------------------------------------------------------------------------------


def _student_keys(model: type[Strict], above: str = "") -> Iterator[str]:
    """Paths of the keys that are marked as keys about a student."""
    for name, field in model.model_fields.items():
        if field.json_schema_extra == STUDENT:
            yield above + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Strict):
            yield from _student_keys(field.annotation, f"{above}{name}.")


STUDENT_KEYS = tuple(_student_keys(Recipe))
"""Dotted paths of the keys about a student."""


def refuse_unused_keys(recipe: Recipe, unused: Iterable[str]) -> None:
    """Refuse keys that the recipe's objective does not use, instead of ignoring them.

    A key is refused if its value is not the default: a saved recipe states every key.

    Args:
        recipe: the run.
        unused: dotted paths of keys, with ``*`` for every teacher (:attr:`Objective.unused`).

    Raises:
        ConfigError: names the keys.
    """
    given, tree = recipe.to_dict(), recipe.to_dict()
    names = list(dict.fromkeys(key.replace("*", name) for key in unused for name in recipe.teachers))
    paths = [name.split(".") for name in names]
    for *above, key in paths:
        reduce(getitem, above, tree).pop(key)
    default = from_dict(tree).to_dict()
    wrong = [".".join(path) for path in paths if reduce(getitem, path, given) != reduce(getitem, path, default)]
    if wrong:
        them = "it: remove it" if len(wrong) == 1 else "them: remove them"
        raise ConfigError(f"{', '.join(wrong)}: objective {recipe.objective['kind']} does not use {them}")


# --- teachers ---------------------------------------------------------------------------------------------------------


def build_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The recipe's teachers by name, with their mosaics and upsamplers, frozen and in eval mode."""
    untrained, teachers = objective_kind(recipe).untrained_upsampler, {}
    for name, entry in recipe.teachers.items():
        teacher = build("teachers", entry.teacher, where=f"teachers.{name}")
        teachers[name] = wrap(teacher, entry, name, untrained=untrained).requires_grad_(False).eval()
    return teachers


def partition_teachers(recipe: Recipe, teachers: Mapping[str, Teacher], partition: int) -> dict[str, Teacher]:
    """The teachers of a partition, by name; all where the partition names none."""
    names = recipe.partitions[partition].teachers or teachers
    return {name: teacher for name, teacher in teachers.items() if name in names}


# --- checks of targets ------------------------------------------------------------------------------------------------


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """The largest range of a channel over its largest magnitude, of ``(B, C)`` or ``(B, C, H, W)``.

    Returns:
        Float32 scalar on the features' device: NaN where anything is not finite, about 0 where every channel is
        constant, infinity for a single position, which cannot vary.
    """
    if features.numel() == features.shape[1]:
        return torch.where(torch.isfinite(features).all(), torch.inf, torch.nan).to(features.device)
    over = [axis for axis in range(features.ndim) if axis != 1]
    low, high = features.float().amin(over), features.float().amax(over)
    # Infinity over infinity is NaN; a channel that is 0 everywhere does not vary.
    return ((high - low) / torch.maximum(high.abs(), low.abs()).clamp(min=torch.finfo(torch.float32).tiny)).amax()


def spreads(targets: Mapping[str, Features]) -> dict[str, Tensor]:
    """The :func:`spread` of each target, as ``<target>/summary`` and ``<target>/spatial``."""
    found = {}
    for name, features in targets.items():
        for part, tensor in (("summary", features.summary), ("spatial", features.spatial)):
            if tensor is not None:
                found[f"{name}/{part}"] = spread(tensor)
    return found


def check_finite(targets: Mapping[str, Features], where: str) -> None:
    """Refuse features that contain NaN or infinity.

    Raises:
        ConfigError: names the target and ``where``.
    """
    for name, value in spreads(targets).items():
        target, part = name.split("/")
        if bool(value.isnan()):
            raise ConfigError(
                f"teachers.{target}: {part} features contain NaN or infinity ({where}): check its weights and its "
                "input, and use dtype float32 if it runs in half precision"
            )


def with_teacher_name(teacher: str, work: Callable[..., None], *arguments: Any) -> list[str]:
    """Call ``work``; errors and warnings are prefixed with the teacher's name.

    Returns:
        The warnings, one line each; none is issued.

    Raises:
        ConfigError: ``work`` raised a ValueError or RuntimeError.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            work(*arguments)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"teachers.{teacher}: {error}") from error
    return [f"teachers.{teacher}: {each.message}" for each in caught]


def required(tensor: Tensor | None, owner: str) -> Tensor:
    """The tensor, which the spec of its owner promises.

    Raises:
        TypeError: it is None.
    """
    if tensor is None:
        raise TypeError(f"{owner!r} or its head returned None for an output that its spec promises")
    return tensor
