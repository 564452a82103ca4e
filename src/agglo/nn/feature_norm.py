"""Normalizers of a model's own features, part of some RADIO checkpoints (PHI-S, arXiv:2410.01680)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureNormalizer(nn.Module):
    """``y = tx (x - mean)`` at every position of a map.

    Args:
        width: C.
    """

    mean: Tensor
    tx: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("tx", torch.eye(width))

    def forward(self, spatial: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return _rotate(spatial - self.mean[:, None, None].to(spatial), self.tx)


class IntermediateNormalizer(nn.Module):
    """``y_i = R_i (x_i - mean_i)`` for the map after block ``i``, and a scale ``alpha_i``.

    Args:
        depth: N, number of blocks.
        width: C.
        per_block: one rotation per block instead of one for all.
    """

    alphas: Tensor
    means: Tensor
    rotation: Tensor

    def __init__(self, depth: int, width: int, *, per_block: bool = False) -> None:
        super().__init__()
        self.register_buffer("alphas", torch.ones(depth))
        self.register_buffer("means", torch.zeros(depth, width))
        self.register_buffer(
            "rotation", torch.eye(width).expand(depth, -1, -1).clone() if per_block else torch.eye(width)
        )

    def centre(self, spatial: Tensor, block: int) -> Tensor:
        """``x_i - mean_i``, ``(B, C, H, W)``."""
        return spatial - self.means[block][:, None, None].to(spatial)

    def rotate(self, spatial: Tensor, block: int) -> Tensor:
        """``R_i x``, ``(B, C, H, W)``."""
        return _rotate(spatial, self.rotation if self.rotation.ndim == 2 else self.rotation[block])


def _rotate(spatial: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("dc,bchw->bdhw", matrix.to(spatial), spatial)
