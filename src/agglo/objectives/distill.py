"""Multi-teacher distillation: ``L = sum_t w_summary L_summary + w_spatial L_spatial`` (METHOD 2.11)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agglo.config import build
from agglo.losses.base import Loss
from agglo.model import Model
from agglo.nn.geometry import align
from agglo.normalizers.base import Normalizer
from agglo.preprocess import resize
from agglo.recipe import Recipe
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec

Targets = Mapping[str, Features]


def build_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The recipe's teachers, by name, frozen and in eval mode."""
    teachers = {}
    for name, entry in recipe.teachers.items():
        teacher = build("teachers", entry.teacher, where=f"teachers.{name}")
        teachers[name] = teacher.requires_grad_(False).eval()
    return teachers


@dataclass(frozen=True, slots=True)
class Result:
    """One evaluation of the objective: the scalar to minimise, and its terms by name, detached."""

    loss: Tensor
    terms: Mapping[str, Tensor]


class Distill(nn.Module):
    """Normalizers, losses and balancer of every teacher: turns teacher features and student output into one scalar.

    The teachers themselves are not part of the module's state: they are frozen and never saved.

    Args:
        recipe: the run.
        specs: what each teacher returns.
    """

    def __init__(self, recipe: Recipe, specs: Mapping[str, FeatureSpec]) -> None:
        super().__init__()
        weights: dict[str, float] = {}
        # Module dictionaries that are read as plain ones: pyright cannot know what a ModuleDict holds.
        self.normalizers: dict[str, Normalizer] = nn.ModuleDict()  # type: ignore[assignment]
        self.summary_losses: dict[str, Loss] = nn.ModuleDict()  # type: ignore[assignment]
        self.spatial_losses: dict[str, Loss] = nn.ModuleDict()  # type: ignore[assignment]
        for name, entry in recipe.teachers.items():
            spec = specs[name]
            if spec.summary is not None and entry.summary_weight > 0:
                weights[f"{name}/summary"] = entry.summary_weight
                self.summary_losses[name] = build("losses", recipe.losses.summary, where="losses.summary")
            if spec.spatial is not None and entry.spatial_weight > 0:
                weights[f"{name}/spatial"] = entry.spatial_weight
                self.spatial_losses[name] = build("losses", recipe.losses.spatial, where="losses.spatial")
                self.normalizers[name] = build(
                    "normalizers", recipe.targets.normalizer, spec.spatial, where="targets.normalizer"
                )
        self.balancer = build("balancers", recipe.balancer, weights, where="balancer")

    @property
    def needs_statistics(self) -> bool:
        """Whether a pre-pass must show the targets' distribution before step 0."""
        fitted = [*self.normalizers.values()]
        losses = [*self.summary_losses.values(), *self.spatial_losses.values()]
        return any(n.needs_statistics for n in fitted) or any(loss.needs_statistics for loss in losses)

    def teach(
        self, teachers: Mapping[str, Teacher], images: Tensor, size: tuple[int, int], stride: int
    ) -> dict[str, Features]:
        """What the teachers say of a batch: one forward pass each, under inference mode.

        Args:
            teachers: by name.
            images: ``(B, 3, H, W)`` in [0, 1], at least as large as what the student sees.
            size: ``(H, W)`` that the student sees; each teacher chooses its own from it.
            stride: the student's.
        """
        out = {}
        for name, teacher in teachers.items():
            with torch.inference_mode():
                features = teacher(resize(images, teacher.input_size(size, stride)))
            # Inference tensors may not be saved for backward, so what leaves the teacher is an ordinary copy.
            out[name] = features.map(lambda x: x.float().clone())
        return out

    def fit(self, batches: Iterable[Targets]) -> None:
        """The pre-pass (D-3, D-6): estimate every statistic from teacher features, then freeze.

        Raises:
            ConfigError: there was not one batch.
        """
        summaries: dict[str, list[Tensor]] = {n: [] for n, loss in self.summary_losses.items() if loss.needs_statistics}
        cells: dict[str, list[Tensor]] = {n: [] for n, loss in self.spatial_losses.items() if loss.needs_statistics}
        seen = False
        for targets in batches:
            seen = True
            for name, normalizer in self.normalizers.items():
                if normalizer.needs_statistics:
                    normalizer.update(_there(targets[name].spatial, name))
            for name, kept in summaries.items():
                kept.append(_there(targets[name].summary, name).cpu())
            for name, kept in cells.items():
                kept.append(_there(targets[name].spatial, name)[:, :, ::2, ::2].cpu())
        if not seen:
            raise ConfigError("the pre-pass saw no image: targets.estimate_images must cover at least one batch")
        for normalizer in self.normalizers.values():
            if normalizer.needs_statistics:
                normalizer.freeze()
        for name, kept in summaries.items():
            self.summary_losses[name].fit(torch.cat(kept))
        for name, kept in cells.items():
            normalizer = self.normalizers[name]
            normalized = [normalizer(part.to(normalizer.mean.device)).cpu().permute(0, 2, 3, 1) for part in kept]
            self.spatial_losses[name].fit(torch.cat([part.flatten(0, 2) for part in normalized]))

    def forward(self, model: Model, images: Tensor, targets: Targets, *, heads_only: bool = False) -> Result:
        """The objective on one batch.

        Args:
            model: the student with its heads, predicting in normalised space (D-2).
            images: ``(B, 3, H, W)`` in [0, 1], of a legal size.
            targets: what :meth:`teach` returned for the same images.
            heads_only: let no gradient into the student.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not heads_only):
            features = model.encode(images)
        terms: dict[str, Tensor] = {}
        for name, heads in model.heads.items():
            predicted, target = heads(features), targets[name]
            if name in self.summary_losses:
                terms[f"{name}/summary"] = self.summary_losses[name](
                    _there(predicted.summary, name), _there(target.summary, name)
                )
            if name in self.spatial_losses:
                # Project first, then bring to the common grid (D-1); targets are normalised on their native grid.
                wanted = self.normalizers[name](_there(target.spatial, name))
                pair = align(_there(predicted.spatial, name), wanted)
                terms[f"{name}/spatial"] = self.spatial_losses[name](*pair)
        return Result(self.balancer(terms), {name: term.detach() for name, term in terms.items()})

    @torch.no_grad()
    def fold(self, model: Model) -> Model:
        """Fold the normalizers into the spatial heads, in place: they answer in teacher space from then on."""
        for name, normalizer in self.normalizers.items():
            head = model.heads[name].spatial
            if head is not None:
                head.fold(normalizer.unwhiten, normalizer.mean)
        return model


def _there(tensor: Tensor | None, teacher: str) -> Tensor:
    if tensor is None:
        raise TypeError(f"teacher {teacher!r} or its head left out an output that its spec promises")
    return tensor
