"""Multi-teacher distillation: ``L = sum_t w_summary L_summary + w_spatial L_spatial`` (METHOD 2.11)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agglo import dist
from agglo.config import build
from agglo.data.shifts import RenderedBatch
from agglo.losses.base import Loss
from agglo.model.creation import weights_of
from agglo.model.model import Model
from agglo.nn.placement import Placement, align_to_common_grid, overlap_count
from agglo.normalizers.base import Normalizer
from agglo.objectives.auxiliary import Ladder, shown
from agglo.objectives.inspection import check_finite, named
from agglo.objectives.wrapping import wrap
from agglo.recipe import Recipe
from agglo.students.base import Student
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model said of its view, and where the view lies on the canvas that all views of a step share.

    Args:
        features: of the view.
        placement: of the view's pixels.
    """

    features: Features
    placement: Placement

    def cells(self, spatial: Tensor) -> Placement:
        """Where the cells of a map of this view lie."""
        height, width = spatial.shape[-2:]
        return self.placement.with_grid((height, width))


Targets = Mapping[str, Seen]


def build_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The recipe's teachers, by name, frozen and in eval mode."""
    teachers = {}
    for name, entry in recipe.teachers.items():
        teacher = build("teachers", entry.teacher, where=f"teachers.{name}")
        teacher = wrap(teacher, entry, name, untrained=recipe.objective.kind == "upsample")
        teachers[name] = teacher.requires_grad_(False).eval()
    return teachers


MESA = "mesa"
"""The name of the term between student and averaged student."""


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation of the objective: the scalar to minimise, and its terms by name, detached.

    Terms are ``<teacher>/summary`` and ``<teacher>/spatial``, ``mesa``, and ``<teacher>/auxiliary``, all as they are
    before their weight and share.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]


class Distill(nn.Module):
    """Normalizers, losses and balancer of every teacher: turns teacher features and student output into one scalar.

    The teachers themselves are not part of the module's state: they are frozen and never saved.

    Args:
        recipe: the run.
        specs: what each teacher returns.
        student: whose blocks the recipe's auxiliary heads read; not kept, and not needed where there are none.

    Raises:
        ConfigError: an auxiliary head does not fit the student.
    """

    def __init__(self, recipe: Recipe, specs: Mapping[str, FeatureSpec], student: Student | None = None) -> None:
        super().__init__()
        weights: dict[str, float] = {}
        # Module dictionaries that are read as plain ones: pyright cannot know what a ModuleDict holds.
        self.normalizers: dict[str, Normalizer] = nn.ModuleDict()  # type: ignore[assignment]
        self.summary_losses: dict[str, Loss] = nn.ModuleDict()  # type: ignore[assignment]
        self.spatial_losses: dict[str, Loss] = nn.ModuleDict()  # type: ignore[assignment]
        for name, entry in recipe.teachers.items():
            spec = specs[name]
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
        self.auxiliary = Ladder(recipe, specs, student)

    @property
    def needs_statistics(self) -> bool:
        """Whether a pre-pass must show the targets' distribution before step 0."""
        fitted = [*self.normalizers.values()]
        losses = [*self.summary_losses.values(), *self.spatial_losses.values()]
        return any(n.needs_statistics for n in fitted) or any(loss.needs_statistics for loss in losses)

    def teach(
        self,
        teachers: Mapping[str, Teacher],
        canvas: RenderedBatch,
        size: tuple[int, int],
        stride: int,
        shifts: Sequence[Tensor] | None = None,
    ) -> dict[str, Seen]:
        """What the teachers say of a batch: one forward pass each, under inference mode.

        Args:
            teachers: by name.
            canvas: the batch, in [0, 1], at least as large as what the student sees.
            size: ``(H, W)`` that the student sees; each teacher chooses its own from it.
            stride: the student's.
            shifts: ``(B, 2)`` a teacher, in its own patches; None: all look at the middle.
        """
        out = {}
        still = torch.zeros(len(canvas.images), 2, dtype=torch.long)
        for number, (name, teacher) in enumerate(teachers.items()):
            wanted = teacher.input_size(size, stride)
            with torch.inference_mode():
                view, placement = canvas.crop(wanted, teacher.spec.stride, still if shifts is None else shifts[number])
                features = teacher(view)
            # Inference tensors may not be saved for backward, so what leaves the teacher is an ordinary copy.
            out[name] = Seen(features.map(lambda x: x.float().clone()), placement)
        return out

    def fit(self, batches: Iterable[Targets]) -> list[str]:
        """The pre-pass (D-3, D-6): estimate every statistic from teacher features, then freeze.

        Returns:
            What to know of the statistics (too few samples, no Hadamard matrix), a line a teacher.

        Raises:
            ConfigError: there was not one batch; a teacher's features, where they have a loss, are not finite,
                constant or too few.
        """
        summaries: dict[str, list[Tensor]] = {n: [] for n, loss in self.summary_losses.items() if loss.needs_statistics}
        cells: dict[str, list[Tensor]] = {n: [] for n, loss in self.spatial_losses.items() if loss.needs_statistics}
        seen = 0
        for batch in batches:
            targets = {name: self._learned(name, each.features) for name, each in batch.items()}
            check_finite(targets, f"pre-pass, batch {seen}")
            seen += 1
            for name, normalizer in self.normalizers.items():
                if normalizer.needs_statistics and name in targets:
                    named(name, normalizer.update, _there(targets[name].spatial, name))
            for name in summaries.keys() & targets:
                summaries[name].append(_there(targets[name].summary, name).cpu())
            for name in cells.keys() & targets:
                cells[name].append(_there(targets[name].spatial, name)[:, :, ::2, ::2].cpu())
        if not seen:
            raise ConfigError("the pre-pass saw no image: targets.estimate_images must cover at least one batch")
        said: list[str] = []
        for name, normalizer in self.normalizers.items():
            if normalizer.needs_statistics:
                said += named(name, normalizer.freeze)
        for name, kept in summaries.items():
            said += named(name, self.summary_losses[name].fit, torch.cat(kept))
        for name, kept in cells.items():
            normalizer = self.normalizers[name]
            normalized = [normalizer(part.to(normalizer.mean.device)).cpu().permute(0, 2, 3, 1) for part in kept]
            said += named(name, self.spatial_losses[name].fit, torch.cat([part.flatten(0, 2) for part in normalized]))
        return list(dict.fromkeys(said))

    def forward(
        self,
        model: Model,
        images: Tensor,
        targets: Targets,
        *,
        placement: Placement | None = None,
        average: Seen | None = None,
        mesa_share: float = 1.0,
        heads_only: bool = False,
        window: int | None = None,
        step: int = 0,
        total: int = 1,
    ) -> Result:
        """The objective on one batch.

        Where several processes train, each has a part of the batch, and the mean of what they return is the objective
        on all of it: means over positions are weighed by the positions that each has seen (D-13).

        Args:
            model: the student with its heads, predicting in normalised space (D-2).
            images: ``(B, 3, H, W)`` in [0, 1], of a legal size: the student's view.
            targets: what :meth:`teach` returned for the same canvas; teachers that are not among them have no term.
            placement: of the student's view; the whole canvas when None.
            average: the averaged student's features of a view of its own, without heads; None leaves the term out.
            mesa_share: part of that term's weight which this step has.
            heads_only: let no gradient into the student.
            window: side, in patches, of the windows that most blocks look through in this step.
            step, total: where the run is, for balancers whose weights change.
        """
        shares = self.auxiliary.shares(step, total)
        blocks = {self.auxiliary.blocks[name] for name in shares}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not heads_only), shown(model.student, blocks) as seen:
            features = model.encode(images, window=window)
        mine = Seen(features, placement or Placement.full(len(images), (1, 1), (images.shape[-2], images.shape[-1])))
        rows: dict[str, Tensor] = {}
        extra: dict[str, Tensor] = {}
        places: dict[str, tuple[Loss, Placement, Placement]] = {}
        for name, heads in model.heads.items():
            if name not in targets:
                continue
            predicted, target = heads(features), targets[name].features
            if name in self.summary_losses:
                loss = self._measure(self.summary_losses[name])
                rows[f"{name}/summary"] = loss(_there(predicted.summary, name), _there(target.summary, name))
            if name in self.spatial_losses:
                # Project first, then bring to the common grid (D-1); targets are normalised on their native grid.
                wanted = self.normalizers[name](_there(target.spatial, name))
                theirs, loss = targets[name].cells(wanted), self.spatial_losses[name]
                found = _there(predicted.spatial, name)
                at = mine.cells(found)
                rows[f"{name}/spatial"] = compare(self._measure(loss), found, at, wanted, theirs)
                if not self.balancer.weighs_images:
                    places[f"{name}/spatial"] = loss, at, theirs
                if name in shares:
                    early = _there(seen[self.auxiliary.blocks[name]].spatial, name)
                    found = self.auxiliary.predict(name, early)
                    at = mine.cells(found)
                    extra[f"{name}/auxiliary"] = compare(loss, found, at, wanted, theirs)
                    places[f"{name}/auxiliary"] = loss, at, theirs
        terms = {name: row.mean() for name, row in rows.items()} if self.balancer.weighs_images else dict(rows)
        if self.mesa is not None and average is not None and mesa_share > 0:
            ours, theirs = _there(features.spatial, "student"), _there(average.features.spatial, "student")
            at, there = mine.cells(ours), average.cells(theirs)
            terms[MESA] = compare(self.mesa, ours, at, theirs, there)
            places[MESA] = self.mesa, at, there
        terms, extra = weighed(terms, extra, places)
        per_image = rows if self.balancer.weighs_images else None
        total_loss = self.balancer(terms, step=step, total=total, per_image=per_image, shares={MESA: mesa_share})
        for name, term in extra.items():
            total_loss = total_loss + shares[name.removesuffix("/auxiliary")] * term
            terms[name] = term
        return Result(total_loss, {name: term.detach() for name, term in terms.items()})

    def _learned(self, name: str, features: Features) -> Features:
        """Those parts of what a teacher said that have a loss."""
        summary, spatial = name in self.summary_losses, name in self.spatial_losses
        return Features(features.summary if summary else None, features.spatial if spatial else None)

    def _measure(self, loss: Loss) -> Callable[..., Tensor]:
        """The loss as the balancer wants it: a scalar, or one number an image."""
        return loss.by_image if self.balancer.weighs_images else loss

    @torch.no_grad()
    def fold(self, model: Model) -> Model:
        """Fold the normalizers into the spatial heads, in place: they answer in teacher space from then on."""
        for name, normalizer in self.normalizers.items():
            head = model.heads[name].spatial
            if head is not None:
                head.fold(normalizer.unwhiten, normalizer.mean)
        return model


def compare(measure: Callable[..., Tensor], a: Tensor, at: Placement, b: Tensor, bt: Placement) -> Tensor:
    """``measure`` of two maps on the cells that both have seen.

    Neither the maps that were brought there nor anything that is made of them waits for the backward pass: it makes
    them again, one comparison after the other. So at no time more than one teacher's warped map is held, whatever the
    balancer does with the terms.

    Args:
        measure: of two maps and a mask (:class:`agglo.losses.base.Loss`).
        a, at: a prediction ``(B, C, h, w)`` and where its cells lie; gradients flow through it.
        b, bt: a target ``(B, C, h', w')``.
    """

    def on_common_cells(a: Tensor, b: Tensor) -> Tensor:
        return measure(*align_to_common_grid(a, at, b, bt))

    if not (torch.is_grad_enabled() and a.requires_grad):
        return on_common_cells(a, b)
    return checkpoint(on_common_cells, a, b, use_reentrant=False, preserve_rng_state=False)


def weighed(
    terms: dict[str, Tensor], extra: dict[str, Tensor], places: Mapping[str, tuple[Loss, Placement, Placement]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms whose mean over processes is the mean over the positions of all of them: ``W n_r / sum_r n_r`` times each.

    How many positions a part has seen is known from where its views lie, so nobody waits for a device.

    Args:
        terms, extra: by name; those that are not in ``places`` come back as they are.
        places: the loss of a term, and where the cells lie that it compares.
    """
    if dist.world_size() == 1:
        return terms, extra
    counted = {name: overlap_count(at, bt) for name, (loss, at, bt) in places.items() if loss.counts_positions}
    if not counted:
        return terms, extra
    mine = torch.tensor([*counted.values()], dtype=torch.float64)
    factors = dict(zip(counted, (mine / dist.average(mine).clamp(min=1 / dist.world_size())).tolist(), strict=True))
    first, second = ({name: term * factors.get(name, 1.0) for name, term in some.items()} for some in (terms, extra))
    return first, second


def _there(tensor: Tensor | None, teacher: str) -> Tensor:
    if tensor is None:
        raise TypeError(f"teacher {teacher!r} or its head left out an output that its spec promises")
    return tensor
