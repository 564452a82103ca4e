"""The contract of an upsampler: a finer map from a frozen teacher and a larger image (docs/method.md, 4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from agglo.types import ConfigError, Features, FeatureSpec

FrozenTeacher = Callable[[Tensor], Any]
"""RGB images ``(B, 3, H, W)`` in [0, 1] of the teacher's own size to its :class:`agglo.types.Features`."""


class Upsampler(nn.Module, ABC):
    """Maps an image of ``factor`` times the teacher's size to ``factor`` times its grid.

    A kind's constructor takes the teacher's ``spec`` and ``size`` positionally, and the key ``factor``. The frozen
    teacher is not part of the module; it is passed to every call.

    Attributes:
        spec: what the teacher returns at its own size.
        size: the teacher's ``(H, W)`` in pixels.
        grid: its ``(h, w)`` in cells.
        factor: u.
        trained: False for a kind that must be trained and is not yet.
    """

    trained: bool = True

    def __init__(self, spec: FeatureSpec, size: tuple[int, int], factor: int) -> None:
        super().__init__()
        if factor < 2:
            raise ConfigError(f"factor: must be at least 2, got {factor}")
        if spec.spatial is None or size[0] % spec.stride or size[1] % spec.stride:
            raise ConfigError(
                f"an upsampler needs a teacher with a map of whole cells; this one has {spec.spatial or 'no'} channels "
                f"and {size[0]}x{size[1]} pixels in cells of {spec.stride}"
            )
        self.spec, self.size, self.factor = spec, size, factor
        self.channels = spec.spatial
        self.grid = size[0] // spec.stride, size[1] // spec.stride

    @property
    def larger(self) -> tuple[int, int]:
        """Input size ``(u H, u W)`` of :meth:`forward` in pixels."""
        return self.size[0] * self.factor, self.size[1] * self.factor

    @property
    def finer(self) -> tuple[int, int]:
        """Output grid ``(u h, u w)`` of :meth:`forward` in cells."""
        return self.grid[0] * self.factor, self.grid[1] * self.factor

    @abstractmethod
    def forward(self, teacher: FrozenTeacher, images: Tensor) -> Features:
        """A finer map of larger images, in the teacher's own space.

        Args:
            teacher: the frozen teacher.
            images: RGB ``(B, 3, u H, u W)`` in [0, 1].

        Returns:
            ``spatial (B, C, u h, u w)``; ``summary`` of the image at the teacher's own size.

        Raises:
            ConfigError: the images have another size.
        """

    def plain(self, teacher: FrozenTeacher, images: Tensor) -> Features:
        """The teacher at its own size, ``(B, 3, H, W)``, minus any artefact that this kind has learned to remove."""
        return teacher(images)

    def save(self, folder: str | Path) -> Path:
        """Write the trained weights; raises :class:`TypeError` for a kind without any."""
        raise TypeError(f"{type(self).__name__} has no trained weights to save")

    def check(self, images: Tensor) -> None:
        """Raise :class:`ConfigError` if images are not ``(B, 3, u H, u W)``."""
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[-2:]) != self.larger:
            raise ConfigError(
                f"images are {tuple(images.shape)}; this upsampler takes RGB of {self.larger[0]}x{self.larger[1]} "
                f"pixels, {self.factor} times the teacher's {self.size[0]}x{self.size[1]}"
            )
