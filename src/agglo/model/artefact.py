"""A model's folder: safetensors, a JSON configuration and a card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from agglo.files import read_json, replacing
from agglo.types import ConfigError, StorageError
from agglo.weights.reading import assign, read_safetensors

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    texts: Mapping[str, str],
    dtype: torch.dtype,
    *,
    keep: tuple[str, ...] = (),
) -> Path:
    """Write weights and text files; all are replaced together, after all were written.

    Args:
        folder: created if needed.
        tensors: by name; floating-point ones are cast to ``dtype``.
        texts: file name to content.
        dtype: precision on disk.
        keep: tensors whose name contains one of these keep their dtype.

    Raises:
        ValueError: a tensor is not finite in ``dtype``.
        StorageError: a file cannot be written.
    """
    state = {}
    for name, tensor in tensors:
        cast = tensor.is_floating_point() and not any(part in name for part in keep)
        state[name] = tensor.detach().to("cpu", dtype if cast else tensor.dtype).contiguous()
        if not torch.isfinite(state[name]).all():
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} is not finite as {kind}; nothing was written to {folder}")
    try:
        with contextlib.ExitStack() as stack:  # unwound from the last: the weights are replaced first
            partial = {name: stack.enter_context(replacing(folder / name)) for name in (*texts, WEIGHTS)}
            write_tensors(state, partial[WEIGHTS])
            for name, text in texts.items():
                partial[name].write_text(text, encoding="utf-8")
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{folder} cannot be written ({error}): free some space or name another folder") from None
    return folder


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Load the weights of a saved model into ``model``, which may be on the meta device.

    Raises:
        AssetError: the weights are damaged or of another configuration.
    """
    source = folder / WEIGHTS
    tensors = read_safetensors(source).tensors
    assign(model, tensors, dtype, device, source=str(source))
    for name in ("mean", "std"):  # half precision holds three digits, too few for these
        value = tensors[f"conditioner.{name}"].to(device, torch.float32, copy=True)
        setattr(model.conditioner, name, value)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a saved model.

    Raises:
        ConfigError: not a saved model, damaged, or of a later format.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder} is not a saved model: it must contain {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    if "format" not in config:
        raise ConfigError(f"{folder} was not written by Model.save; agglo.load reads other layouts")
    if config["format"] != FORMAT:
        raise ConfigError(f"{folder / CONFIG} has format {config['format']!r}, not {FORMAT}: upgrade agglo")
    return config


def config_text(config: Mapping[str, Any]) -> str:
    """A configuration as the text of its JSON file."""
    return json.dumps(config, indent=2) + "\n"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        StorageError: it cannot be written; no part of it is left.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", "agglo": str(FORMAT)})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes its files readable by the owner only
    except (SafetensorError, OSError) as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written ({error}): free some space or name another folder") from None


def plain_card(name: str, kind: str, parameters: int, stride: int, provenance: Mapping[str, Any]) -> str:
    """The card of a model that has not been evaluated: architecture, teachers, licences."""
    teachers = "\n".join(f"- `{n}`: {t}" for n, t in provenance.get("teachers", {}).items()) or "- unknown"
    return (
        f"---\nlibrary_name: agglo\nlicense: {provenance.get('license', 'other')}\n"
        "tags: [agglomerative, feature-extraction]\n---\n\n"
        f"# {name}\n\nAn agglomerative vision backbone: `{kind}` student, "
        f"{parameters / 1e6:.1f} M parameters, stride {stride}.\n\n"
        f'```python\nimport agglo\n\nmodel = agglo.load("{name}")\n```\n\nTeachers and their licences:\n\n{teachers}\n'
    )
