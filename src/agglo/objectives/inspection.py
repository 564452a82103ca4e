"""Whether what a teacher says can be learned from: numbers, and not the same ones everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from agglo.types import ConfigError, Features

CONSTANT = 1e-6
"""A spread below this is rounding, of features that are the same everywhere."""


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """How much ``(B, C)`` or ``(B, C, H, W)`` varies: the largest range of a channel over its largest magnitude.

    Returns:
        Float32 scalar on the features' device: NaN where anything is not finite, about 0 where every channel is
        constant, infinity where there is one position only, which cannot vary.
    """
    if features.numel() == features.shape[1]:
        return torch.where(torch.isfinite(features).all(), torch.inf, torch.nan).to(features.device)
    over = [axis for axis in range(features.ndim) if axis != 1]
    low, high = features.float().amin(over), features.float().amax(over)
    # Infinity over infinity is NaN; a channel that is 0 everywhere does not vary.
    return ((high - low) / torch.maximum(high.abs(), low.abs()).clamp(min=torch.finfo(torch.float32).tiny)).amax()


def spreads(targets: Mapping[str, Features]) -> dict[str, Tensor]:
    """The :func:`spread` of each teacher's features, as ``<teacher>/summary`` and ``<teacher>/spatial``."""
    found = {}
    for name, features in targets.items():
        for part, tensor in (("summary", features.summary), ("spatial", features.spatial)):
            if tensor is not None:
                found[f"{name}/{part}"] = spread(tensor)
    return found


def check_finite(targets: Mapping[str, Features], where: str) -> None:
    """Refuse features that hold NaN or infinity.

    Args:
        targets: by teacher.
        where: when they were said, for the message.

    Raises:
        ConfigError: names the teacher.
    """
    for name, value in spreads(targets).items():
        teacher, part = name.split("/")
        if bool(value.isnan()):
            raise ConfigError(
                f"teachers.{teacher}: its {part} features hold NaN or infinity ({where}): look at its weights and its "
                "input, and run it in float32 where it is in half precision"
            )


def named(teacher: str, work: Callable[..., None], *arguments: Tensor) -> list[str]:
    """Do it; what goes wrong with the targets is told with the teacher's name.

    Returns:
        What it warned of, a line each, in place of warnings that cannot name the teacher.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            work(*arguments)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"teachers.{teacher}: {error}") from error
    return [f"teachers.{teacher}: {each.message}" for each in caught]
