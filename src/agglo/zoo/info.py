"""Facts and cost of a model, without reading its weights."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from agglo.checkpoints import radio
from agglo.checkpoints.trunks import published
from agglo.files import read_json
from agglo.hub import CONFIG, INDEX, WEIGHTS, cached
from agglo.model.model import Model
from agglo.students.base import Student
from agglo.types import ConfigError
from agglo.zoo.loading import Location, find
from agglo.zoo.loading import load as load_model
from agglo.zoo.releases import HUB, RELEASED, TEXT_ALIGNED, HubModel


@dataclass(frozen=True)
class ModelInfo:
    """A model's facts.

    Args:
        name: as passed to :func:`describe`.
        licence: of the weights.
        student: kind and the keys of its size.
        params: number of parameters of the student and of the heads.
        stride: pixels of input per cell of the map.
        step: sides must be multiples of this number of pixels.
        preferred, largest: recommended side and largest side of the training in pixels; the latter may be None.
        summary: width of the summary, and number of class tokens in it.
        spatial: channels of the map.
        tokens: names of the class tokens.
        registers: number of register tokens.
        heads: by teacher, widths ``(summary, spatial)`` and the map's upsampling; None before the download.
        text: heads with a text tower.
        windows: whether windowed attention is supported.
        size: ``(H, W)`` in pixels for the next two.
        flops: of one image through the student, multiplications and additions.
        memory: bytes of the student's weights, and peak bytes that one image adds.
    """

    name: str
    licence: str
    student: Mapping[str, Any]
    params: tuple[int, int]
    stride: int
    step: int
    preferred: int
    largest: int | None
    summary: tuple[int | None, int]
    spatial: int | None
    tokens: tuple[str, ...]
    registers: int
    heads: Mapping[str, tuple[int | None, int | None, int] | None]
    text: tuple[str, ...]
    windows: bool
    size: tuple[int, int]
    flops: int
    memory: tuple[int, int]


def describe(
    name_or_path: str | Path, *, size: int | tuple[int, int] | None = None, window: int | None = None
) -> ModelInfo:
    """Describe a model, on the meta device where possible.

    Releases of NVIDIA that are not downloaded are described from published facts.

    Args:
        name_or_path: as for :func:`agglo.load`.
        size: side or ``(H, W)`` in pixels, snapped to legal sides; the preferred size by default.
        window: side of the attention windows, in patches.

    Raises:
        ConfigError, AssetError: as :func:`agglo.load`.
    """
    entry = HUB.get(str(name_or_path).lower())
    if entry is not None and not _is_local(entry):
        model, heads = _from_table(entry), dict.fromkeys(entry.teachers)
        licence, largest = entry.licence, entry.release.max_size
        text = tuple(name for name in entry.teachers if name in TEXT_ALIGNED)
    else:
        found = find(name_or_path)
        model = _model(found)
        heads = {name: _widths(model, name) for name in model.heads}
        text = tuple(n for n, c in model.head_configs.items() if c.text is not None)
        licence = _licence(name_or_path, model, found.entry)
        largest = model.provenance.get("max_size")
    spec, student = model.spec, model.student
    side = size or model.preferred_size
    height, width = (side, side) if isinstance(side, int) else side
    step = model.step(window)
    height, width = (max(step, round(n / step) * step) for n in (height, width))
    flops, weights, peak = _cost(model, (height, width), window)
    return ModelInfo(
        name=str(name_or_path),
        licence=licence,
        student={key: value for key, value in model.student_config.items() if key in _SIZES},
        params=(_count(student), sum(_count(h) for h in model.heads.values())),
        stride=spec.stride,
        step=step,
        preferred=model.preferred_size,
        largest=largest,
        summary=(spec.summary, len(model.summary_slots)),
        spatial=spec.spatial,
        tokens=model.tokens if student.spec.slots > 1 else ("all",),
        registers=int(getattr(student, "registers", 0)),
        heads=heads,
        text=text,
        windows=student.windows,
        size=(height, width),
        flops=flops,
        memory=(weights, peak),
    )


_SIZES = (
    "kind",
    "model",
    "width",
    "depth",
    "heads",
    "mlp_hidden",
    "patch",
    "max_grid",
    "depths",
    "windows",
    "stages",
)


def _is_local(entry: HubModel) -> bool:
    """Whether a release's files are in the local cache."""
    return any(cached(entry.repo, name) for name in ([entry.file] if entry.file else [WEIGHTS, INDEX]))


def _model(found: Location) -> Model:
    """The model, without its weights if its layout allows."""
    path = found.path
    config = read_json(path / CONFIG) if path.is_dir() else {}
    if "format" in config and config["student"].get("kind") != "timm":
        with torch.device("meta"):
            return Model.from_config(config).eval()
    if "format" not in config and (path.is_file() or radio.is_official(config)):
        return radio.from_checkpoint(radio.read(path), heads="all", release=found.release, fill=False)
    return load_model(path)


def _from_table(entry: HubModel) -> Model:
    """A release's trunk from published facts."""
    options = published(entry.architecture, entry.patch, entry.registers, entry.release.max_size)
    with torch.device("meta"):
        without_summary = ("sam", "sam3")
        tokens = entry.teachers if options["kind"] == "vit" and entry.architecture != "dino_v2_g_student" else ("all",)
        slots = [i for i, name in enumerate(tokens) if name not in without_summary]
        return Model(
            options, {}, tokens=tokens, summary_slots=slots, preferred_size=entry.release.preferred_size,
            provenance={"license": entry.licence},
        ).eval()  # fmt: skip


def _licence(name_or_path: str | Path, model: Model, entry: HubModel | None) -> str:
    if str(name_or_path) in RELEASED:
        return RELEASED[str(name_or_path)].licence
    return entry.licence if entry else str(model.provenance.get("license", "unknown"))


def _widths(model: Model, name: str) -> tuple[int | None, int | None, int]:
    config = model.head_configs[name]
    return config.summary_width, config.spatial_width, int((config.spatial or {}).get("upsample", 1))


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- cost -------------------------------------------------------------------------------------------------------------


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}
"""Operators that PyTorch's counter does not know."""


class _FusedAttention(TorchFunctionMode):
    """Attention as in fused kernels: only its result takes memory, not the attention matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Present and peak bytes of newly created tensors.

    Args:
        known: existing tensors, which are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _cost(model: Model, size: tuple[int, int], window: int | None) -> tuple[int, int, int]:
    """FLOPs of one image, bytes of the student's weights, and peak bytes that one image adds.

    Measured on the meta device; on the CPU if the architecture cannot run there.
    """
    options = {"window": window} if window is not None else {}
    if options and not model.student.windows:
        raise ConfigError(f"a {model.student_config['kind']} student has no windowed attention")
    student = copy.deepcopy(model.student).to("meta")
    try:
        return _measured(student, size, options)
    except (NotImplementedError, RuntimeError):
        if next(model.student.parameters()).is_meta:
            raise
        return _measured(model.student, size, options)


def _measured(student: Student, size: tuple[int, int], options: Mapping[str, int]) -> tuple[int, int, int]:
    images = torch.zeros(1, 3, *size, device=next(student.parameters()).device)
    live = _LiveBytes([*student.parameters(), *student.buffers(), images])
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with torch.no_grad(), counter:
        student(images, **options)
    with torch.no_grad(), _FusedAttention(), live:
        student(images, **options)
    weights = sum(p.nbytes for p in student.parameters())
    return int(counter.get_total_flops()), weights, live.peak
