"""Whose features a cache holds: enough to refuse it when teacher, size, preprocessing or images have changed."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agglo.data.shifts import max_shift
from agglo.files import read_json
from agglo.recipe import Recipe, TeacherEntry, Views
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec

FORMAT = 2
MANIFEST, TEACHER, STATISTICS = "manifest.json", "teacher.json", "statistics.safetensors"
PARTIAL = ".partial"
"""What is behind the name of a file that is being written."""

_STUDENTS = {"summary_weight", "spatial_weight", "summary_head", "spatial_head"}
"""Keys of a teacher's entry that are about what the student makes of it."""

_HARMLESS = {"compile"}
"""Keys of a teacher that change how fast it speaks, not what it says."""

_PROBED = 128
"""Numbers of the probe's features that are kept."""

_TOLERANCE = 0.02
"""How far the probe's features may be off, as a share of their length: devices and precisions differ, models more."""


# ---------------------------------------------------------------------------------------------------- geometry


def margin(views: Views, stride: int) -> int:
    """Pixels of a fixed crop's canvas beyond each side of the middle view: as far as the student's view may go."""
    return (max_shift(views.shift) + views.roam) * stride


def outer_size(size: tuple[int, int], views: Views, stride: int) -> tuple[int, int]:
    """``(H, W)`` of the canvas, on the student's scale, around views of ``size``."""
    extra = 2 * margin(views, stride)
    return size[0] + extra, size[1] + extra


def geometry(recipe: Recipe, stride: int) -> dict[str, Any]:
    """What decides a fixed crop's canvas, beside the image, the number of the crop and the size."""
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
    """CRC-32 of a canvas, ``(3, H, W)`` in [0, 1], as 8-bit pixels. Runs in the loader's threads, so without torch."""
    eight = (pixels.numpy() * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return zlib.crc32(eight.data)


# ---------------------------------------------------------------------------------------------------- teachers


def fingerprint(
    entry: TeacherEntry, teacher: Teacher, inputs: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Who a teacher is: its keys in the recipe, processor, output, input sizes, weights, and words on a test image.

    The last catches what none of the others shows, such as another version of the library that runs it.

    Args:
        inputs: as :func:`inputs_of` finds them; the test image has the smallest of these sizes.
    """
    size = min((tuple(each["input"]) for each in inputs.values()), key=math.prod)
    return {
        "config": config_of(entry),
        "processor": dict(teacher.processor),
        "spec": spec_to(teacher.spec),
        "inputs": dict(inputs),
        "weights": weights_hash(teacher),
        "probe": {"size": list(size), "values": probe(teacher, size, device)},
    }


def inputs_of(teacher: Teacher, sizes: Iterable[int], views: Views, stride: int) -> dict[str, Any]:
    """At which ``(H, W)`` a teacher sees the canvases of each of the student's sizes, and the grid of its map of them.

    Args:
        sizes: sides of the student's view in pixels; the keys are these.
        stride: the student's.
    """
    found = {}
    for size in sizes:
        height, width = teacher.input_size(outer_size((size, size), views, stride), stride)
        cell = teacher.spec.stride
        grid = [0, 0] if teacher.spec.spatial is None else [height // cell, width // cell]
        found[str(size)] = {"input": [height, width], "grid": grid}
    return found


def config_of(entry: TeacherEntry) -> dict[str, Any]:
    """The keys of a recipe's teacher that decide what it says; those that are off are left out."""
    keys: dict[str, Any] = entry.model_dump(mode="json")
    keys.update(keys.pop("teacher"))
    kept = {key: value for key, value in sorted(keys.items()) if key not in _STUDENTS | _HARMLESS}
    return {key: value for key, value in kept.items() if value is not None and value is not False}  # 0 is a value


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of parameters and buffers; a buffer ``_name`` is memory, not weights."""
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
    """Some numbers of what a teacher says of one fixed image, waves in three colours."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    waves = [torch.sin(math.pi * (a * x + b * y + c)) for a, b, c in ((9, 2, 0.1), (3, 11, 0.4), (17, 5, 0.7))]
    said: Features = teacher((torch.stack(waves)[None] / 2 + 0.5).to(device))
    numbers = [part.float().flatten() for part in (said.summary, said.spatial) if part is not None]
    # A stride that has no factor in common with usual widths, so that all channels and places are met.
    picked = [part[torch.arange(_PROBED, device=part.device) * 7919 % len(part)] for part in numbers]
    return [float(f"{value:.6g}") for value in torch.cat(picked).tolist()]


def changes(
    written: Mapping[str, Any], entry: TeacherEntry, teacher: Teacher | None, views: Views, stride: int,
    device: torch.device,
) -> list[str]:  # fmt: skip
    """What differs between a fingerprint and a teacher, in words; nothing where they are one.

    What is cheap is compared first and the teacher is asked last, when all else is equal: another teacher may not even
    run at the size of the test image.

    Args:
        teacher: None where only its keys in the recipe are known.
        views, stride: of the recipe and the student; the canvases are those of the cache.
    """
    told = _unlike(written["config"], config_of(entry))
    if told or teacher is None:
        return told
    if told := _unlike(written["processor"], teacher.processor):
        return [f"its processor changed: {each}" for each in told]
    if told := _unlike(written["spec"], spec_to(teacher.spec)):
        return [f"its output changed: {each}" for each in told]
    now = inputs_of(teacher, map(int, written["inputs"]), views, stride)
    for size, then in written["inputs"].items():
        if then != now[size]:
            return [f"it sees canvases of {size} px views {_seen(then)} then, {_seen(now[size])} now"]
    if written["weights"] != weights_hash(teacher):
        return ["other weights"]
    size = tuple(written["probe"]["size"])
    then, today = np.array(written["probe"]["values"]), np.array(probe(teacher, size, device))
    off = np.linalg.norm(then - today) if then.shape == today.shape else np.inf
    if off > _TOLERANCE * np.linalg.norm(then):
        return [
            "keys, processor and weights are the same, but it says something else of the same image: its preprocessing "
            "changed"
        ]
    return []


def _unlike(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def _seen(inputs: Mapping[str, Any]) -> str:
    (height, width), (rows, columns) = inputs["input"], inputs["grid"]
    return f"at {height}x{width} pixels on a grid of {rows}x{columns}"


# ---------------------------------------------------------------------------------------------------- files


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file whole."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file whole: at every moment what is there is the old one or the new one."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        ConfigError: the folder is no cache, or one of another format.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no feature cache {folder}: write one with `agglo cache RECIPE --out {folder}`")
    found = read_json(folder / MANIFEST)
    if not found:
        raise ConfigError(f"{folder} is no feature cache: it holds no {MANIFEST}")
    if found.get("format") != FORMAT:
        raise ConfigError(f"{folder} has format {found.get('format')!r}, this agglo reads {FORMAT}: write it again")
    return found


def read_teacher(folder: Path, name: str) -> dict[str, Any]:
    """What is known of one teacher of a cache; empty where it holds none of that name."""
    return read_json(folder / name / TEACHER)


def spec_to(spec: FeatureSpec) -> dict[str, Any]:
    """A spec as JSON."""
    return asdict(spec)


def spec_from(content: Mapping[str, Any]) -> FeatureSpec:
    """A spec from JSON."""
    return FeatureSpec(**content)
