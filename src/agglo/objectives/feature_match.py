"""Feature matching: blocks of a student against blocks of one teacher (FitNets, arXiv:1412.6550)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from agglo.config import build
from agglo.losses.base import Loss
from agglo.model.creation import preferred_size
from agglo.model.model import Model
from agglo.nn.placement import Placement
from agglo.normalizers.base import Normalizer
from agglo.objectives._matching import compare, fit_statistics, weigh_by_positions
from agglo.objectives.base import Objective, Result, StepContext, Target, Targets, required
from agglo.recipe import Recipe
from agglo.teachers.base import Teacher, check_blocks
from agglo.types import ConfigError, Features


class FeatureMatch(Objective):
    """A student whose blocks predict the maps of chosen blocks of one teacher.

    With ``s_j`` the student's map after block ``j``, ``t_i`` the teacher's after block ``i``, ``N_i`` the recipe's
    ``targets.normalizer`` and ``R_i`` a learned 1 x 1 convolution (FitNets' regressor)::

        L = balancer({ loss(R_i(s_j), N_i(t_i)) : (i, j) })

    ``loss`` is ``losses.spatial``; the terms are ``<teacher>:<i>/spatial``. The exported model is the student without
    heads: the regressors are part of the checkpoints only.

    Args:
        recipe: the run; it has one teacher.
        model: the student, which is a stack of blocks (kind vit).
        teachers: the teacher, which is a stack of blocks (kinds timm and transformers).
        blocks: of the teacher, as indices from 0.
        student_blocks: of the student, one for each of ``blocks``. null: spread evenly, ending with the last block.

    Raises:
        ConfigError: several teachers, a student or teacher without blocks, no such block, or keys that do not fit.
    """

    unused = (
        "heads", "losses.summary", "losses.mesa", "auxiliary", "teachers.*.summary_weight",
        "teachers.*.spatial_weight", "teachers.*.summary_head", "teachers.*.spatial_head",
    )  # fmt: skip
    example = (
        "teachers={vit: {kind: timm, model: test_vit, weights: random}}", "heads={}",
        "objective={kind: feature_match, blocks: [1, 5]}",
    )  # fmt: skip

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        teachers: Mapping[str, Teacher],
        /,
        *,
        blocks: list[int],
        student_blocks: list[int] | None = None,
    ) -> None:
        super().__init__()
        ((name, teacher),) = teachers.items()
        depth = model.student.depth
        if depth == 0:
            kind = recipe.student["kind"]
            raise ConfigError(f"student: a {kind} student is not a stack of blocks: use a student of kind vit")
        if not blocks:
            raise ConfigError("objective.blocks: is empty; name at least one block of the teacher, e.g. [3]")
        if len(set(blocks)) != len(blocks):
            raise ConfigError(f"objective.blocks: {blocks} has duplicates; name each block once")
        if student_blocks is None:
            student_blocks = [max(1, round(depth * (i + 1) / len(blocks))) - 1 for i in range(len(blocks))]
        if len(student_blocks) != len(blocks):
            given = f"{len(student_blocks)} {'entry' if len(student_blocks) == 1 else 'entries'}"
            raise ConfigError(
                f"objective.student_blocks: has {given}, objective.blocks has {len(blocks)}; name one for each, or null"
            )
        check_blocks(student_blocks, depth, "objective.student_blocks")
        self.blocks = {f"{name}:{block}": block for block in blocks}
        self.student_blocks = dict(zip(self.blocks, student_blocks, strict=True))
        self.normalizers: dict[str, Normalizer] = nn.ModuleDict()  # type: ignore[assignment]
        self.losses: dict[str, Loss] = nn.ModuleDict()  # type: ignore[assignment]
        self.regressors: dict[str, nn.Conv2d] = nn.ModuleDict()  # type: ignore[assignment]
        width = _map_width(model.student.spec.spatial)
        for key, channels in self._channels(name, teacher, recipe, model.spec.stride).items():
            self.normalizers[key] = build(
                "normalizers", recipe.targets.normalizer, channels, where="targets.normalizer"
            )
            self.losses[key] = build("losses", recipe.losses.spatial, where="losses.spatial")
            self.regressors[key] = nn.Conv2d(width, channels, 1)
        weights = {f"{key}/spatial": 1.0 for key in self.blocks}
        self.balancer = build("balancers", recipe.balancer, weights, where="balancer")

    @classmethod
    def build_model(
        cls, recipe: Recipe, teachers: Mapping[str, Teacher], *, initialize: bool = True
    ) -> tuple[Model, dict[str, Teacher]]:
        """The student without heads, and the teacher."""
        if len(teachers) != 1:
            raise ConfigError(f"objective feature_match needs one teacher; `teachers:` has {', '.join(teachers)}")
        model = Model(recipe.student, {}, tokens=list(teachers))
        model.preferred_size = preferred_size(recipe, model.step())
        if initialize:
            model.student.initialize()
        return model, dict(teachers)

    @torch.inference_mode()
    def _channels(self, name: str, teacher: Teacher, recipe: Recipe, stride: int) -> dict[str, int]:
        """The channels of the teacher's maps, from a black image."""
        side = recipe.partitions[0].sizes[0]
        tensor = next(itertools.chain(teacher.parameters(), teacher.buffers()), torch.empty(0))
        images = torch.zeros(1, 3, *teacher.input_size((side, side), stride), device=tensor.device)
        try:
            found = self.compute(name, teacher, images)
        except ConfigError as error:
            raise ConfigError(f"objective.blocks: teachers.{name}: {error}") from None
        return {key: required(features.spatial, key).shape[1] for key, features in found.items()}

    @property
    def needs_statistics(self) -> bool:
        """Whether a normalizer or a loss must be fitted before the first step."""
        return any(part.needs_statistics for part in [*self.normalizers.values(), *self.losses.values()])

    def fit(self, batches: Iterable[Targets]) -> list[str]:
        """See :meth:`Objective.fit`."""
        return fit_statistics(self.normalizers, {}, self.losses, batches)

    def compute(self, name: str, teacher: Teacher, images: Tensor) -> dict[str, Features]:
        """The teacher's maps after its blocks, one target per block."""
        del name
        maps = teacher.intermediates(images, [*self.blocks.values()])
        return {key: Features(None, spatial) for key, spatial in zip(self.blocks, maps, strict=True)}

    def forward(
        self,
        model: Model,
        images: Tensor,
        targets: Targets,
        context: StepContext = StepContext(),  # noqa: B008
    ) -> Result:
        """See :meth:`Objective.forward`."""
        captured: dict[int, Features] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not context.heads_only):
            last = model.encode(images, window=context.window, blocks={*self.student_blocks.values()}, into=captured)
        size = images.shape[-2], images.shape[-1]
        view = Target(last, context.placement or Placement.full(len(images), (1, 1), size))
        rows: dict[str, Tensor] = {}
        placements: dict[str, tuple[Loss, Placement, Placement]] = {}
        for key, target in targets.items():
            wanted, loss = self.normalizers[key](required(target.features.spatial, key)), self.losses[key]
            found = required(captured[self.student_blocks[key]].spatial, "student")
            found = self.regressors[key](found.to(self.regressors[key].weight.dtype)).float()
            at, bt = view.cells(found), target.cells(wanted)
            measure = loss.by_image if self.balancer.weighs_images else loss
            rows[f"{key}/spatial"] = compare(measure, found, at, wanted, bt)
            if not self.balancer.weighs_images:
                placements[f"{key}/spatial"] = loss, at, bt
        terms = weigh_by_positions({name: row.mean() for name, row in rows.items()}, placements)
        per_image = rows if self.balancer.weighs_images else None
        total = self.balancer(terms, step=context.step, total=context.total, per_image=per_image)
        return Result(total, {name: term.detach() for name, term in terms.items()})


def _map_width(width: int | None) -> int:
    """The channels of the student's map.

    Raises:
        ConfigError: it has none.
    """
    if width is None:
        raise ConfigError("student: it has no map to match: use a student of kind vit")
    return width
