"""Losses between maps of different views, and the statistics that normalizers and losses need of their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agglo import dist
from agglo.losses.base import Loss
from agglo.nn.placement import Placement, align_to_common_grid, overlap_count
from agglo.normalizers.base import Normalizer
from agglo.objectives.base import Targets, check_finite, required, with_teacher_name
from agglo.types import ConfigError, Features


def fit_statistics(
    normalizers: Mapping[str, Normalizer],
    summary_losses: Mapping[str, Loss],
    spatial_losses: Mapping[str, Loss],
    batches: Iterable[Targets],
) -> list[str]:
    """Estimate the statistics of normalizers and losses, each by target name, and freeze them.

    Normalizers come first: spatial losses see normalised maps, at every second cell of each axis.

    Returns:
        Notes for the user (too few samples, no Hadamard matrix), one line each.

    Raises:
        ConfigError: no batch; targets with a loss that are not finite, constant or too few.
    """
    summaries: dict[str, list[Tensor]] = {n: [] for n, loss in summary_losses.items() if loss.needs_statistics}
    maps: dict[str, list[Tensor]] = {n: [] for n, loss in spatial_losses.items() if loss.needs_statistics}
    count = 0
    for batch in batches:
        targets = {
            name: Features(
                target.features.summary if name in summary_losses else None,
                target.features.spatial if name in spatial_losses else None,
            )
            for name, target in batch.items()
        }
        check_finite(targets, f"pre-pass, batch {count}")
        count += 1
        for name, normalizer in normalizers.items():
            if normalizer.needs_statistics and name in targets:
                with_teacher_name(name, normalizer.update, required(targets[name].spatial, name))
        for name in summaries.keys() & targets:
            summaries[name].append(required(targets[name].summary, name).cpu())
        for name in maps.keys() & targets:
            maps[name].append(required(targets[name].spatial, name)[:, :, ::2, ::2].cpu())
    check_count(count)
    notes: list[str] = []
    for name, normalizer in normalizers.items():
        if normalizer.needs_statistics:
            notes += with_teacher_name(name, normalizer.freeze)
    for name, kept in summaries.items():
        notes += with_teacher_name(name, summary_losses[name].fit, torch.cat(kept))
    for name, kept in maps.items():
        normalizer = normalizers[name]
        normalized = [normalizer(part.to(normalizer.mean.device)).cpu().permute(0, 2, 3, 1) for part in kept]
        cells = torch.cat([part.flatten(0, 2) for part in normalized])
        notes += with_teacher_name(name, spatial_losses[name].fit, cells)
    return list(dict.fromkeys(notes))


def check_count(batches: int) -> None:
    """Refuse a pre-pass without a batch.

    Raises:
        ConfigError: ``batches`` is 0.
    """
    if not batches:
        raise ConfigError("the pre-pass had no image: targets.estimate_images must cover at least one batch")


def compare(measure: Callable[..., Tensor], a: Tensor, at: Placement, b: Tensor, bt: Placement) -> Tensor:
    """``measure`` of two maps on the cells that both views cover.

    The resampled maps are recomputed in the backward pass, one comparison at a time, so that at most one teacher's
    resampled map is held in memory, whatever the balancer does with the terms.

    Args:
        measure: of two maps and a mask (:class:`agglo.losses.base.Loss`).
        a, at: a prediction ``(B, C, h, w)`` and the placement of its cells; gradients flow through it.
        b, bt: a target ``(B, C, h', w')``.
    """

    def on_common_cells(a: Tensor, b: Tensor) -> Tensor:
        return measure(*align_to_common_grid(a, at, b, bt))

    if not (torch.is_grad_enabled() and a.requires_grad):
        return on_common_cells(a, b)
    return checkpoint(on_common_cells, a, b, use_reentrant=False, preserve_rng_state=False)


def weigh_by_positions(
    terms: dict[str, Tensor], placements: Mapping[str, tuple[Loss, Placement, Placement]]
) -> dict[str, Tensor]:
    """Scale terms so that their mean over processes is the mean over all positions: ``W n_r / sum_r n_r`` times each.

    ``W`` is the number of processes and ``n_r`` the positions of process r, which follow from the placements, so no
    device is synchronised.

    Args:
        terms: by name; those that are not in ``placements`` are returned unchanged.
        placements: the loss of a term, and the placements of the cells that it compares.
    """
    if dist.world_size() == 1:
        return terms
    counted = {name: overlap_count(at, bt) for name, (loss, at, bt) in placements.items() if loss.counts_positions}
    if not counted:
        return terms
    mine = torch.tensor([*counted.values()], dtype=torch.float64)
    factors = dict(zip(counted, (mine / dist.average(mine).clamp(min=1 / dist.world_size())).tolist(), strict=True))
    return {name: term * factors.get(name, 1.0) for name, term in terms.items()}
