"""Multi-teacher distillation: ``L = sum_t w_summary L_summary + w_spatial L_spatial`` (docs/method.md, 2.11)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from agglo.config import build
from agglo.losses.base import Loss
from agglo.model.creation import weights_of
from agglo.model.model import Model
from agglo.nn.placement import Placement
from agglo.normalizers.base import Normalizer
from agglo.objectives._auxiliary import AuxiliaryHeads
from agglo.objectives._matching import compare, fit_statistics, weigh_by_positions
from agglo.objectives.base import Objective, Result, StepContext, Target, Targets, required
from agglo.recipe import Recipe
from agglo.teachers.base import Teacher
from agglo.types import Features

MESA = "mesa"
"""Name of the term between the student and its EMA (SE-MESA)."""


class Distill(Objective):
    """A student with a pair of heads per teacher, trained on the teachers' summaries and maps.

    Terms are ``<teacher>/summary``, ``<teacher>/spatial``, ``<teacher>/auxiliary`` and ``mesa``. The student predicts
    in normalised space (docs/method.md, D-2); :meth:`fold` moves the normalizers into the spatial heads.

    Args:
        recipe: the run.
        model: the student with its heads.
        teachers: by name; only their specs are used.

    Raises:
        ConfigError: an auxiliary head does not fit the student.
    """

    def __init__(self, recipe: Recipe, model: Model, teachers: Mapping[str, Teacher], /) -> None:
        super().__init__()
        weights: dict[str, float] = {}
        # Module dictionaries, typed as plain ones: pyright has no value type for a ModuleDict.
        self.normalizers: dict[str, Normalizer] = nn.ModuleDict()  # type: ignore[assignment]
        self.summary_losses: dict[str, Loss] = nn.ModuleDict()  # type: ignore[assignment]
        self.spatial_losses: dict[str, Loss] = nn.ModuleDict()  # type: ignore[assignment]
        for name, entry in recipe.teachers.items():
            spec = teachers[name].spec
            summary, spatial = weights_of(name, entry, spec)
            if summary > 0:
                weights[f"{name}/summary"] = summary
                self.summary_losses[name] = build("losses", recipe.losses.summary, where="losses.summary")
            if spec.spatial is not None and spatial > 0:
                weights[f"{name}/spatial"] = spatial
                self.spatial_losses[name] = build("losses", recipe.losses.spatial, where="losses.spatial")
                self.normalizers[name] = build(
                    "normalizers", recipe.targets.normalizer, spec.spatial, where="targets.normalizer"
                )
        self.mesa: Loss | None = None
        if recipe.losses.mesa is not None:
            weights[MESA] = recipe.losses.mesa.weight
            self.mesa = build("losses", recipe.losses.mesa.loss, where="losses.mesa")
        self.balancer = build("balancers", recipe.balancer, weights, where="balancer")
        specs = {name: teacher.spec for name, teacher in teachers.items()}
        self.auxiliary = AuxiliaryHeads(recipe, specs, model.student)

    @property
    def needs_statistics(self) -> bool:
        """Whether a normalizer or a loss must be fitted before the first step (docs/method.md, D-3)."""
        parts = [*self.normalizers.values(), *self.summary_losses.values(), *self.spatial_losses.values()]
        return any(part.needs_statistics for part in parts)

    def fit(self, batches: Iterable[Targets]) -> list[str]:
        """See :meth:`Objective.fit`."""
        return fit_statistics(self.normalizers, self.summary_losses, self.spatial_losses, batches)

    def forward(
        self,
        model: Model,
        images: Tensor,
        targets: Targets,
        context: StepContext = StepContext(),  # noqa: B008
    ) -> Result:
        """See :meth:`Objective.forward`; teachers without a target have no term."""
        weights = self.auxiliary.weights(context.step, context.total)
        early: dict[int, Features] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not context.heads_only):
            features = model.encode(
                images, window=context.window, blocks={self.auxiliary.blocks[name] for name in weights}, into=early
            )
        whole = Placement.full(len(images), (1, 1), (images.shape[-2], images.shape[-1]))
        view = Target(features, context.placement or whole)
        rows: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        placements: dict[str, tuple[Loss, Placement, Placement]] = {}
        for name, heads in model.heads.items():
            if name not in targets:
                continue
            predicted, target = heads(features), targets[name].features
            if name in self.summary_losses:
                loss = self._measure(self.summary_losses[name])
                rows[f"{name}/summary"] = loss(required(predicted.summary, name), required(target.summary, name))
            if name in self.spatial_losses:
                # Project first, then resample to the common grid (docs/method.md, D-1); targets are normalised on
                # their native grid.
                wanted = self.normalizers[name](required(target.spatial, name))
                bt, loss = targets[name].cells(wanted), self.spatial_losses[name]
                found = required(predicted.spatial, name)
                at = view.cells(found)
                rows[f"{name}/spatial"] = compare(self._measure(loss), found, at, wanted, bt)
                if not self.balancer.weighs_images:
                    placements[f"{name}/spatial"] = loss, at, bt
                if name in weights:
                    found = self.auxiliary.predict(name, required(early[self.auxiliary.blocks[name]].spatial, name))
                    at = view.cells(found)
                    extra[f"{name}/auxiliary"] = compare(loss, found, at, wanted, bt)
                    placements[f"{name}/auxiliary"] = loss, at, bt
        terms = {name: row.mean() for name, row in rows.items()} if self.balancer.weighs_images else dict(rows)
        if self.mesa is not None and context.average is not None and context.mesa_ramp > 0:
            mine = required(features.spatial, "student")
            other = required(context.average.features.spatial, "student")
            at, bt = view.cells(mine), context.average.cells(other)
            terms[MESA] = compare(self.mesa, mine, at, other, bt)
            placements[MESA] = self.mesa, at, bt
        scaled = weigh_by_positions({**terms, **extra}, placements)
        terms, extra = {name: scaled[name] for name in terms}, {name: scaled[name] for name in extra}
        per_image = rows if self.balancer.weighs_images else None
        total = self.balancer(
            terms, step=context.step, total=context.total, per_image=per_image, shares={MESA: context.mesa_ramp}
        )
        for name, term in extra.items():
            total = total + weights[name.removesuffix("/auxiliary")] * term
            terms[name] = term
        return Result(total, {name: term.detach() for name, term in terms.items()})

    def _measure(self, loss: Loss) -> Callable[..., Tensor]:
        """The loss as the balancer needs it: a scalar, or one number per image."""
        return loss.by_image if self.balancer.weighs_images else loss

    @torch.no_grad()
    def fold(self, model: Model) -> Model:
        """Fold the normalizers into the spatial heads, which then predict in the teachers' own spaces."""
        for name, normalizer in self.normalizers.items():
            head = model.heads[name].spatial
            if head is not None:
                head.fold(normalizer.unwhiten, normalizer.mean)
        return model

    @torch.no_grad()
    def unfold(self, model: Model, names: Collection[str]) -> None:
        """See :meth:`Objective.unfold`. With ``y_hat = W (y - m)`` that is ``fold(W, -W m)``."""
        for name in names:
            head = model.heads[name].spatial
            if head is not None and name in self.normalizers:
                normalizer = self.normalizers[name]
                head.fold(normalizer.whiten, -(normalizer.whiten @ normalizer.mean))
