"""The contract of an upsampler: from a frozen teacher of one size and a larger image to a finer map (METHOD 4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from agglo.types import ConfigError, Features, FeatureSpec

if TYPE_CHECKING:
    from agglo.teachers.base import Teacher


class Upsampler(nn.Module, ABC):
    """Looks at an image of ``factor`` times the teacher's size and gives ``factor`` times its grid.

    A kind's constructor takes the teacher's ``spec`` and its ``size`` positionally, and the key ``factor``. The teacher
    is no part of the module: it is frozen, and passed with every call.

    Attributes:
        spec: what the teacher returns at its own size.
        size: the teacher's ``(H, W)`` in pixels.
        grid: its ``(h, w)`` in cells.
        factor: u.
        trained: False for a kind that learns and has not.
    """

    trained: bool = True

    def __init__(self, spec: FeatureSpec, size: tuple[int, int], factor: int) -> None:
        super().__init__()
        if factor < 2:
            raise ConfigError(f"factor: a whole number of at least 2; got {factor}")
        if spec.spatial is None or size[0] % spec.stride or size[1] % spec.stride:
            raise ConfigError(
                f"a teacher with a map of whole cells is needed; this one has {spec.spatial or 'no'} channels and "
                f"{size[0]}x{size[1]} pixels in cells of {spec.stride}"
            )
        self.spec, self.size, self.factor = spec, size, factor
        self.channels = spec.spatial
        self.grid = size[0] // spec.stride, size[1] // spec.stride

    @property
    def larger(self) -> tuple[int, int]:
        """``(u H, u W)`` in pixels: what :meth:`forward` takes."""
        return self.size[0] * self.factor, self.size[1] * self.factor

    @property
    def finer(self) -> tuple[int, int]:
        """``(u h, u w)`` in cells: what :meth:`forward` gives."""
        return self.grid[0] * self.factor, self.grid[1] * self.factor

    @abstractmethod
    def forward(self, teacher: Teacher, images: Tensor) -> Features:
        """A finer map of larger images, in the teacher's own space.

        Args:
            teacher: frozen.
            images: RGB ``(B, 3, u H, u W)`` in [0, 1].

        Returns:
            ``spatial (B, C, u h, u w)``; ``summary`` is the teacher's of the image at its own size.

        Raises:
            ConfigError: the images have another size.
        """

    def plain(self, teacher: Teacher, images: Tensor) -> Features:
        """The teacher at its own size, ``(B, 3, H, W)``; without what this kind knows to be no part of the image."""
        return teacher(images)

    def save(self, folder: str | Path) -> Path:
        """Write what was learned.

        Raises:
            TypeError: this kind learns nothing.
        """
        raise TypeError(f"{type(self).__name__} learns nothing: there is nothing to save")

    def check(self, images: Tensor) -> None:
        """Refuse images that are not ``(B, 3, u H, u W)``.

        Raises:
            ConfigError: names the legal size.
        """
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[-2:]) != self.larger:
            raise ConfigError(
                f"images are {tuple(images.shape)}; this upsampler takes RGB of {self.larger[0]}x{self.larger[1]} "
                f"pixels, {self.factor} times the teacher's {self.size[0]}x{self.size[1]}"
            )
