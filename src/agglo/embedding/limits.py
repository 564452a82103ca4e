"""Checks before the work begins: sizes, memory and output paths."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from agglo.evals.base import Backbone, device_of
from agglo.model.model import Model
from agglo.preprocess import check_size, nearest_size
from agglo.types import ConfigError

ENDINGS = (".parquet", ".npz")
"""Suffixes of embedding files."""


def legal_size(model: Model, size: int | None) -> tuple[int, int]:
    """``(size, size)``, or for None the legal square nearest to the model's preferred size.

    Raises:
        ConfigError: ``size`` is not legal; names the nearest legal sizes.
    """
    if size is None:
        return nearest_size((model.preferred_size, model.preferred_size), model.step())
    try:
        check_size(size, size, model.step())
    except ValueError as error:
        raise ConfigError(f"size {size}: {error}") from None
    return size, size


def check_memory(model: Backbone, size: tuple[int, int], batch: int) -> None:
    """Refuse inputs that cannot fit into memory.

    The estimate is low: an image, its pixels as float32, and eight maps of the features' width.

    Raises:
        ConfigError: names the memory needed and the largest side that fits.
    """
    height, width = size
    channels = model.spec.spatial or model.spec.summary or 0
    pixel = 24 + 32 * channels / model.spec.stride**2
    needed, limit = batch * height * width * pixel, memory_bytes(device_of(model))
    if needed > limit:
        largest = max(1, int((limit / batch / pixel) ** 0.5))
        raise ConfigError(
            f"size {height}x{width}: a batch of {batch} needs more than {needed / 1e9:.0f} GB of memory, and there are "
            f"{limit / 1e9:.0f} GB: use at most {largest} pixels, or a smaller batch"
        )


def memory_bytes(device: torch.device) -> int:
    """Memory of a device; on the CPU that of the machine, or the limit of the container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [1 << 48]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # "max": no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(each for each in found if each > 0)


def check_output(path: str | Path, *, overwrite: bool, endings: Sequence[str] = ENDINGS) -> Path:
    """Check an output path before the work begins.

    Raises:
        ConfigError: an unknown suffix, a folder, or an existing file without ``overwrite``.
    """
    path = Path(path).expanduser()
    if path.suffix not in endings:
        raise ConfigError(f"{path}: the name must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists: use --overwrite (overwrite=True), or choose another name")
    return path
