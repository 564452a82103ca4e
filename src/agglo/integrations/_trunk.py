"""A student behind another library's pixels, and its registration with transformers as a model of its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agglo.config import find
from agglo.decoders.channels import choose
from agglo.decoders.sam3 import tokens
from agglo.extras import require
from agglo.model.model import Model
from agglo.nn.windows import check_window_divides, check_window_value
from agglo.preprocess import resize
from agglo.types import ConfigError, Features, ImageError
from agglo.zoo.loading import load

MODEL_TYPE = "agglo_trunk"
_TOLERANCE = 2e-2
"""Overshoot of pixels beyond [0, 1]: half precision has a spacing of 1/128 near the ends of [-2.7, 2.7]."""


class Installed(NamedTuple):
    """A model on a student, and the processor that makes its pixels."""

    model: Any
    processor: Any


class StudentEncoder(nn.Module):
    """Pixels of another model's processor to the map that its decoder reads.

    Undoes the processor's normalisation, resizes to the student's own input size if the grids differ, encodes, and
    checks the map.

    Args:
        student: an agglo model; or any module that maps RGB ``(B, 3, H, W)`` in [0, 1] to :class:`agglo.Features`, with
            ``spec`` (a teacher, for example).
        options: see :func:`encoder_options`.
    """

    def __init__(self, student: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.student = student
        self.options = dict(options)
        self._constants = _constants(student)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels ``(B, 3, S, S)`` to ``(B, D, g, g)`` float32, with gradients.

        Raises:
            ImageError: other sides than ``size``, or values that the normalisation does not give.
            ConfigError: the student's map has another grid or width.
        """
        options, side = self.options, self.options["size"]
        if pixels.shape[-2:] != (side, side):
            raise ImageError(
                "pixel_values",
                f"are {pixels.shape[-2]}x{pixels.shape[-1]} pixels (HxW) and this trunk was installed for "
                f"{side}x{side}: use the processor that install() returned, or install(..., mode='compatible')",
            )
        images = self._unit_range(pixels.float())
        grid = options["grid"]
        out = self._encode(resize(images, (grid * options["cell"],) * 2))
        found = out.spatial
        if found is None or found.shape[1:] != (options["width"], grid, grid):
            shape = "no map" if found is None else f"a map of {found.shape[1]} x {found.shape[2]} x {found.shape[3]}"
            raise ConfigError(
                f"the student returned {shape}; the decoder reads {options['width']} channels on {grid} x {grid} "
                "cells, without prefix tokens"
            )
        return found.float()

    def _unit_range(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(self.options[name]).view(3, 1, 1) for name in ("mean", "std"))
        images = pixels * std + mean
        low, high = (float(each) for each in images.detach().aminmax())
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
            raise ImageError(
                "pixel_values",
                f"lie in [{low:.3g}, {high:.3g}] after undoing mean {self.options['mean']} and std "
                f"{self.options['std']}, not in [0, 1]: use the processor that install() returned",
            )
        return images.clamp(0, 1)

    def _encode(self, images: Tensor) -> Features:
        head = self.options["head"]
        if not isinstance(self.student, Model):
            out = self.student(images)
            return out.heads[head] if head else out
        condition: Any = self.student.conditioner
        if condition.mean.dtype != torch.float32:  # transformers casts buffers; half precision holds three digits
            exact = torch.tensor([self.options["student_mean"], self.options["student_std"]], device=images.device)
            condition.mean, condition.std = exact.view(2, 3, 1, 1)
        features = self.student.encode(images, window=self.options["window"])
        out = self.student.decode(features, [head] if head else [])
        return out.heads[head] if head else out

    def restore_constants(self) -> None:
        """Write buffers that are not saved, which transformers replaces by uninitialised memory when it loads."""
        for name, value in self._constants.items():
            owner, _, leaf = name.rpartition(".")
            module = self.student.get_submodule(owner)
            module.register_buffer(leaf, value.clone().to(module.get_buffer(leaf).device), persistent=False)


def _constants(student: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that a checkpoint lacks."""
    saved = student.state_dict().keys()
    return {name: each.detach().clone() for name, each in student.named_buffers() if name not in saved}


def encoder_options(
    student: nn.Module, *, head: str | None, window: int | None, accepted: Mapping[int, int], where: str
) -> dict[str, Any]:
    """Check a student against a decoder; the options of :class:`StudentEncoder` that depend on both.

    Args:
        student: as in :class:`StudentEncoder`.
        head: whose map the decoder reads; None for the one of a fitting width, preferably ``sam3``.
        window: side of the attention windows in patches; 0 for none, None for the student's own setting.
        accepted: channels that the decoder takes → cells of a side of the square grid at that point.
        where: beginning of error messages.

    Returns:
        ``head`` (``""``: the student's own map), ``width``, ``grid``, ``cell`` (student pixels per cell), ``window``,
        ``student_mean`` and ``student_std``.

    Raises:
        ConfigError: no map of a fitting width; a window that does not divide the patch grid; a student without windows.
    """
    spec: Any = getattr(student, "spec", None)
    configs = student.head_configs if isinstance(student, Model) else {}
    widths = {name: config.spatial_width or 0 if config.spatial else 0 for name, config in configs.items()}
    name = choose(widths, getattr(spec, "spatial", None) or 0, head, set(accepted), where, "sam3")
    width = widths[name] if name else int(spec.spatial)
    finer = int((configs[name].spatial or {}).get("upsample", 1)) if name else 1
    grid, patch = accepted[width], int(spec.stride)
    if patch % finer or (grid * patch) % finer or (grid * patch // finer) % max(1, spec.step):
        raise ConfigError(
            f"{where}: a map of {grid} x {grid} cells needs {grid * patch / finer:g} pixels, which the student cannot "
            f"take (multiples of {spec.step})"
        )
    cell = patch // finer
    _check_window(student, window, grid * cell // patch, patch, where)
    inner: Any = getattr(student, "student", None)
    return {
        "head": name, "width": width, "grid": grid, "cell": cell, "window": window,
        "student_mean": list(getattr(inner, "mean", ())), "student_std": list(getattr(inner, "std", ())),
    }  # fmt: skip


def _check_window(student: nn.Module, window: int | None, patches: int, patch: int, where: str) -> None:
    check_window_value(window)
    if window and not (isinstance(student, Model) and student.student.windows):
        raise ConfigError(f"{where}: window={window}: this student has no windowed attention; use window=0")
    own = getattr(getattr(student, "student", None), "window", None) if window is None else window
    if own:
        check_window_divides((patches, patches), own, patch)


def as_student(student: Model | nn.Module | str, where: str, head: str | None) -> nn.Module:
    """The student: a module as it is, or a model loaded by name with the head that the decoder reads.

    Raises:
        ConfigError, AssetError: as :func:`agglo.load`.
    """
    if isinstance(student, nn.Module):
        return student
    if not isinstance(student, str):
        raise ConfigError(
            f"{where}: student is a {type(student).__name__}; pass an agglo model, its name or its folder"
        )
    return load(student, heads=[head or "sam3"])


def own_config(student: nn.Module, head: str) -> dict[str, Any] | None:
    """The configuration that rebuilds a student with one head; None for a module that is not an agglo model."""
    if not isinstance(student, Model):
        return None
    config = student.config()
    return {**config, "heads": {head: config["heads"][head]} if head else {}}


def rebuilt(config: Mapping[str, Any] | None) -> nn.Module:
    """A student of :func:`own_config` with random weights, on the meta device where transformers loads onto it."""
    if config is None:
        raise ConfigError(
            "this checkpoint was saved with a module that is not an agglo model as its trunk, which its configuration "
            "cannot describe: load the original checkpoint and install the trunk again"
        )
    kind = find("students", str(config["student"]["kind"]), installed=False)
    with torch.device(torch.get_default_device() if kind.builds_on_meta else "cpu"):
        return Model.from_config(config)


@functools.cache
def trunk_classes() -> tuple[Any, Any]:
    """``AggloTrunkConfig`` and ``AggloTrunk``, registered with transformers' AutoConfig and AutoModel.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", "teachers")
    output = require("transformers.modeling_outputs", "teachers").BaseModelOutput

    class AggloTrunkConfig(transformers.PreTrainedConfig):
        """Configuration of an agglo student as the trunk of SAM 3."""

        model_type = MODEL_TYPE
        base_config_key = "backbone_config"
        hidden_size: int = 1024
        patch_size: int = 16
        image_size: int = 1152
        student: dict | None = None
        encoder: dict | None = None

    class AggloTrunk(transformers.PreTrainedModel):
        """An agglo student in the place of ``Sam3ViTModel``: pixels to tokens ``(B, h w, C)``, row-major."""

        config_class = AggloTrunkConfig
        base_model_prefix = "agglo_trunk"
        main_input_name = "pixel_values"
        # The student calls PyTorch's own attention; the flags let the surrounding model choose its implementation.
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

        def __init__(self, config: Any, student: nn.Module | None = None) -> None:
            super().__init__(config)
            self.encoder = StudentEncoder(rebuilt(config.student) if student is None else student, config.encoder)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """A trained student keeps its weights; see :meth:`StudentEncoder.restore_constants`."""
            if module is self:
                self.encoder.restore_constants()

        def get_input_embeddings(self) -> nn.Module:
            return self.encoder

        def forward(self, pixel_values: Tensor, **options: Any) -> Any:
            del options  # output_attentions and others of transformers
            return output(last_hidden_state=tokens(self.encoder(pixel_values)))

    transformers.AutoConfig.register(MODEL_TYPE, AggloTrunkConfig, exist_ok=True)
    transformers.AutoModel.register(AggloTrunkConfig, AggloTrunk, exist_ok=True)
    return AggloTrunkConfig, AggloTrunk
