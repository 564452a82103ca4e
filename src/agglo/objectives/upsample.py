"""Training an upsampler: what it says of an image must explain what the teacher says of views of it (METHOD 4.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agglo import dist
from agglo.data.shifts import RenderedBatch
from agglo.data.views import generator
from agglo.nn.homography import CORNERS, from_corners, inside_mask, warp
from agglo.nn.placement import Placement
from agglo.objectives.distill import Result, Seen
from agglo.objectives.inspection import check_finite, named
from agglo.objectives.wrapping import Upsampled
from agglo.preprocess import resize
from agglo.recipe import Objective
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features
from agglo.upsamplers.featsharp import FeatSharp

CONSISTENCY = "consistency"
"""The name of the objective's term."""

_VIEWS = 17
"""The stream of random numbers (:func:`agglo.data.views.generator`) that draws homographies."""


def draw_views(keys: Objective, seed: int, step: int, count: int) -> Tensor:
    """Homographies ``(count, 3, 3)`` from views to the image, float64: a pure function of the arguments.

    A view is scaled by ``1 / zoom`` and turned; where it is smaller than the image it lies anywhere in it; then its
    corners move by Gaussian noise, at most 0.45 half sides, so that it never folds over.

    Args:
        keys: of the recipe.
        seed: of the run.
        step: the step.
        count: views of all images together.
    """
    rng = generator(seed, step, 0, _VIEWS)
    low, high = (math.log(zoom) for zoom in keys.zoom)
    half = torch.from_numpy(rng.uniform(-high, -low, count)).exp()
    turn = torch.from_numpy(rng.uniform(-keys.rotation, keys.rotation, count)) * math.pi / 180
    centre = torch.from_numpy(rng.uniform(-1, 1, (count, 1, 2))) * (1 - half).clamp(min=0)[:, None, None]
    noise = rng.standard_normal((count, 4, 2)) * rng.uniform(*keys.perspective, (count, 1, 1))
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).view(-1, 2, 2)
    corners = torch.tensor(CORNERS, dtype=torch.float64) + torch.from_numpy(noise.clip(-0.45, 0.45))
    return from_corners(corners @ rotation.mT * half[:, None, None] + centre)


class Upsample(nn.Module):
    """Multi-view consistency (FeatSharp, arXiv 2502.16025).

    With ``y`` the finer map of an image and ``A_i`` the homography of view ``i``::

        L = mean_i mean_cells w [exp(-v) || D(A_i y) - (N(phi(A_i x)) + b) ||^2 / C + v / 2]

    ``D`` is an attention downsampler: of each 9 x 9 neighbourhood (8 x 8 for even factors) a weighted mean whose
    weights are predicted from the map. ``w`` is larger where a view shows a seam between tiles; ``v`` is a predicted
    log-variance, and does not move the map. Cells that show anything outside the image do not count.

    ``D`` and the network of ``v`` are needed in training only; they are the state of this module.

    Args:
        upsampler: what learns.
        keys: the recipe's ``objective:``.
        seed: of the run.
    """

    seams: Tensor

    def __init__(self, upsampler: FeatSharp, keys: Objective, seed: int = 0) -> None:
        super().__init__()
        self.keys, self.seed, self.size = keys, seed, upsampler.size
        self.normalizer = upsampler.normalizer  # the same one: what is fitted here is fitted there
        self.downsampler = Downsampler(upsampler.channels, upsampler.factor)
        self.uncertainty = _uncertainty(upsampler.channels) if keys.uncertainty else None
        self.register_buffer("seams", _seams(upsampler.grid, upsampler.factor, keys.seam), persistent=False)

    @property
    def needs_statistics(self) -> bool:
        """Whether the normalizer must see the teacher's features before step 0."""
        return not bool(self.normalizer.get_buffer("frozen"))

    def teach(
        self,
        teachers: Mapping[str, Teacher],
        canvas: RenderedBatch,
        size: tuple[int, int],
        stride: int,
        shifts: Sequence[Tensor] | None = None,
    ) -> dict[str, Seen]:
        """What the teacher says of a batch at its own size: what the pre-pass needs (see :meth:`Distill.teach`)."""
        del size, stride, shifts
        found = {}
        for name, teacher in teachers.items():
            with torch.inference_mode():
                features = teacher(resize(canvas.images, self.size))
            found[name] = Seen(
                features.map(lambda x: x.float().clone()), Placement.full(len(canvas.images), (1, 1), self.size)
            )
        return found

    def fit(self, batches: Iterable[Mapping[str, Seen]]) -> list[str]:
        """The pre-pass: estimate PHI-S from maps of the teacher, then freeze it.

        Returns:
            What to know of the statistics, a line each.

        Raises:
            ConfigError: there was not one batch; the teacher's maps are not finite, constant or too few.
        """
        name, count = "", 0
        for batch in batches:
            maps = {name: Features(None, _map(seen.features)) for name, seen in batch.items()}
            check_finite(maps, f"pre-pass, batch {count}")
            count += 1
            for name, seen in maps.items():
                named(name, self.normalizer.update, _map(seen))
        if not count:
            raise ConfigError("the pre-pass saw no image: targets.estimate_images must cover at least one batch")
        return named(name, self.normalizer.freeze)

    def forward(self, upsampler: FeatSharp, teacher: Teacher, images: Tensor, *, step: int = 0) -> Result:
        """The objective on one batch.

        Args:
            upsampler: what learns; its normalizer is frozen.
            teacher: frozen, at its own size.
            images: RGB ``(B, 3, u H, u W)`` in [0, 1].
            step: decides the views.

        Returns:
            The loss, and ``consistency``: the plain mean squared error, whatever weighs the loss.
        """
        upsampler.check(images)
        batch, count = len(images), self.keys.views
        matrix = draw_views(self.keys, self.seed, step, dist.world_size() * batch * count)[
            dist.local_slice(batch * count)
        ]
        matrix = matrix.to(images.device)
        repeated = images.repeat_interleave(count, 0)
        with torch.no_grad():
            views = resize(warp(repeated, matrix, upsampler.larger), upsampler.size)
            said = _map(teacher(views))
        looks = upsampler.encode(teacher, images)
        found = upsampler.sharpen(images, looks)
        seen = self.downsampler(warp(found.repeat_interleave(count, 0), matrix, upsampler.finer))
        error = (seen - upsampler.clean(said)).square().mean(1, keepdim=True)
        factor = upsampler.factor
        shown = inside_mask(matrix, upsampler.finer).to(error)
        mask = (F.avg_pool2d(shown, factor) > 1 - 1e-3).to(error)
        weight = mask * F.avg_pool2d(warp(self.seams.expand(len(matrix), -1, -1, -1), matrix, upsampler.finer), factor)
        # Few cells that count must not make the loss larger than many would.
        counted = dist.average(mask.sum())
        total = counted.clamp(min=mask.numel() / 2)
        loss = (weight * error).sum() / total
        plain = (mask * error).sum().detach() / counted.clamp(min=1)
        if self.uncertainty is not None:
            variance = self.uncertainty(found.detach())
            there = F.avg_pool2d(warp(variance.repeat_interleave(count, 0), matrix, upsampler.finer), factor)
            loss = (weight * (error * (-there).exp() + there / 2)).sum() / total
        return Result(loss, {CONSISTENCY: plain})

    def fold(self, model: FeatSharp) -> FeatSharp:
        """The upsampler as it is used: it keeps its normalizer, so there is nothing to fold."""
        return model


class Downsampler(nn.Module):
    """From the finer grid to the teacher's: at each cell a softmax over a neighbourhood, predicted from the map.

    Weights come from the map blurred by ``exp(-sqrt(2) d^2)`` on 5 x 5 cells. At the start the weights are a Gaussian
    around the cell, of about its size. In training a fifth of the neighbours is left out at random.

    Args:
        channels: C.
        factor: u, the stride.
        drop: share of neighbours left out.
    """

    blur: Tensor

    def __init__(self, channels: int, factor: int, drop: float = 0.2) -> None:
        super().__init__()
        self.factor, self.drop = factor, drop
        self.side = max(9 if factor % 2 else 8, factor)  # as even as the factor: centred on the coarse cell
        self.side += (self.side - factor) % 2
        self.logits = nn.Conv2d(channels, self.side**2, self.side, stride=factor, bias=False)
        nn.init.zeros_(self.logits.weight)
        axis = torch.arange(self.side) - (self.side - 1) / 2
        squared = axis[:, None].square() + axis[None].square()
        self.taps = nn.Parameter((-squared / (2 * (factor / 2) ** 2)).view(1, -1, 1, 1))
        near = torch.arange(5) - 2.0
        blur = (-math.sqrt(2) * (near[:, None].square() + near[None].square())).exp()
        self.register_buffer("blur", (blur / blur.sum()).view(1, 1, 5, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, u h, u w)`` to ``(B, C, h, w)``."""
        channels = x.shape[1]
        edge = (self.side - self.factor) // 2
        blurred = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), self.blur.expand(channels, -1, -1, -1),
                           groups=channels)  # fmt: skip
        logits = self.logits(F.pad(blurred, (edge,) * 4, mode="replicate")) + self.taps
        if self.training:
            logits = logits.masked_fill(
                dist.uniform(logits.shape, device=logits.device, dtype=logits.dtype) < self.drop, -1e4
            )
        padded = F.pad(x, (edge,) * 4, mode="replicate")
        # A neighbour at a time: all of them at once would be side^2 maps.
        out, weights = torch.zeros_like(x[:, :, :: self.factor, :: self.factor]), logits.softmax(1)
        height, width = out.shape[-2:]
        for index in range(self.side**2):
            y, x_ = divmod(index, self.side)
            tap = padded[:, :, y : y + height * self.factor : self.factor, x_ : x_ + width * self.factor : self.factor]
            out = out + weights[:, index : index + 1] * tap
        return out


def take_apart(teachers: Mapping[str, Teacher]) -> tuple[dict[str, Teacher], FeatSharp]:
    """The one teacher of a recipe that trains an upsampler, at its own size, and the upsampler.

    Raises:
        ConfigError: more than one teacher, or none whose upsampler learns.
    """
    if len(teachers) != 1:
        raise ConfigError(
            f"objective: upsample trains the upsampler of one teacher; `teachers:` has {', '.join(teachers)}"
        )
    ((name, teacher),) = teachers.items()
    if not isinstance(teacher, Upsampled) or not isinstance(teacher.upsampler, FeatSharp):
        raise ConfigError(f"objective: upsample needs teachers.{name}.upsampler, of a kind that learns: featsharp")
    return {name: teacher.teacher}, teacher.upsampler.requires_grad_(True)


def _map(features: Features) -> Tensor:
    if features.spatial is None:
        raise TypeError("the teacher left out the map that its spec promises")
    return features.spatial


def _uncertainty(channels: int) -> nn.Sequential:
    """A network from the finer map to a log-variance that is 0 at the start."""
    last = nn.Conv2d(256, 1, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(channels, 256, 5, padding=2), nn.GELU(), last)


def _seams(grid: Sequence[int], factor: int, weight: float) -> Tensor:
    """``(1, 1, u h, u w)`` of mean 1: larger in the cells on both sides of each border between tiles."""
    beside = []
    for cells in grid:
        index = torch.arange(cells * factor)
        at_start, at_end = (index % cells == 0) & (index > 0), (index % cells == cells - 1) & (index < len(index) - 1)
        beside.append(at_start | at_end)
    seams = torch.where(beside[0][:, None] | beside[1][None], weight, 1.0)
    return (seams / seams.mean())[None, None]
