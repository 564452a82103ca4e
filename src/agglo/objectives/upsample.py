"""Training of an upsampler by multi-view consistency (FeatSharp, arXiv:2502.16025; docs/method.md, 4.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from agglo import dist
from agglo.data.views import generator
from agglo.nn.homography import CORNERS, from_corners, inside_mask, warp
from agglo.objectives._matching import check_count
from agglo.objectives._wrapping import Upsampled
from agglo.objectives.base import (
    STUDENT_KEYS,
    Objective,
    Result,
    StepContext,
    Targets,
    check_finite,
    required,
    with_teacher_name,
)  # fmt: skip
from agglo.preprocess import resize
from agglo.recipe import Recipe, ordered
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features
from agglo.upsamplers.featsharp import FeatSharp

CONSISTENCY = "consistency"
"""The name of the objective's term."""

_VIEWS = 17
"""The stream of random numbers (:func:`agglo.data.views.generator`) that draws homographies."""

Range = Annotated[tuple[float, float], AfterValidator(ordered)]


class Upsample(Objective):
    """Multi-view consistency of a FeatSharp upsampler.

    With ``y`` the finer map of an image and ``A_i`` the homography of view ``i``::

        L = mean_i mean_cells w [exp(-v) || D(A_i y) - (N(phi(A_i x)) + b) ||^2 / C + v / 2]

    ``D`` is an attention downsampler: a weighted mean over each 9 x 9 neighbourhood (8 x 8 for even factors) with
    weights predicted from the map. ``w`` is larger at seams between tiles; ``v`` is a predicted log-variance, which
    does not change the map. Cells that show anything outside the image do not count. ``D`` and the network of ``v``
    are used in training only.

    Args:
        recipe: the run; its partitions have the one size that the upsampler takes.
        upsampler: what learns.
        teachers: the one teacher, without its upsampler.
        views: views per image and step, at the teacher's size.
        zoom: magnification of a view, log-uniform in this range. FeatSharp's is around 1; with values up to the
            upsampler's factor, views also show the teacher at the higher resolution.
        rotation: largest rotation of a view in degrees, at most 45.
        perspective: standard deviation of the noise on a view's corners, in half sides, uniform in this range.
        seam: weight of cells at a border between tiles, at least 1.
        uncertainty: weight cells by a predicted variance.

    Raises:
        ConfigError: a partition has another size.
    """

    trains_student = False
    unused = STUDENT_KEYS
    untrained_upsampler = True
    needs_targets = False
    example = (
        "student={}", "heads={}", "targets={estimate_images: 16}", "partitions=[{sizes: [64], batch: 2}]",
        "teachers={lite0: {kind: timm, model: tf_efficientnet_lite0, size: 32, summary: false, "
        "upsampler: {kind: featsharp, factor: 2}}}",
        "objective={kind: upsample, views: 2, zoom: [1.5, 2.1]}",
    )  # fmt: skip
    seams: Tensor

    def __init__(
        self,
        recipe: Recipe,
        upsampler: FeatSharp,
        teachers: Mapping[str, Teacher],
        /,
        *,
        views: Annotated[int, Field(gt=0)] = 5,
        zoom: Range = (0.95, 1 / 0.95),
        rotation: Annotated[float, Field(ge=0, le=45)] = 5.0,
        perspective: Range = (0.01, 0.05),
        seam: Annotated[float, Field(ge=1)] = 2.0,
        uncertainty: bool = True,
    ) -> None:
        super().__init__()
        wanted = upsampler.larger[0]
        for index, partition in enumerate(recipe.partitions):
            if partition.sizes != [wanted]:
                raise ConfigError(
                    f"partitions.{index}.sizes: the upsampler takes {wanted} px, {upsampler.factor} times its "
                    f"teacher's {upsampler.size[0]}; set them to [{wanted}]"
                )
        self._teacher = list(teachers.values())  # a list: teachers are not part of the module's state
        self.views, self.zoom, self.rotation, self.perspective = views, zoom, rotation, perspective
        self.seed = recipe.train.seed
        self.normalizer = upsampler.normalizer  # the same module: fitting it here fits the upsampler's
        self.downsampler = Downsampler(upsampler.channels, upsampler.factor)
        self.uncertainty = _uncertainty(upsampler.channels) if uncertainty else None
        self.register_buffer("seams", _seams(upsampler.grid, upsampler.factor, seam), persistent=False)

    @classmethod
    def build_model(
        cls, recipe: Recipe, teachers: Mapping[str, Teacher], *, initialize: bool = True
    ) -> tuple[FeatSharp, dict[str, Teacher]]:
        """The upsampler of the recipe's one teacher, and the teacher without it.

        Raises:
            ConfigError: several teachers, or none with a trainable upsampler.
        """
        del initialize
        if len(teachers) != 1:
            raise ConfigError(f"objective upsample needs one teacher; `teachers:` has {', '.join(teachers)}")
        ((name, teacher),) = teachers.items()
        if not isinstance(teacher, Upsampled) or not isinstance(teacher.upsampler, FeatSharp):
            raise ConfigError(f"objective upsample needs teachers.{name}.upsampler of a trainable kind: featsharp")
        return teacher.upsampler.requires_grad_(True), {name: teacher.teacher}

    @property
    def needs_statistics(self) -> bool:
        """Whether the normalizer must be fitted before the first step."""
        return not bool(self.normalizer.get_buffer("frozen"))

    def fit(self, batches: Iterable[Targets]) -> list[str]:
        """Fit the PHI-S normalizer to maps of the teacher; see :meth:`Objective.fit`."""
        name, count = "", 0
        for batch in batches:
            maps = {name: Features(None, required(each.features.spatial, name)) for name, each in batch.items()}
            check_finite(maps, f"pre-pass, batch {count}")
            count += 1
            for name, each in maps.items():
                with_teacher_name(name, self.normalizer.update, each.spatial)
        check_count(count)
        return with_teacher_name(name, self.normalizer.freeze)

    def draw_views(self, step: int, count: int) -> Tensor:
        """Homographies ``(count, 3, 3)`` from views to the image, float64: a pure function of seed, step and count.

        A view is scaled by ``1 / zoom`` and rotated; a view smaller than the image lies anywhere in it; then its
        corners move by Gaussian noise, clipped to 0.45 half sides, so that it never folds over.

        Args:
            step: the step.
            count: views of all images together.
        """
        rng = generator(self.seed, step, 0, _VIEWS)
        low, high = (math.log(zoom) for zoom in self.zoom)
        half = torch.from_numpy(rng.uniform(-high, -low, count)).exp()
        turn = torch.from_numpy(rng.uniform(-self.rotation, self.rotation, count)) * math.pi / 180
        centre = torch.from_numpy(rng.uniform(-1, 1, (count, 1, 2))) * (1 - half).clamp(min=0)[:, None, None]
        noise = rng.standard_normal((count, 4, 2)) * rng.uniform(*self.perspective, (count, 1, 1))
        rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).view(-1, 2, 2)
        corners = torch.tensor(CORNERS, dtype=torch.float64) + torch.from_numpy(noise.clip(-0.45, 0.45))
        return from_corners(corners @ rotation.mT * half[:, None, None] + centre)

    def forward(
        self,
        model: FeatSharp,
        images: Tensor,
        targets: Targets,
        context: StepContext = StepContext(),  # noqa: B008
    ) -> Result:
        """See :meth:`Objective.forward`. The term ``consistency`` is the unweighted mean squared error.

        Args:
            model: the upsampler; its normalizer is frozen.
            images: RGB ``(B, 3, u H, u W)`` in [0, 1].
            targets: not used: the teacher runs on views that are drawn here.
            context: its step decides the views.
        """
        del targets
        model.check(images)
        (teacher,), count, factor = self._teacher, len(images) * self.views, model.factor
        matrix = self.draw_views(context.step, dist.world_size() * count)[dist.local_slice(count)].to(images.device)
        repeated = images.repeat_interleave(self.views, 0)
        with torch.no_grad():
            views = resize(warp(repeated, matrix, model.larger), model.size)
            wanted = required(teacher(views).spatial, "the teacher")
        looks = model.encode(teacher, images)
        fine = model.sharpen(images, looks)
        coarse = self.downsampler(warp(fine.repeat_interleave(self.views, 0), matrix, model.finer))
        error = (coarse - model.clean(wanted)).square().mean(1, keepdim=True)
        covered = inside_mask(matrix, model.finer).to(error)
        mask = (F.avg_pool2d(covered, factor) > 1 - 1e-3).to(error)
        weight = mask * F.avg_pool2d(warp(self.seams.expand(len(matrix), -1, -1, -1), matrix, model.finer), factor)
        # A batch with few valid cells must not get a larger loss than one with many.
        counted = dist.average(mask.sum())
        total = counted.clamp(min=mask.numel() / 2)
        loss = (weight * error).sum() / total
        plain = (mask * error).sum().detach() / counted.clamp(min=1)
        if self.uncertainty is not None:
            variance = self.uncertainty(fine.detach())
            variance = F.avg_pool2d(warp(variance.repeat_interleave(self.views, 0), matrix, model.finer), factor)
            loss = (weight * (error * (-variance).exp() + variance / 2)).sum() / total
        return Result(loss, {CONSISTENCY: plain})

    @staticmethod
    def no_weight_decay(model: Any) -> set[str]:
        """The learned maps of positions and tiles."""
        return {name for name, parameter in model.named_parameters() if parameter.ndim == 3}

    @staticmethod
    def next_steps(folder: str, model: Any = None) -> str:
        """See :meth:`Objective.next_steps`."""
        del model
        return f"add to the teacher's keys in a recipe:  upsampler: {{kind: featsharp, weights: {folder}}}"


class Downsampler(nn.Module):
    """From the finer grid to the teacher's: per cell, a weighted mean over a neighbourhood.

    The weights are a softmax predicted from the map after a blur by ``exp(-sqrt(2) d^2)`` on 5 x 5 cells; initially
    they are a Gaussian of about the cell's size. In training a random fifth of the neighbours is dropped.

    Args:
        channels: C.
        factor: u, the stride.
        drop: fraction of neighbours dropped in training.
    """

    blur: Tensor

    def __init__(self, channels: int, factor: int, drop: float = 0.2) -> None:
        super().__init__()
        self.factor, self.drop = factor, drop
        self.side = max(9 if factor % 2 else 8, factor)  # of the factor's parity: centred on the coarse cell
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
        # One neighbour at a time: all at once would take side^2 maps of memory.
        out, weights = torch.zeros_like(x[:, :, :: self.factor, :: self.factor]), logits.softmax(1)
        height, width = out.shape[-2:]
        for index in range(self.side**2):
            y, x_ = divmod(index, self.side)
            tap = padded[:, :, y : y + height * self.factor : self.factor, x_ : x_ + width * self.factor : self.factor]
            out = out + weights[:, index : index + 1] * tap
        return out


def _uncertainty(channels: int) -> nn.Sequential:
    """A network from the finer map to a log-variance, initially 0."""
    last = nn.Conv2d(256, 1, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(channels, 256, 5, padding=2), nn.GELU(), last)


def _seams(grid: Sequence[int], factor: int, weight: float) -> Tensor:
    """``(1, 1, u h, u w)`` of mean 1, larger in the cells on both sides of each border between tiles."""
    beside = []
    for cells in grid:
        index = torch.arange(cells * factor)
        at_start, at_end = (index % cells == 0) & (index > 0), (index % cells == cells - 1) & (index < len(index) - 1)
        beside.append(at_start | at_end)
    seams = torch.where(beside[0][:, None] | beside[1][None], weight, 1.0)
    return (seams / seams.mean())[None, None]
