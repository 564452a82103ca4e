"""The nouns of agglo: what models return, what they promise to return, and where a view lies in its image.

Conventions of the whole package: images are RGB floats in [0, 1] of shape ``(B, 3, H, W)``; sizes are ``(H, W)``;
points are ``(x, y)`` in pixels with pixel centres at ``+0.5``; boxes are ``xyxy``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class AggloError(Exception):
    """Base of every error agglo raises on purpose: its message names the next move."""


class ConfigError(AggloError, ValueError):
    """A recipe, an override or a model's configuration does not fit; names the key and the nearest legal one."""


class ImageError(AggloError, ValueError):
    """One image cannot be used. Loops over many images skip it, count it and name it.

    Args:
        name: the image's name or path.
        why: the reason, as a phrase ("truncated after 312 of 4096 bytes").
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name
        self.why = why

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.name, self.why)


class AssetError(AggloError, RuntimeError):
    """A bundled or downloaded file is missing or is not what its sha256 says."""


class StorageError(AggloError, OSError):
    """Weights could not be written (a full disk, a read-only folder); what was there before is as it was."""


class MissingExtraError(AggloError, ImportError):
    """An optional dependency is not installed; the message holds the line that installs it."""


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """What a student, a head or a teacher returns.

    Args:
        summary: width of the summary vector, or None where the model has no notion of one (HOG, SAM).
        spatial: channels of the spatial map, or None where the model has none (a text-aligned pooled head).
        stride: pixels of input per cell of the spatial map.
        step: side lengths must be a multiple of this many pixels (1: any size is legal).
        slots: the summary is the concatenation of this many class tokens of ``summary // slots`` channels each.
    """

    summary: int | None
    spatial: int | None
    stride: int = 1
    step: int = 1
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Features:
    """One image batch, encoded. The only thing students, heads and teachers return.

    Args:
        summary: ``(B, D)``, or None where the model's spec says so.
        spatial: ``(B, D', H, W)``, or None where the model's spec says so.

    Of clips, a model returns both with the frames behind the batch: ``(B, T, D)`` and ``(B, T, D', H, W)``.
    """

    summary: Tensor | None
    spatial: Tensor | None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Features:
        """Apply ``fn`` to each tensor that is there."""
        return replace(
            self,
            summary=None if self.summary is None else fn(self.summary),
            spatial=None if self.spatial is None else fn(self.spatial),
        )

    def tokens(self) -> Tensor:
        """The spatial map as a row-major sequence ``(B, H*W, D')``; of clips ``(B, T, H*W, D')``."""
        if self.spatial is None:
            raise ValueError("these features have no spatial map")
        return self.spatial.flatten(-2).transpose(-1, -2)


@dataclass(frozen=True, slots=True)
class Output(Features):
    """What a :class:`agglo.Model` returns: the backbone's features, and each head's by teacher name."""

    heads: Mapping[str, Features] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class View:
    """An axis-aligned view of a source image (METHOD 6.3): ``p = scale * X + offset`` per axis, in continuous pixels.

    Args:
        size: ``(H, W)`` of the view's canvas.
        scale: ``(sx, sy)`` canvas pixels per source pixel.
        offset: ``(x, y)`` canvas position of the source's corner (0, 0).
        flip: mirrored left to right after cropping.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]
    flip: bool = False

    def to_view(self, x: float, y: float) -> tuple[float, float]:
        """Source point ``(x, y)`` in canvas pixels."""
        u = self.scale[0] * x + self.offset[0]
        return (self.size[1] - u if self.flip else u), self.scale[1] * y + self.offset[1]

    def to_source(self, u: float, v: float) -> tuple[float, float]:
        """Canvas point ``(u, v)`` in source pixels; the inverse of :meth:`to_view`."""
        u = self.size[1] - u if self.flip else u
        return (u - self.offset[0]) / self.scale[0], (v - self.offset[1]) / self.scale[1]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The canvas in source pixels, ``xyxy``; may reach outside the image."""
        x0, y0 = -self.offset[0] / self.scale[0], -self.offset[1] / self.scale[1]
        return x0, y0, x0 + self.size[1] / self.scale[0], y0 + self.size[0] / self.scale[1]
