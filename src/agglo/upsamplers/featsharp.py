"""FeatSharp: a guided low-resolution pass, tiles for detail, and a learned bias that removes positional artefacts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn import functional as F

from agglo.config import build
from agglo.files import write_bytes, write_json
from agglo.nn.blocks import SwiGlu
from agglo.nn.neighbourhood import local_attention
from agglo.preprocess import resize
from agglo.types import AssetError, ConfigError, Features, FeatureSpec, StorageError
from agglo.upsamplers.base import FrozenTeacher, Upsampler
from agglo.upsamplers.tiles import split, stitch

RADIUS = 3
"""Both attentions cover 7 x 7 cells."""

LAYER_SCALE = 1e-2
"""Initial scale of attention and SwiGLU: small, so that training begins at the mean of both maps."""

BIAS_GAIN = 10.0
"""Factor of the learned bias, which must reach the scale of the features while other parameters hardly change."""

_FILE, _CONFIG = "upsampler.safetensors", "upsampler.json"


@dataclass(frozen=True, slots=True)
class TiledFeatures:
    """Teacher features of images at its own size and of the tiles of the larger images.

    Args:
        summary: ``(B, D)`` of the small image, or None.
        low: ``(B, C, h, w)`` of the small image.
        tiles: ``(B u u, C, h, w)`` of the tiles.
    """

    summary: Tensor | None
    low: Tensor
    tiles: Tensor


class FeatSharp(Upsampler):
    """Guided upsampling and tiles, fused by local attention (FeatSharp, arXiv:2502.16025; docs/method.md, 4.1).

    All in PHI-S space. With ``N`` the normalizer and ``b`` a learned map of the teacher's own grid::

        low   = N(phi(x_small)) + b
        tiles = stitch(N(phi(x_tile)) + b) + e        e: one learned vector per tile
        U     = joint bilateral upsampling of low, guided by the pixels, one stage per prime factor of u
        y     = W block([U, tiles]),   then N^-1          W: initially the mean of both

    ``b`` has zero mean over positions and is the same for every input, so it can only learn what the teacher adds at a
    position for all images: it removes this fixed pattern, from the plain pass (:meth:`plain`) too. The block is
    residual, with 7 x 7 attention on the finer grid and a SwiGLU of ``4 C``; half of its heads decay with the distance
    in rows, half with the distance in columns.

    Args:
        spec: of the teacher.
        size: of the teacher, ``(H, W)`` in pixels.
        factor: u, ratio of the finer grid to the teacher's.
        weights: folder of the run that trained it (or its ``model/``); null for untrained weights.
        heads: of the fusion; reduced to the next divisor of its width ``2 C``.

    Raises:
        ConfigError: no weights in the folder, or those of another teacher or factor.
        AssetError: damaged weights.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        size: tuple[int, int],
        /,
        *,
        factor: int = 2,
        weights: str | None = None,
        heads: int = 16,
    ) -> None:
        super().__init__(spec, size, factor)
        if heads < 1:
            raise ConfigError(f"heads: must be at least 1, got {heads}")
        width = self.channels
        self.normalizer = build("normalizers", {"kind": "phi_s"}, width)
        self.bias = nn.Parameter(torch.zeros(width, *self.grid))
        self.tile_bias = nn.Parameter(torch.zeros(width, factor, factor))
        self.guided = nn.ModuleList(Guided(prime) for prime in primes(factor))
        self.fusion = Fusion(2 * width, next(n for n in range(min(heads, 2 * width), 0, -1) if 2 * width % n == 0))
        if weights is not None:
            self._load(Path(weights).expanduser())

    @property
    def trained(self) -> bool:  # type: ignore[override]
        """Whether the statistics, and with them the weights, are there."""
        return bool(self.normalizer.get_buffer("frozen"))

    def forward(self, teacher: FrozenTeacher, images: Tensor) -> Features:
        self.check(images)
        features = self.encode(teacher, images)
        return Features(features.summary, self.normalizer.inverse(self.sharpen(images, features)))

    def plain(self, teacher: FrozenTeacher, images: Tensor) -> Features:
        """The teacher at its own size, without its fixed pattern."""
        features = teacher(images)
        return Features(features.summary, self.normalizer.inverse(self.clean(features.spatial)))

    def encode(self, teacher: FrozenTeacher, images: Tensor) -> TiledFeatures:
        """Run the teacher once on ``1 + u^2`` images of its size per image."""
        count = len(images)
        both = torch.cat([resize(images, self.size), split(images, self.factor)])
        with torch.no_grad():
            features = teacher(both)
        summary = None if features.summary is None else features.summary[:count]
        return TiledFeatures(summary, features.spatial[:count], features.spatial[count:])

    def clean(self, spatial: Tensor) -> Tensor:
        """A teacher's map ``(B, C, h, w)`` in PHI-S space, without its fixed pattern."""
        # A constant offset is not positional, and no loss would constrain it.
        locked = self.bias - self.bias.mean((1, 2), keepdim=True)
        return self.normalizer(spatial) + BIAS_GAIN * locked

    def sharpen(self, images: Tensor, features: TiledFeatures) -> Tensor:
        """The finer map ``(B, C, u h, u w)`` in PHI-S space; differentiable in all parameters."""
        guided = self.clean(features.low)
        for stage in self.guided:
            guided = stage(guided, images)
        tiles = stitch(self.clean(features.tiles), self.factor)
        by_tile = self.tile_bias.repeat_interleave(self.grid[0], 1).repeat_interleave(self.grid[1], 2)
        return self.fusion(torch.cat([guided, tiles + by_tile], 1))

    # --- files ---

    def config(self) -> dict[str, object]:
        """The options that must agree with those of loaded weights."""
        return {
            "kind": "featsharp", "factor": self.factor, "channels": self.channels, "size": list(self.size),
            "stride": self.spec.stride, "heads": self.fusion.heads,
        }  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Write ``upsampler.safetensors`` and ``upsampler.json`` atomically.

        Raises:
            StorageError: the disk is full or the folder read-only.
        """
        folder = Path(folder)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        try:
            # As bytes: files that safetensors writes itself are readable by their owner only.
            write_bytes(folder / _FILE, serialize(state, metadata={"format": "pt"}))
            write_json(folder / _CONFIG, self.config())
        except (SafetensorError, OSError) as error:
            raise StorageError(f"{folder} cannot be written ({error}): free some space or use another folder") from None
        return folder

    def _load(self, given: Path) -> None:
        folder = next((f for f in (given, given / "model") if (f / _FILE).is_file() and (f / _CONFIG).is_file()), None)
        if folder is None:
            raise ConfigError(
                f"weights: {given} holds no trained FeatSharp ({_CONFIG} and {_FILE}, also in model/): use the folder "
                "of a run with `objective: {kind: upsample}`"
            )
        try:
            written, state = json.loads((folder / _CONFIG).read_text(encoding="utf-8")), load_file(folder / _FILE)
        except (SafetensorError, OSError, ValueError) as error:
            raise AssetError(f"{folder} cannot be read ({error}): train it again, or use another folder") from None
        here = self.config()
        differing = [f"{k}: {written.get(k)} instead of {v}" for k, v in here.items() if written.get(k) != v]
        if differing:
            raise ConfigError(f"weights: {folder} is of another teacher or factor ({'; '.join(differing)})")
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise AssetError(f"{folder} is damaged ({str(error).splitlines()[-1].strip()}): train it again") from None


# --- blocks -----------------------------------------------------------------------------------------------------------


class Guided(nn.Module):
    """One stage of joint bilateral upsampling (Kopf et al. 2007; learned as in FeatUp, arXiv:2403.10516).

    ``y_i = sum_j w_ij x_j / sum_j w_ij`` over the 7 x 7 cells around ``i`` of the bilinear map ``x``, with
    ``w_ij = exp(e^tau g_i . g_j) exp(-|i - j|^2 / 2 sigma^2)`` and ``g`` a small network on the colours of the cells: a
    softmax over the sum of both exponents. Distances are in units of the radius.

    Args:
        factor: of this stage.
        width: of ``g``.
    """

    offsets: Tensor

    def __init__(self, factor: int, width: int = 32) -> None:
        super().__init__()
        self.factor = factor
        self.colours = nn.Sequential(nn.Conv2d(3, width, 1), nn.GELU(), nn.Conv2d(width, width, 1))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.log_sigma = nn.Parameter(torch.tensor(1 / RADIUS).log())  # one cell of the finer grid
        axis = torch.arange(-RADIUS, RADIUS + 1) / RADIUS
        self.register_buffer("offsets", axis[:, None].square() + axis[None].square(), persistent=False)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        """``(B, C, h, w)`` and RGB ``(B, 3, H, W)`` in [0, 1] to ``(B, C, factor h, factor w)``."""
        grid = x.shape[-2] * self.factor, x.shape[-1] * self.factor
        finer = F.interpolate(x, grid, mode="bilinear", align_corners=False)
        guide = F.normalize(self.colours(F.adaptive_avg_pool2d(images, grid) * 2 - 1), dim=1)
        key, value = (t.permute(0, 2, 3, 1)[:, None] for t in (guide, finer))
        bias = -self.offsets / (2 * (2 * self.log_sigma).exp())
        found = local_attention(key * self.temperature.exp(), key, value, bias[None])
        return found[:, 0].permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """A residual block with local attention on two concatenated maps, then a linear mix, initially their mean.

    No norms: in PHI-S space every channel has the same variance.

    Args:
        width: channels of both maps together.
        heads: must divide the width.
    """

    distances: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = SwiGlu(width, 2 * width)
        self.scales = nn.Parameter(torch.full((2, width), LAYER_SCALE))
        self.mix = nn.Conv2d(width, width // 2, 1, bias=False)
        eye = torch.eye(width // 2)
        with torch.no_grad():
            self.mix.weight.copy_(torch.cat([eye, eye], 1)[:, :, None, None] / 2)
        axis = torch.arange(-RADIUS, RADIUS + 1).abs().float()
        rows, columns = axis[:, None].expand(-1, len(axis)), axis[None].expand(len(axis), -1)
        slopes = [2.0 ** -((head + 2) // 2) for head in range(heads)]
        distances = [-slope * (columns if head % 2 else rows) for head, slope in enumerate(slopes)]
        self.register_buffer("distances", torch.stack(distances), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width, H, W)`` to ``(B, width / 2, H, W)``."""
        x = x.permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        parts = self.qkv(x).view(batch, height, width, 3, self.heads, channels // self.heads)
        q, k, v = parts.permute(3, 0, 4, 1, 2, 5)
        found = local_attention(q * (channels // self.heads) ** -0.5, k, v, self.distances)
        x = x + self.scales[0] * self.proj(found.permute(0, 2, 3, 1, 4).flatten(3))
        x = x + self.scales[1] * self.mlp(x)
        return self.mix(x.permute(0, 3, 1, 2))


def primes(number: int) -> list[int]:
    """The prime factors, ascending."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found
