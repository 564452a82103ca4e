"""Whose features a cache holds: enough to refuse it when teacher, size, preprocessing or images have changed."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agglo.artefact import read_json
from agglo.data.shifts import MOST
from agglo.recipe import Recipe, TeacherEntry, Views
from agglo.teachers.base import Teacher
from agglo.types import ConfigError, Features, FeatureSpec

FORMAT = 1
MANIFEST, TEACHER, STATISTICS = "manifest.json", "teacher.json", "statistics.safetensors"

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
    return ((MOST if views.shift else 0) + views.roam) * stride


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


def fingerprint(entry: TeacherEntry, teacher: Teacher, size: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Who a teacher is: its keys in the recipe, its weights, and what it says of a test image.

    The last catches what neither keys nor weights show, such as other means in a processor's file.

    Args:
        size: ``(H, W)`` of the test image, legal for the teacher.
    """
    return {
        "config": config_of(entry),
        "weights": weights_hash(teacher),
        "probe": {"size": list(size), "values": probe(teacher, size, device)},
    }


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


def changes(written: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words."""
    told = [
        f"{key}: {written['config'].get(key)!r} then, {now['config'].get(key)!r} now"
        for key in sorted({*written["config"], *now["config"]})
        if written["config"].get(key) != now["config"].get(key)
    ]
    if told:
        return told
    if written["weights"] != now["weights"]:
        return ["other weights"]
    if written["probe"]["size"] != now["probe"]["size"]:
        return []  # measured at sizes of their own: not comparable
    then, today = (np.array(each["probe"]["values"]) for each in (written, now))
    off = np.linalg.norm(then - today) if then.shape == today.shape else np.inf
    if off > _TOLERANCE * np.linalg.norm(then):
        return [
            "keys and weights are the same, but it says something else of the same image: its preprocessing changed"
        ]
    return []


# ---------------------------------------------------------------------------------------------------- files


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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
