"""E-RADIO: convolutions at high resolution, windowed attention at low."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agglo.preprocess import check_size
from agglo.students._eradio_attention import AttentionOptions, AttentionStage, RelativeBias
from agglo.students._eradio_convs import ConvBN, CrossStage, Downsample, Level, Neck, Projection, ResidualConv, Stem
from agglo.students.base import Student
from agglo.types import ConfigError, Features, FeatureSpec

STEP = 32
"""Image sides must be multiples of the last stage's stride, in pixels."""
LARGEST_WINDOW = 16


class Hybrid(Student):
    """E-RADIO (arXiv:2312.06709): four stages at strides 4, 8, 16, 32, each twice as wide as the last.

    Stages 0 and 1 are convolutional, 2 and 3 use windowed attention. The neck sums the maps of the later stages; its
    mean is the summary of all teachers. ``agglo/checkpoints/eradio.py`` has the options of the published networks.

    Maps of stages 2 and 3 are upsampled to a multiple of ``max(ratios) * window`` cells, which costs time:
    :meth:`set_optimal_window` avoids that.

    Args:
        tokens: names of the teachers; there is one summary for all of them.
        width: C of stage 0.
        stem_width: width between the stem's two convolutions.
        depths: blocks of each stage.
        heads: attention heads of stages 2 and 3.
        windows: windows of stages 2 and 3 in cells, one for each of its ``ratios``; the first for the rest.
        ratios: sub-sampling ratios of stages 2 and 3; each block is a chain of one attention block per ratio.
        csp: stages 0 and 1 are cross-stage partial (as released), else chains of residual blocks.
        conv_resample: attention sub-samples by strided convolutions, else by averages with nearest upsampling.
        group_ratio: groups of the convolution before full-resolution attention, relative to the width: 0 is dense, 1
            depth-wise, -1 none.
        bias_hidden: hidden width of the MLP of the attention bias.
        mlp: ``gelu`` or ``swiglu``.
        layer_scale: initial layer scale of attention and MLP; null for none.
        conv_layer_scale: initial layer scale of residual convolutional blocks; null for none.
        multi_query: all attention heads share one key and one value head.
        shift: windows of every second block of a stage are shifted by half a window.
        tile_stem: the stem stacks 4x4 tiles of the image instead of its first convolution.
        tile_downsample: downsampling stacks 2x2 tiles of the map.
        neck_start: first stage that the neck uses; the stride of the output is ``4 * 2**neck_start``.
        neck_width: D of the output.
    """

    def __init__(
        self,
        tokens: tuple[str, ...] = (),
        /,
        *,
        width: int = 16,
        stem_width: int = 16,
        depths: tuple[int, int, int, int] = (1, 1, 2, 2),
        heads: tuple[int, int] = (2, 4),
        windows: tuple[tuple[int, ...], tuple[int, ...]] = ((7,), (7,)),
        ratios: tuple[tuple[int, ...], tuple[int, ...]] = ((2, 1), (1,)),
        csp: bool = True,
        conv_resample: bool = True,
        group_ratio: float = 0.0,
        bias_hidden: int = 64,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        layer_scale: float | None = None,
        conv_layer_scale: float | None = None,
        multi_query: bool = False,
        shift: bool = False,
        tile_stem: bool = False,
        tile_downsample: bool = False,
        neck_start: int = 2,
        neck_width: int = 128,
    ) -> None:
        super().__init__()
        del tokens  # one summary serves every teacher: a mean has no slots
        widths = [width * 2**stage for stage in range(4)]
        _check(widths, depths, heads, windows, ratios, neck_start)
        options = AttentionOptions(bias_hidden, conv_resample, group_ratio, layer_scale, mlp, multi_query)
        stages: list[nn.Module] = []
        for w, depth in zip(widths[:2], depths[:2], strict=True):
            residual = (ResidualConv(w, conv_layer_scale) for _ in range(depth))
            stages.append(CrossStage(w, depth) if csp else nn.Sequential(*residual))
        for i in (0, 1):
            w, depth = widths[2 + i], depths[2 + i]
            stages.append(AttentionStage(w, depth, heads[i], windows[i], ratios[i], shift, options))
        self.patch_embed = Stem(stem_width, width, tiles=tile_stem)
        downsamples = [Downsample(w, tiles=tile_downsample) for w in widths[:3]]
        self.levels = nn.ModuleList(map(Level, stages, [*downsamples, None]))
        self.high_res_neck = Neck(widths, neck_start, neck_width)
        self.spec = FeatureSpec(neck_width, neck_width, stride=4 * 2**neck_start, step=STEP)
        self.deployed = self.window_changed = False
        self.apply(_initialize)
        self.to(memory_format=torch.channels_last)  # faster convolutions on CPUs and tensor cores

    def forward(self, images: Tensor) -> Features:
        """See :meth:`Student.forward`."""
        check_size(images.shape[-2], images.shape[-1], self.spec.step)
        x = self.patch_embed(images.contiguous(memory_format=torch.channels_last))
        maps = []
        for level in self.levels:
            stage, x = level(x)
            maps.append(stage)
        spatial = self.high_res_neck(maps)
        return Features(summary=spatial.mean((2, 3)), spatial=spatial)

    def settings(self) -> dict[str, object]:
        """No settings.

        Raises:
            ValueError: the window was changed or the norms were folded, which a saved model cannot express.
        """
        if self.deployed:
            raise ValueError("a deployed student cannot be saved: save before student.deploy()")
        if self.window_changed:
            raise ValueError("a changed window cannot be saved: save before student.change_window()")
        return {}

    def change_window(self, window: int) -> None:
        """Change the window of all attention blocks; offsets keep the scale of the trained window.

        Args:
            window: side in cells.

        Raises:
            ValueError: ``window`` is not positive.
            RuntimeError: the network is deployed, so that its attention bias is constant.
        """
        if window < 1:
            raise ValueError(f"window: {window} is less than 1 cell; the trained window suits most images")
        if self.deployed:
            raise RuntimeError("a deployed network cannot change its window: load it again, change it before deploy()")
        for module in self.modules():
            if isinstance(module, RelativeBias):
                self.window_changed |= module.window != window
                module.window = window

    def set_optimal_window(self, side: int) -> int:
        """Set the largest window, up to 16, that fits square images of ``side`` pixels without upsampling their maps.

        Sides with few divisors give small windows: 544 px are 17 cells of 32, which only windows of 1 divide.

        Returns:
            The window: the largest divisor of ``side // 32`` that is 16 or less.

        Raises:
            ValueError: ``side`` is less than 32.
            RuntimeError: the network is deployed.
        """
        cells = side // STEP
        if cells < 1:
            raise ValueError(f"side: {side} px is too small; the smallest legal side is {STEP}")
        window = max(divisor for divisor in range(1, LARGEST_WINDOW + 1) if cells % divisor == 0)
        self.change_window(window)
        return window

    def deploy(self) -> None:
        """Convert to an inference network, in place: fold norms into convolutions, compute attention biases once.

        A deployed network cannot be trained or saved. The biases stored in released checkpoints are not used.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, ConvBN | Projection):
                module.deploy()
            elif isinstance(module, RelativeBias):
                module.freeze()
        self.to(memory_format=torch.channels_last)  # loaded weights may have another memory format
        self.deployed = True

    def train(self, mode: bool = True) -> Hybrid:
        """See :meth:`torch.nn.Module.train`; raises a RuntimeError if the network is deployed."""
        if mode and self.deployed:
            raise RuntimeError("a deployed network cannot be trained: build or load it again")
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        if self.deployed:
            raise RuntimeError("a deployed network cannot load weights: build it again, load, then deploy()")
        super()._load_from_state_dict(*args, **options)

    def no_weight_decay(self) -> set[str]:
        """The layer scales, and the MLPs of the attention biases."""
        return {
            name
            for name, _ in self.named_parameters()
            if "cpb_mlp" in name or name.rpartition(".")[-1] in ("gamma", "gamma1", "gamma2")
        }


def _check(
    widths: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    windows: Sequence[Sequence[int]],
    ratios: Sequence[Sequence[int]],
    neck_start: int,
) -> None:
    if len(depths) != 4 or min(depths) < 1:
        raise ConfigError(f"student.depths: {list(depths)} is not four stages of at least one block")
    for key, value in (("heads", heads), ("windows", windows), ("ratios", ratios)):
        if len(value) != 2:
            raise ConfigError(f"student.{key}: {len(value)} entries; needs one for each of stages 2 and 3")
    for width, count in zip(widths[2:], heads, strict=True):
        if count < 1 or width % count:
            legal = [n for n in range(1, width + 1) if width % n == 0]
            near = min(legal, key=lambda n: abs(n - count))
            raise ConfigError(f"student.heads: {count} does not divide a stage's width {width}; {near} does")
    for key, value, least in (("windows", windows, 2), ("ratios", ratios, 1)):
        if not all(entry and min(entry) >= least for entry in value):
            raise ConfigError(f"student.{key}: each of the two stages needs one or more numbers, all at least {least}")
    if not 0 <= neck_start <= 3:
        raise ConfigError(f"student.neck_start: {neck_start} is not a stage; the stages are 0 to 3")


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
