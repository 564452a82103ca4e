"""Checkpoints: safetensors and JSON, written atomically, so that a killed run can resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn, optim

from agglo.model.artefact import write_tensors
from agglo.types import AssetError, ConfigError

KEEP = 2
"""Number of checkpoints kept."""


def save(folder: Path, step: int, parts: dict[str, nn.Module], optimizer: optim.Optimizer) -> Path:
    """Write ``folder/step_<step>`` atomically, then delete all but the newest :data:`KEEP`.

    Args:
        folder: the run's checkpoint folder.
        step: number of steps done.
        parts: modules by name (``model``, ``ema``, ``objective``).
        optimizer: AdamW.

    Raises:
        StorageError: the disk is full or the folder read-only; earlier checkpoints are intact.
    """
    target, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
    for stale in folder.glob(".step_*.partial"):  # left by a kill
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    for name, module in parts.items():
        write_tensors({k: _packed(v) for k, v in module.state_dict().items()}, partial / f"{name}.safetensors")
    moments: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        moments |= {f"{index}.{key}": _packed(torch.as_tensor(value)) for key, value in state.items()}
    write_tensors(moments, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step}) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def _packed(tensor: Tensor) -> Tensor:
    """A contiguous copy, as safetensors needs it (convolutions may be channels-last)."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def restore(folder: Path, parts: dict[str, nn.Module], optimizer: optim.Optimizer) -> int:
    """Load the newest checkpoint into ``parts`` and ``optimizer``.

    Returns:
        The number of steps done.

    Raises:
        ConfigError: there is none.
        AssetError: damaged, or of another recipe; names the folder to remove.
    """
    found = checkpoints(folder)
    if not found:
        raise ConfigError(f"{folder} has no checkpoint: start again with --overwrite")
    newest = found[-1]
    try:
        for name, module in parts.items():
            module.load_state_dict(load_file(newest / f"{name}.safetensors"))
        state: dict[int, dict[str, Any]] = {}
        for key, value in load_file(newest / "optimizer.safetensors").items():
            index, _, field = key.partition(".")
            state.setdefault(int(index), {})[field] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return int(json.loads((newest / "state.json").read_text())["step"])
    except (SafetensorError, RuntimeError, KeyError, ValueError, OSError) as error:
        raise AssetError(
            f"checkpoint {newest} cannot be read ({str(error).splitlines()[0]}): remove that folder and resume "
            "from the checkpoint before it"
        ) from None
