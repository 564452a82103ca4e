"""RADIO's attention head, for maps."""

from __future__ import annotations

from torch import Tensor, nn

from agglo.heads.base import Head
from agglo.heads.mlp import Mlp
from agglo.nn.blocks import Block
from agglo.types import ConfigError

_LAYER_SCALE = 1e-5
"""Initial layer scale: a new head starts almost as its MLP alone."""


class Attention(Head):
    """Transformer blocks on the patch tokens, then an :class:`~agglo.heads.mlp.Mlp` "v2" (docs/method.md, 1.4, "attn").

    The blocks keep the source's width, have an MLP four times as wide, layer scales, no bias in ``qkv`` and no position
    embedding of their own. Positions see one another: a map must be one whole image, without padding, and there is no
    such head for summaries.

    Args:
        source: input channels, a multiple of ``heads``.
        target: output channels.
        blocks: how many transformer blocks.
        heads: attention heads of each block.
        hidden: width inside the MLP behind the blocks.
        inner: residual blocks of that MLP.
        upsample: u of that MLP: maps come out u times finer.

    Raises:
        ConfigError: ``source`` is no multiple of ``heads``, or ``upsample`` is below 1.
    """

    def __init__(
        self,
        source: int,
        target: int,
        /,
        *,
        blocks: int = 2,
        heads: int = 16,
        hidden: int = 512,
        inner: int = 0,
        upsample: int = 1,
    ) -> None:
        super().__init__()
        if heads < 1 or source % heads:
            near = min((n for n in range(1, source + 1) if source % n == 0), key=lambda n: abs(n - heads))
            raise ConfigError(
                f"{source} channels do not split into {heads} attention heads: nearest is `heads: {near}`"
            )
        self.source, self.target = source, target
        self.blocks = nn.ModuleList(
            Block(source, heads, 4 * source, qkv_bias=False, layer_scale=_LAYER_SCALE) for _ in range(blocks)
        )
        self.mlp = Mlp(source, target, hidden=hidden, inner=inner, upsample=upsample)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, source, H, W)`` to ``(B, target, u*H, u*W)``.

        Raises:
            ConfigError: ``x`` is no map.
        """
        if x.ndim != 4:
            raise ConfigError(
                f"an attention head reads maps (B, {self.source}, H, W), not {tuple(x.shape)}: "
                "give summaries a head of kind mlp"
            )
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.mlp(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))

    def fold(self, matrix: Tensor, mean: Tensor) -> None:
        """Into the MLP's last linear, see :meth:`~agglo.heads.mlp.Mlp.fold`."""
        self.mlp.fold(matrix, mean)
