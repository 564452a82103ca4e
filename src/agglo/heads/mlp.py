"""RADIO's MLP heads, "v2" and "v1"."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.heads.base import Head
from agglo.types import ConfigError


class Mlp(Head):
    """``Linear -> n x (x + Linear(GELU(LN(x)))) -> LN -> GELU -> Linear`` (docs/method.md, 1.4, "v2").

    Version "v1" is ``Linear -> LN -> ReLU -> n x (Linear -> LN -> ReLU) -> Linear``. LayerNorms have eps 1e-5, the GELU
    is exact. Applied to vectors, and to maps per position.

    Args:
        source: input channels.
        target: output channels.
        hidden: hidden width.
        inner: n, number of inner blocks (residual in v2).
        pre_norm: LayerNorm and GELU before the first linear (v2 only).
        version: ``v2``, or ``v1`` as in RADIO's first releases.
        upsample: u: the last linear gives ``u x u`` cells per position, channels laid out ``(u1, u2, c)``, so that
            position ``(h, w)`` of a map becomes rows ``h*u + u1`` and columns ``w*u + u2``.

    Raises:
        ConfigError: ``pre_norm`` with v1, or ``upsample`` below 1.
    """

    def __init__(
        self,
        source: int,
        target: int,
        /,
        *,
        hidden: int = 512,
        inner: int = 0,
        pre_norm: bool = False,
        version: Literal["v1", "v2"] = "v2",
        upsample: int = 1,
    ) -> None:
        super().__init__()
        if upsample < 1:
            raise ConfigError(f"upsample: {upsample} is less than 1; 1 keeps the grid")
        if pre_norm and version == "v1":
            raise ConfigError("pre_norm: not available in version v1; omit it or set `version: v2`")
        self.source, self.target = source, target
        self.version, self.upsample = version, upsample
        self.pre = nn.LayerNorm(source) if pre_norm else None
        self.fc1 = nn.Linear(source, hidden)
        self.blocks = nn.ModuleList(_inner(hidden, version) for _ in range(inner))
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, upsample**2 * target)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Head.forward`; a map ``(B, source, H, W)`` becomes ``(B, target, u*H, u*W)``.

        Raises:
            ConfigError: ``x`` is a vector and ``upsample`` is greater than 1.
        """
        if x.ndim == 4:
            return self._refine(self._project(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.upsample > 1:
            raise ConfigError(
                f"a head with `upsample: {self.upsample}` takes maps, not {tuple(x.shape)}: set `upsample: 1`"
            )
        return self._project(x)

    def _project(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = F.gelu(self.pre(x))
        x = self.fc1(x)
        if self.version == "v1":
            x = F.relu(self.norm(x))
            for block in self.blocks:
                x = block(x)
        else:
            for block in self.blocks:
                x = x + block(x)
            x = F.gelu(self.norm(x))
        return self.fc2(x)

    def _refine(self, x: Tensor) -> Tensor:
        """``(B, H, W, u*u*C)`` to ``(B, u*H, u*W, C)``."""
        u = self.upsample
        if u == 1:
            return x
        batch, height, width, _ = x.shape
        cells = x.reshape(batch, height, width, u, u, self.target)
        return cells.transpose(2, 3).reshape(batch, height * u, width * u, self.target)

    @torch.no_grad()
    def fold(self, matrix: Tensor, mean: Tensor) -> None:
        """Set ``W`` to ``matrix W`` and ``b`` to ``matrix b + mean`` for each of the u x u cells, in float64."""
        cells = self.upsample**2
        weight = self.fc2.weight.double().view(cells, self.target, -1)
        bias = self.fc2.bias.double().view(cells, self.target)
        matrix, mean = matrix.to(weight), mean.to(weight)
        self.fc2.weight.copy_((matrix @ weight).flatten(0, 1))
        self.fc2.bias.copy_((bias @ matrix.T + mean).flatten())


def _inner(width: int, version: str) -> nn.Sequential:
    """One block between the first and the last linear."""
    if version == "v1":
        return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())
    return nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width))
