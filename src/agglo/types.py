"""Types of the whole package: errors, features and their specification, and the geometry of a view.

Conventions: images are RGB floats in [0, 1] of shape ``(B, 3, H, W)``; sizes are ``(H, W)``; points are ``(x, y)`` in
pixels with pixel centres at ``+0.5``; boxes are ``xyxy``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class AggloError(Exception):
    """Base of agglo's errors. The message has the offending value and the next move."""


class ConfigError(AggloError, ValueError):
    """A recipe, an override or a model's configuration is invalid."""


class ImageError(AggloError, ValueError):
    """One image cannot be used. Loops over many images skip, count and report it.

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
    """A bundled, downloaded or saved file is missing or damaged, or holds other content than expected."""


class StorageError(AggloError, OSError):
    """Files could not be written (a full disk, a read-only folder); earlier files are unchanged."""


class MissingExtraError(AggloError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Shape of the features that a student, a head or a teacher returns.

    Args:
        summary: width of the summary vector, or None if there is none (HOG, SAM).
        spatial: channels of the spatial map, or None if there is none (a text-aligned pooled head).
        stride: input pixels per cell of the spatial map.
        step: input sides must be a multiple of this many pixels; 1 for any size.
        slots: number of class tokens, of ``summary // slots`` channels each, that form the summary.
    """

    summary: int | None
    spatial: int | None
    stride: int = 1
    step: int = 1
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Features:
    """Features of an image batch, as returned by students, heads and teachers.

    Args:
        summary: ``(B, D)``, or None; ``(B, T, D)`` for clips.
        spatial: ``(B, D', H, W)``, or None; ``(B, T, D', H, W)`` for clips.
    """

    summary: Tensor | None
    spatial: Tensor | None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Features:
        """Apply ``fn`` to each tensor that is not None."""
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
    """The output of :class:`agglo.Model`: the backbone's features, and each head's by teacher name."""

    heads: Mapping[str, Features] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class View:
    """An axis-aligned view of a source image: ``p = scale * X + offset`` per axis, in pixels (docs/method.md, 6.3).

    Args:
        size: ``(H, W)`` of the view.
        scale: ``(sx, sy)`` view pixels per source pixel.
        offset: ``(x, y)`` position of the source's corner (0, 0) in the view.
        flip: mirrored left to right after cropping.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]
    flip: bool = False

    def to_view(self, x: float, y: float) -> tuple[float, float]:
        """Source point ``(x, y)`` in view pixels."""
        u = self.scale[0] * x + self.offset[0]
        return (self.size[1] - u if self.flip else u), self.scale[1] * y + self.offset[1]

    def to_source(self, u: float, v: float) -> tuple[float, float]:
        """View point ``(u, v)`` in source pixels; the inverse of :meth:`to_view`."""
        u = self.size[1] - u if self.flip else u
        return (u - self.offset[0]) / self.scale[0], (v - self.offset[1]) / self.scale[1]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The view in source pixels, ``xyxy``; may extend beyond the image."""
        x0, y0 = -self.offset[0] / self.scale[0], -self.offset[1] / self.scale[1]
        return x0, y0, x0 + self.size[1] / self.scale[0], y0 + self.size[0] / self.scale[1]
