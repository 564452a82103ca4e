"""What one needs to know of a model before using it, without reading its weights."""

from __future__ import annotations

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
from torch.utils.flop_counter import FlopCounterMode

from agglo.checkpoints import radio
from agglo.checkpoints.trunks import published
from agglo.hub import INDEX, cached
from agglo.model import artefact
from agglo.model.model import Model
from agglo.types import ConfigError
from agglo.zoo.loading import Found, find, read_checkpoint
from agglo.zoo.loading import load as load_model
from agglo.zoo.releases import HUB, RELEASED, SPEAKING, HubModel


@dataclass(frozen=True)
class ModelInfo:
    """A model's facts.

    Args:
        name: what was asked for.
        licence: of the weights.
        student: kind and the keys that say how large it is.
        params: of the student, of the heads; in numbers.
        stride: pixels of input per cell of the map.
        step: sides must be a multiple of this many pixels.
        preferred, largest: sides in pixels; the largest it was made for, or None.
        summary: width of the summary, and how many class tokens it joins.
        spatial: channels of the map.
        tokens: names of the class tokens; registers beside them.
        registers: further tokens that nobody reads.
        heads: by teacher, widths ``(summary, spatial)`` and the map's upsampling; widths are None where only the
            download would tell.
        text: heads that speak a text tower's language.
        windows: whether most blocks can look through windows.
        size: ``(H, W)`` in pixels at which the next two were counted.
        flops: of one image through the student, multiplications and additions.
        memory: bytes: of the student's weights, and the most that one image adds to them.
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
    """Look at a model, on the meta device where its file need not be read.

    A release of NVIDIA's that is not downloaded is described from what is published of its architecture.

    Args:
        name_or_path: as for :func:`agglo.load`.
        size: pixels, side or ``(H, W)``, snapped to legal sides; the preferred size by default.
        window: side, in patches, of the windows that most blocks look through.

    Raises:
        ConfigError, AssetError: as :func:`agglo.load`.
    """
    entry = HUB.get(str(name_or_path).lower())
    if entry is not None and not _is_local(entry):
        model, heads = _from_table(entry), dict.fromkeys(entry.teachers)
        licence, largest = entry.licence, entry.release.max_size
        text = tuple(name for name in entry.teachers if name in SPEAKING)
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
        student={key: value for key, value in model.student_config.items() if key in _TOLD},
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


_TOLD = ("kind", "model", "width", "depth", "heads", "mlp_hidden", "patch", "max_grid", "depths", "windows", "stages")


def _is_local(entry: HubModel) -> bool:
    """Whether a release's files are in the hub client's cache."""
    return any(cached(entry.repo, name) for name in ([entry.file] if entry.file else [artefact.WEIGHTS, INDEX]))


def _model(found: Found) -> Model:
    """A model without its weights where its layout allows, else the model; with the facts that loading it uses."""
    path = found.path
    config = artefact.read_json(path / artefact.CONFIG) if path.is_dir() else {}
    if "format" in config and config["student"].get("kind") != "timm":
        with torch.device("meta"):
            return Model.from_config(config).eval()
    if "format" not in config and (path.is_file() or radio.is_official(config)):
        return radio.from_checkpoint(read_checkpoint(path), heads="all", release=found.release, fill=False)
    return load_model(path)


def _from_table(entry: HubModel) -> Model:
    """A release's trunk from what is published of its architecture."""
    options = published(entry.architecture, entry.patch, entry.registers, entry.release.max_size)
    with torch.device("meta"):
        unsummed = ("sam", "sam3")
        tokens = entry.teachers if options["kind"] == "vit" and entry.architecture != "dino_v2_g_student" else ("all",)
        slots = [i for i, name in enumerate(tokens) if name not in unsummed]
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


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels have it: only its result takes memory, not the matrix of all pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Bytes of the tensors that live at once, counted where they would be made.

    Args:
        known: tensors that are there anyway.
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
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _cost(model: Model, size: tuple[int, int], window: int | None) -> tuple[int, int, int]:
    """FLOPs of one image, bytes of the student's weights, and the most bytes one image adds."""
    student = model.student
    device = next(student.parameters()).device
    images = torch.zeros(1, 3, *size, device=device)
    options = {"window": window} if window is not None else {}
    if options and not student.windows:
        raise ConfigError(f"a {model.student_config['kind']} student cannot look through windows")
    live, counter = _Live([*student.parameters(), *student.buffers(), images]), FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        student(images, **options)
    with torch.no_grad(), _FusedAttention(), live:
        student(images, **options)
    weights = sum(p.nbytes for p in student.parameters())
    return int(counter.get_total_flops()), weights, live.peak
