"""RADIO's attention head for maps."""

from __future__ import annotations

from torch import Tensor, nn

from agglo.heads.base import Head
from agglo.heads.mlp import Mlp
from agglo.nn.blocks import Block
from agglo.types import ConfigError

_LAYER_SCALE = 1e-5
"""Initial layer scale: a new head is almost its MLP alone."""


class Attention(Head):
    """Transformer blocks on the patch tokens, then an :class:`~agglo.heads.mlp.Mlp` "v2" (docs/method.md, 1.4, "attn").

    The blocks have the source's width, an MLP four times as wide, layer scales, no bias in ``qkv`` and no position
    embedding. Since positions attend to one another, a map must be one image without padding.

    Args:
        source: input channels, a multiple of ``heads``.
        target: output channels.
        blocks: number of transformer blocks.
        heads: attention heads of each block.
        hidden: hidden width of the MLP after the blocks.
        inner: residual blocks of that MLP.
        upsample: u of that MLP: output maps are u times finer.

    Raises:
        ConfigError: ``source`` is not a multiple of ``heads``, or ``upsample`` is below 1.
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
            raise ConfigError(f"heads: {heads} does not divide {source} channels; nearest is `heads: {near}`")
        self.source, self.target = source, target
        self.blocks = nn.ModuleList(
            Block(source, heads, 4 * source, qkv_bias=False, layer_scale=_LAYER_SCALE) for _ in range(blocks)
        )
        self.mlp = Mlp(source, target, hidden=hidden, inner=inner, upsample=upsample)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, source, H, W)`` to ``(B, target, u*H, u*W)``.

        Raises:
            ConfigError: ``x`` is not a map.
        """
        if x.ndim != 4:
            raise ConfigError(
                f"an attention head takes maps (B, {self.source}, H, W), not {tuple(x.shape)}; "
                "use a head of kind mlp for summaries"
            )
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.mlp(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))

    def fold(self, matrix: Tensor, mean: Tensor) -> None:
        """See :meth:`agglo.heads.mlp.Mlp.fold`."""
        self.mlp.fold(matrix, mean)
