"""Features to bytes and back: float32 unchanged; float16, bfloat16 and int8 in PHI-S space (arXiv:2410.01680).

PHI-S rotates a map so that every channel has variance 1, so one quantisation step per cell suits all its channels: int8
stores ``round(z / s)`` with ``s = max|z| / 127`` over a cell's channels. PHI-S is a rotation times a scalar, so an
error has the same size relative to the features' spread in both spaces. Summaries are small and stay float32.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from agglo.normalizers.phi_s import PhiS
from agglo.types import ConfigError, Features, FeatureSpec

DTYPES = ("fp32", "fp16", "bf16", "int8")
_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
_LEVELS = 127


@dataclass(frozen=True, slots=True)
class Distortion:
    """The error of coding.

    Args:
        relative: root mean square error over the root mean square distance of cells from their mean.
        worst: the largest error of a cell, on the same scale.
        images: number of images measured.
    """

    relative: float
    worst: float
    images: int


class Coding(nn.Module):
    """Encodes and decodes one teacher's features.

    Args:
        spec: of the teacher.
        dtype: one of :data:`DTYPES`.
    """

    def __init__(self, spec: FeatureSpec, dtype: str) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"dtype of a feature cache must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self.spec, self.dtype = spec, dtype
        self.normalizer = PhiS(spec.spatial) if spec.spatial is not None and dtype != "fp32" else None

    @property
    def needs_statistics(self) -> bool:
        """Whether :meth:`update` and :meth:`freeze` must be called before :meth:`encode`."""
        return self.normalizer is not None

    def bytes(self, grid: tuple[int, int]) -> int:
        """Bytes of one image's payload."""
        return sum(self._lengths(grid))

    def _lengths(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """Bytes of summary, quantisation steps and map."""
        cells = grid[0] * grid[1]
        spatial = cells * (self.spec.spatial or 0) * _TORCH[self.dtype].itemsize
        scales = 4 * cells if self.dtype == "int8" and self.spec.spatial else 0
        return 4 * (self.spec.summary or 0), scales, spatial

    def update(self, features: Features) -> None:
        """Add a batch to the estimate of the PHI-S rotation.

        Raises:
            ValueError: a feature is not finite.
        """
        if self.normalizer is not None:
            self.normalizer.update(_required(features.spatial).float())

    def freeze(self) -> None:
        """Fix the PHI-S rotation.

        Raises:
            ValueError, RuntimeError: constant features, or none.
        """
        if self.normalizer is not None:
            with warnings.catch_warnings():
                # Any rotation codes well, even from few images or without a Hadamard matrix.
                warnings.simplefilter("ignore")
                self.normalizer.freeze()

    @torch.no_grad()
    def encode(self, features: Features) -> np.ndarray:
        """Payloads of a batch, uint8 ``(B, bytes)`` on the CPU."""
        parts = []
        if self.spec.summary is not None:
            parts.append(_bytes(_required(features.summary).float()))
        if self.spec.spatial is not None:
            spatial = _required(features.spatial).float()
            if self.normalizer is not None:
                spatial = self.normalizer(spatial)
            if self.dtype == "int8":
                scale = spatial.abs().amax(1, keepdim=True) / _LEVELS
                parts.append(_bytes(scale))
                spatial = (spatial / torch.where(scale > 0, scale, 1)).round()
            parts.append(_bytes(spatial.to(_TORCH[self.dtype])))
        return torch.cat(parts, 1).cpu().numpy()

    @torch.no_grad()
    def decode(self, rows: Tensor, grid: tuple[int, int]) -> Features:
        """Features in the teacher's own space, float32.

        Args:
            rows: payloads, uint8 ``(B, bytes)``, on any device.
            grid: ``(h, w)`` of the map.
        """
        lengths = self._lengths(grid)
        first, scales, last = (
            rows[:, start : start + length]
            for start, length in zip((0, lengths[0], lengths[0] + lengths[1]), lengths, strict=True)
        )
        summary = _numbers(first, torch.float32) if self.spec.summary is not None else None
        if self.spec.spatial is None:
            return Features(summary, None)
        spatial = _numbers(last, _TORCH[self.dtype]).unflatten(1, (self.spec.spatial, *grid)).float()
        if self.dtype == "int8":
            spatial = spatial * _numbers(scales, torch.float32).unflatten(1, (1, *grid))
        if self.normalizer is not None:
            spatial = self.normalizer.inverse(spatial)
        return Features(summary, spatial)

    @torch.no_grad()
    def measure(self, features: Features) -> Distortion:
        """The error of coding these features."""
        images = len(_required(features.summary if features.spatial is None else features.spatial))
        if features.spatial is None or self.dtype == "fp32":
            return Distortion(0.0, 0.0, images)
        grid = (features.spatial.shape[-2], features.spatial.shape[-1])
        rows = torch.from_numpy(self.encode(features)).to(features.spatial.device)
        truth = features.spatial.double()
        squared = (_required(self.decode(rows, grid).spatial).double() - truth).square().sum(1)
        spread = (truth - truth.mean((0, 2, 3), keepdim=True)).square().sum(1).mean()
        return Distortion(math.sqrt(float(squared.mean() / spread)), math.sqrt(float(squared.amax() / spread)), images)


def _bytes(x: Tensor) -> Tensor:
    """``(B, ...)`` to uint8 ``(B, bytes)``."""
    return x.flatten(1).contiguous().view(torch.uint8)


def _numbers(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 ``(B, bytes)`` to ``(B, n)``; the copy aligns the bytes."""
    return rows.contiguous().clone().view(dtype) if dtype.itemsize > 1 else rows.contiguous().view(dtype)


def _required(x: Tensor | None) -> Tensor:
    if x is None:
        raise TypeError("the teacher returned None for an output that its spec promises")
    return x
