"""Identity of the features in a cache: detects a changed teacher, input size, preprocessing or image."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agglo.data.crops import margin, outer_size
from agglo.files import read_json
from agglo.recipe import Recipe, TeacherEntry, Views
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features

FORMAT = 2
MANIFEST, TEACHER, STATISTICS = "manifest.json", "teacher.json", "statistics.safetensors"

_LOSS_KEYS = {"summary_weight", "spatial_weight", "summary_head", "spatial_head"}
"""Keys of a teacher's entry that do not change its features."""

_SPEED_KEYS = {"compile"}
"""Keys of a teacher that change its speed, not its features."""

_PROBE_VALUES = 128
"""Number of values of the probe's features that are kept."""

_TOLERANCE = 0.02
"""Relative error allowed for the probe: devices and precisions differ by less, other models by more."""


# --- crops ------------------------------------------------------------------------------------------------------------


def geometry(recipe: Recipe, stride: int) -> dict[str, Any]:
    """What determines a fixed crop, besides the image, the crop's number and the size."""
    views = recipe.data.views
    return {
        "scale": list(views.scale),
        "aspect": list(views.aspect),
        "flip": views.flip,
        "canvas": views.canvas,
        "margin": margin(views, stride),
        "stride": stride,
    }


def pixels_crc(pixels: Tensor) -> int:
    """CRC-32 of a crop ``(3, H, W)`` in [0, 1] as 8-bit pixels. Runs in the loader's threads, so without torch."""
    eight = (pixels.numpy() * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return zlib.crc32(eight.data)


# --- teachers ---------------------------------------------------------------------------------------------------------


def fingerprint(
    entry: TeacherEntry, teacher: Teacher, inputs: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """A teacher's recipe keys, processor, spec, input sizes, weights, and some features of a test image (the probe).

    The probe detects what the others do not, such as another version of the library that runs the teacher.

    Args:
        inputs: from :func:`inputs_of`; the test image has the smallest of these sizes.
    """
    size = min((tuple(each["input"]) for each in inputs.values()), key=math.prod)
    return {
        "config": config_of(entry),
        "processor": dict(teacher.processor),
        "spec": asdict(teacher.spec),
        "inputs": dict(inputs),
        "weights": weights_hash(teacher),
        "probe": {"size": list(size), "values": probe(teacher, size, device)},
    }


def inputs_of(teacher: Teacher, sizes: Iterable[int], views: Views, stride: int) -> dict[str, Any]:
    """A teacher's input size ``(H, W)`` and map grid for the crops of each student size, by that size.

    Args:
        sizes: sides of the student's view in pixels.
        stride: of the student.
    """
    found = {}
    for size in sizes:
        height, width = teacher.input_size(outer_size((size, size), views, stride), stride)
        cell = teacher.spec.stride
        grid = [0, 0] if teacher.spec.spatial is None else [height // cell, width // cell]
        found[str(size)] = {"input": [height, width], "grid": grid}
    return found


def config_of(entry: TeacherEntry) -> dict[str, Any]:
    """The keys of a teacher that determine its features, without those that are null or false."""
    keys: dict[str, Any] = entry.model_dump(mode="json")
    keys.update(keys.pop("teacher"))
    kept = {key: value for key, value in sorted(keys.items()) if key not in _LOSS_KEYS | _SPEED_KEYS}
    return {key: value for key, value in kept.items() if value is not None and value is not False}  # 0 is a value


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of parameters and buffers, except buffers ``_name`` (caches)."""
    buffers = [(name, each) for name, each in module.named_buffers() if not name.split(".")[-1].startswith("_")]
    found = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *buffers]):
        plain = name.replace("_orig_mod.", "")  # compiled or not
        found.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@torch.inference_mode()
def probe(teacher: Teacher, size: tuple[int, int], device: torch.device) -> list[float]:
    """Some features of one fixed image: waves in three colours."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    waves = [torch.sin(math.pi * (a * x + b * y + c)) for a, b, c in ((9, 2, 0.1), (3, 11, 0.4), (17, 5, 0.7))]
    features: Features = teacher((torch.stack(waves)[None] / 2 + 0.5).to(device))
    numbers = [part.float().flatten() for part in (features.summary, features.spatial) if part is not None]
    # A stride coprime to common widths, so that all channels and positions are sampled.
    picked = [part[torch.arange(_PROBE_VALUES, device=part.device) * 7919 % len(part)] for part in numbers]
    return [float(f"{value:.6g}") for value in torch.cat(picked).tolist()]


def changes(
    written: Mapping[str, Any], entry: TeacherEntry, teacher: Teacher | None, views: Views, stride: int,
    device: torch.device,
) -> list[str]:  # fmt: skip
    """The differences between a fingerprint and a teacher, as phrases; empty if it is the same teacher.

    The cheap comparisons come first and the probe last: another teacher may not run at the size of the test image.

    Args:
        teacher: None if only its keys in the recipe are known.
        views, stride: of the recipe and the student.
    """
    found = _differences(written["config"], config_of(entry))
    if found or teacher is None:
        return found
    if found := _differences(written["processor"], teacher.processor):
        return [f"its processor changed: {each}" for each in found]
    if found := _differences(written["spec"], asdict(teacher.spec)):
        return [f"its output changed: {each}" for each in found]
    now = inputs_of(teacher, map(int, written["inputs"]), views, stride)
    for size, then in written["inputs"].items():
        if then != now[size]:
            return [f"its input for {size} px views was {_input_text(then)}, now {_input_text(now[size])}"]
    if written["weights"] != weights_hash(teacher):
        return ["other weights"]
    size = tuple(written["probe"]["size"])
    then, today = np.array(written["probe"]["values"]), np.array(probe(teacher, size, device))
    off = np.linalg.norm(then - today) if then.shape == today.shape else np.inf
    if off > _TOLERANCE * np.linalg.norm(then):
        return [
            "keys, processor and weights are the same, but not the features of a test image: its preprocessing changed"
        ]
    return []


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {then.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def _input_text(inputs: Mapping[str, Any]) -> str:
    (height, width), (rows, columns) = inputs["input"], inputs["grid"]
    return f"{height}x{width} pixels with a grid of {rows}x{columns}"


# --- files ------------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        ConfigError: the folder is not a cache, or has another format.
    """
    if not folder.is_dir():
        raise ConfigError(f"feature cache {folder} does not exist: write it with `agglo cache RECIPE --out {folder}`")
    found = read_json(folder / MANIFEST)
    if not found:
        raise ConfigError(f"{folder} is not a feature cache: it has no {MANIFEST}")
    if found.get("format") != FORMAT:
        raise ConfigError(f"{folder} has format {found.get('format')!r}, this agglo reads {FORMAT}: write it again")
    return found


def read_teacher(folder: Path, name: str) -> dict[str, Any]:
    """The description of one teacher of a cache; empty if it has none of that name."""
    return read_json(folder / name / TEACHER)
