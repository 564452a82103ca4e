"""FeatSharp: one pass guided by the image, tiles for detail, a learned bias against what is locked to positions."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from agglo.config import build
from agglo.preprocess import resize
from agglo.types import AssetError, ConfigError, Features, FeatureSpec, StorageError
from agglo.upsamplers._parts import Fusion, Guided, primes
from agglo.upsamplers._tiling import split, stitch
from agglo.upsamplers.base import Upsampler

if TYPE_CHECKING:
    from agglo.normalizers.base import Normalizer
    from agglo.teachers.base import Teacher

BIAS_GAIN = 10.0
"""The learned map times this is what is added: it must grow as large as the features while the rest moves a little."""

_FILE, _CONFIG = "upsampler.safetensors", "upsampler.json"


@dataclass(frozen=True, slots=True)
class Looks:
    """What a teacher says of an image at its own size and of the tiles of the larger one, in its own space.

    Args:
        summary: ``(B, D)`` of the small image, or None.
        low: ``(B, C, h, w)`` of the small image.
        tiles: ``(B u u, C, h, w)`` of the tiles.
    """

    summary: Tensor | None
    low: Tensor
    tiles: Tensor


class FeatSharp(Upsampler):
    """Guided upsampling and tiles, fused by local attention (FeatSharp, arXiv 2502.16025; METHOD 4.1).

    Everything happens in PHI-S space. With ``N`` the normalizer and ``b`` a learned map of the teacher's own grid::

        low   = N(phi(x_small)) + b
        tiles = stitch(N(phi(x_tile)) + b) + e        e: one learned vector a tile
        U     = joint bilateral upsampling of low, guided by the pixels, one stage a prime factor of u
        y     = W block([U, tiles]),   then N^-1          W: begins as the mean of both

    ``b`` has no mean over positions and is the same wherever the teacher looks, so all it can take up is what the
    teacher says of a position whatever the image: it takes the fixed pattern out, of the plain pass (:meth:`plain`)
    too. The block is a residual one with
    7 x 7 attention on the finer grid and a SwiGLU of ``4 C``; half of its heads fade with the distance in rows, half
    with that in columns.

    Args:
        spec: of the teacher.
        size: of the teacher.
        factor: u.
        weights: folder of a run that trained it (or of its ``model/``); null for one that has learned nothing.
        heads: of the fusion, or the largest number below that divides its width of ``2 C``.

    Raises:
        ConfigError: the weights are of another teacher or factor, or there are none.
        AssetError: they are damaged.
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
            raise ConfigError(f"heads: at least 1; got {heads}")
        width = self.channels
        self.normalizer: Normalizer = build("normalizers", {"kind": "phi_s"}, width)
        self.bias = nn.Parameter(torch.zeros(width, *self.grid))
        self.tile_bias = nn.Parameter(torch.zeros(width, factor, factor))
        self.guided = nn.ModuleList(Guided(prime) for prime in primes(factor))
        self.fusion = Fusion(2 * width, next(n for n in range(min(heads, 2 * width), 0, -1) if 2 * width % n == 0))
        if weights is not None:
            self._load(Path(weights).expanduser())

    @property
    def trained(self) -> bool:  # type: ignore[override]
        """Whether there are statistics and, with them, weights."""
        return bool(self.normalizer.get_buffer("frozen"))

    def forward(self, teacher: Teacher, images: Tensor) -> Features:
        self.check(images)
        looks = self.look(teacher, images)
        return Features(looks.summary, self.normalizer.inverse(self.sharpen(images, looks)))

    def plain(self, teacher: Teacher, images: Tensor) -> Features:
        """The teacher at its own size, without its fixed pattern."""
        found = teacher(images)
        return Features(found.summary, self.normalizer.inverse(self.clean(found.spatial)))

    def look(self, teacher: Teacher, images: Tensor) -> Looks:
        """All that the teacher is asked, in one pass over ``1 + u^2`` images of its size for each of ``images``."""
        count = len(images)
        both = torch.cat([resize(images, self.size), split(images, self.factor)])
        with torch.no_grad():
            found = teacher(both)
        summary = None if found.summary is None else found.summary[:count]
        return Looks(summary, found.spatial[:count], found.spatial[count:])

    def clean(self, spatial: Tensor) -> Tensor:
        """A map of the teacher's, ``(B, C, h, w)``, in PHI-S space and without its fixed pattern."""
        # An offset that is the same everywhere is locked to no position, and nothing would hold it in place.
        locked = self.bias - self.bias.mean((1, 2), keepdim=True)
        return self.normalizer(spatial) + BIAS_GAIN * locked

    def sharpen(self, images: Tensor, looks: Looks) -> Tensor:
        """The finer map ``(B, C, u h, u w)`` in PHI-S space; differentiable in everything that learns."""
        guided = self.clean(looks.low)
        for stage in self.guided:
            guided = stage(guided, images)
        tiles = stitch(self.clean(looks.tiles), self.factor)
        by_tile = self.tile_bias.repeat_interleave(self.grid[0], 1).repeat_interleave(self.grid[1], 2)
        return self.fusion(torch.cat([guided, tiles + by_tile], 1))

    # --- what was learned, as a folder ---

    def config(self) -> dict[str, object]:
        """What must agree between weights and the place they go to."""
        return {
            "kind": "featsharp", "factor": self.factor, "channels": self.channels, "size": list(self.size),
            "stride": self.spec.stride, "heads": self.fusion.heads,
        }  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """Write ``upsampler.safetensors`` and ``upsampler.json``, each whole or not at all.

        Raises:
            StorageError: the disk is full or the folder read-only.
        """
        folder = Path(folder)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # As bytes, so that the file is as readable as any other: safetensors' own files are for their owner alone.
            (folder / f"{_FILE}.partial").write_bytes(serialize(state, metadata={"format": "pt"}))
            (folder / f"{_CONFIG}.partial").write_text(json.dumps(self.config(), indent=2) + "\n", encoding="utf-8")
            for name in (_FILE, _CONFIG):
                (folder / f"{name}.partial").replace(folder / name)
        except (SafetensorError, OSError) as error:
            with contextlib.suppress(OSError):
                (folder / f"{_FILE}.partial").unlink(missing_ok=True)  # a full disk needs the room
            raise StorageError(f"{folder} cannot be written ({error}): free some space or name another") from None
        return folder

    def _load(self, given: Path) -> None:
        folder = next((f for f in (given, given / "model") if (f / _FILE).is_file() and (f / _CONFIG).is_file()), None)
        if folder is None:
            raise ConfigError(
                f"weights: {given} holds no trained FeatSharp ({_CONFIG} and {_FILE}, there or in model/): name the "
                "folder of a run with `objective: {kind: upsample}`"
            )
        try:
            written, state = json.loads((folder / _CONFIG).read_text(encoding="utf-8")), load_file(folder / _FILE)
        except (SafetensorError, OSError, ValueError) as error:
            raise AssetError(f"{folder} cannot be read ({error}): train it again, or name another folder") from None
        here = self.config()
        differing = [f"{k}: {written.get(k)} there, {v} here" for k, v in here.items() if written.get(k) != v]
        if differing:
            raise ConfigError(f"weights: {folder} is of another teacher or factor ({'; '.join(differing)})")
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise AssetError(f"{folder} is damaged ({str(error).splitlines()[-1].strip()}): train it again") from None
