"""Features of many images in one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agglo.types import AggloError


class FeatureError(AggloError, ValueError):
    """A model returned something that cannot be measured (NaN, infinity, a wrong shape); names the image."""


class Rows:
    """Batches of rows, written into memory that is reserved once: a list of them would be held twice when joined.

    They lie in one layout, as features come back from disk: layouts differ in the last bits of every sum over them.

    Args:
        most: rows there can be; memory beyond those that come is never touched.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._filled = 0
        self._memory: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """The next ones."""
        if self._memory is None:
            self._memory = torch.empty(self.most, *rows.shape[1:], dtype=rows.dtype)
        self._memory[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def all(self) -> Tensor | None:
        """All rows so far; None before the first."""
        return None if self._memory is None else self._memory[: self._filled]


def rounded(summary: Tensor, precision: torch.dtype, names: Sequence[str]) -> Tensor:
    """Finite float32 features ``(N, D)`` in another precision.

    Raises:
        FeatureError: it cannot hold them; names the first image concerned.
    """
    if precision == summary.dtype:
        return summary
    found = summary.to(precision)
    bad = ~torch.isfinite(found).all(1)
    if bool(bad.any()):
        raise FeatureError(
            f"the summary features of {names[int(bad.int().argmax())]} are beyond {torch.finfo(precision).max:g}, the "
            "greatest number of half precision: measure with `precision: float32`"
        )
    return found
