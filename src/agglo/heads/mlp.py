"""RADIO's "v2" MLP head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo.heads.base import Head


class Mlp(Head):
    """``Linear -> n x (x + Linear(GELU(LN(x)))) -> LN -> GELU -> Linear`` (METHOD 1.4, "v2").

    Works on vectors and, position by position, on maps.

    Args:
        source: input channels.
        target: output channels.
        hidden: m, the width between.
        inner: n, the residual blocks between.
        pre_norm: LayerNorm and GELU before the first linear.
    """

    def __init__(
        self, source: int, target: int, /, *, hidden: int = 512, inner: int = 0, pre_norm: bool = False
    ) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.pre = nn.LayerNorm(source) if pre_norm else None
        self.fc1 = nn.Linear(source, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(inner)
        )
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, target)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Head.forward`."""
        if x.ndim == 4:
            return self._project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._project(x)

    def _project(self, x: Tensor) -> Tensor:
        if self.pre is not None:
            x = F.gelu(self.pre(x))
        x = self.fc1(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc2(F.gelu(self.norm(x)))

    @torch.no_grad()
    def fold(self, matrix: Tensor, mean: Tensor) -> None:
        """``W <- matrix W``, ``b <- matrix b + mean`` in float64, so that nothing is lost on the way."""
        weight, bias = self.fc2.weight.double(), self.fc2.bias.double()
        matrix, mean = matrix.to(weight), mean.to(weight)
        self.fc2.weight.copy_(matrix @ weight)
        self.fc2.bias.copy_(matrix @ bias + mean)
