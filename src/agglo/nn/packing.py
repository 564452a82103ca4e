"""Token sequences of several lengths in one tensor, without padding (NaViT, Dehghani et al. 2023, arXiv:2307.06304).

:class:`Packing` restricts attention to each sequence; :class:`Layout` locates prefix and patches of each image and
splits the patches into windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from agglo.nn.windows import from_windows, to_windows


class Packing:
    """Attention over concatenated sequences; each token attends to its own sequence.

    Args:
        lengths: tokens of each sequence. Adjacent sequences of equal length share one call: sort by length.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.runs = [(len(list(run)), length) for length, run in groupby(lengths)]
        """``(count, length)`` of each run of adjacent sequences of equal length."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``(1, heads, N, d)`` each, ``N`` the sum of the lengths, to ``(1, heads, N, d)``."""
        jagged = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        return self._attend_jagged(q, k, v) if jagged else self._attend_runs(q, k, v)

    def _attend_runs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One dense call per run of equal lengths; on a CPU a single call for all is not faster."""
        parts, start = [], 0
        heads, width = q.shape[1], q.shape[3]
        for count, length in self.runs:
            stop = start + count * length
            # (1, heads, count * length, d) -> (count, heads, length, d), and back
            query, key, value = (t[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for t in (q, k, v))
            part = F.scaled_dot_product_attention(query, key, value)
            parts.append(part.permute(0, 2, 1, 3).reshape(count * length, heads, width))
            start = stop
        return torch.cat(parts).transpose(0, 1)[None]

    def _attend_jagged(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One variable-length flash-attention call."""
        offsets = torch.tensor([0, *self.lengths], device=q.device).cumsum(0)
        lo, hi = min(self.lengths), max(self.lengths)
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                t[0].transpose(0, 1).contiguous(), offsets, min_seqlen=lo, max_seqlen=hi
            ).transpose(1, 2)
            for t in (q, k, v)
        )
        found = F.scaled_dot_product_attention(q, k, v)
        return found.transpose(1, 2).values().transpose(0, 1)[None]


@dataclass(frozen=True)
class Layout:
    """Positions of images' tokens in a batch ``(B, P + L, C)`` of one grid, or a pack ``(1, sum(P + L_i), C)``.

    Args:
        prefix: P, class and register tokens before the patches of every image.
        grids: ``(h, w)`` of each image of a pack; the one grid of a batch.
        packed: whether the images are concatenated along the second axis.
    """

    prefix: int
    grids: tuple[tuple[int, int], ...]
    packed: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image, prefix included."""
        return tuple(self.prefix + height * width for height, width in self.grids)

    def packing(self) -> Packing | None:
        """The packing that separates the images in attention; None for a batch."""
        return Packing(self.lengths) if self.packed else None

    def images(self, x: Tensor) -> list[Tensor]:
        """The tokens of each image of a pack, ``(1, P + L_i, C)``; for a batch, the batch itself."""
        return list(x.split(self.lengths, dim=1)) if self.packed else [x]

    def split_windows(self, x: Tensor, window: int) -> tuple[list[Tensor], Tensor]:
        """Separate the prefix and split the patches into windows.

        Returns:
            The prefixes ``(b, P, C)``, and all windows ``(n, window^2, C)``.
        """
        images = self.images(x)
        windows = [to_windows(i[:, self.prefix :], g, window) for i, g in zip(images, self.grids, strict=True)]
        return [i[:, : self.prefix] for i in images], windows[0] if len(windows) == 1 else torch.cat(windows)

    def join_windows(self, prefixes: list[Tensor], windows: Tensor, window: int) -> Tensor:
        """The inverse of :meth:`split_windows`."""
        counts = [p.shape[0] * g[0] * g[1] // (window * window) for p, g in zip(prefixes, self.grids, strict=True)]
        parts: list[Tensor] = []
        for prefix, part, grid in zip(prefixes, windows.split(counts), self.grids, strict=True):
            parts += [prefix, from_windows(part, grid, window)]
        return torch.cat(parts, dim=1)
