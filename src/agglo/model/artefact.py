"""A model's folder: safetensors, JSON configuration and a card, each replaced whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from agglo.files import read_json
from agglo.preprocess import Conditioner
from agglo.types import ConfigError, StorageError
from agglo.weights.reading import assign, read_safetensors

if TYPE_CHECKING:
    from agglo.model.model import Model

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save(model: Model, folder: str | Path, *, dtype: torch.dtype = torch.float32, card: str | None = None) -> Path:
    """See :meth:`agglo.Model.save`."""
    if not isinstance(model.conditioner, Conditioner):
        raise ValueError("this model's conditioner was taken: give it back (model.conditioner = conditioner) and save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, tensor in model.state_dict().items():
        cast = tensor.is_floating_point() and not name.endswith("running_var")
        state[name] = (tensor.to(dtype) if cast else tensor).contiguous().cpu()
        if not torch.isfinite(state[name]).all():
            raise ValueError(f"{name} is not finite as {dtype}: nothing was saved to {folder}")
    write_tensors(state, folder / f"{WEIGHTS}.partial")
    texts = {CONFIG: json.dumps(model.config(), indent=2) + "\n", CARD: card or plain_card(model, folder.name)}
    for file, text in texts.items():
        (folder / f"{file}.partial").write_text(text, encoding="utf-8")
    for file in (WEIGHTS, *texts):
        (folder / f"{file}.partial").replace(folder / file)
    return folder


def fill(model: Model, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a model, built on the meta device or not, the weights of its folder.

    Raises:
        AssetError: they are damaged or of another configuration.
    """
    source = folder / WEIGHTS
    tensors = read_safetensors(source).tensors
    assign(model, tensors, dtype, device, source=str(source))
    for name in ("mean", "std"):  # three digits of a mean are not enough: these stay in float32
        value = tensors[f"conditioner.{name}"].to(device, torch.float32, copy=True)
        setattr(model.conditioner, name, value)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a saved model.

    Raises:
        ConfigError: no saved model, damaged, or of a later format.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder} is no saved model: it must hold {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    if "format" not in config:
        raise ConfigError(f"{folder} was not written by Model.save: agglo.load knows other layouts")
    if config["format"] != FORMAT:
        raise ConfigError(
            f"{folder / CONFIG} has format {config['format']!r}, this agglo reads {FORMAT}: upgrade agglo"
        )
    return config


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        StorageError: it cannot be written; nothing of it is left.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", "agglo": str(FORMAT)})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes for its owner alone
    except (SafetensorError, OSError) as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written ({error}): free some space or name another folder") from None


def plain_card(model: Model, name: str) -> str:
    """A card for a model that has not been measured: what it is, what it learned from, under which licences."""
    facts = model.provenance
    teachers = "\n".join(f"- `{n}`: {t}" for n, t in facts.get("teachers", {}).items()) or "- unknown"
    return (
        f"---\nlibrary_name: agglo\nlicense: {facts.get('license', 'other')}\n"
        "tags: [agglomerative, feature-extraction]\n---\n\n"
        f"# {name}\n\nAn agglomerative vision backbone: `{model.student_config['kind']}` student, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, stride {model.spec.stride}.\n\n"
        f'```python\nimport agglo\n\nmodel = agglo.load("{name}")\n```\n\nTeachers and their licences:\n\n{teachers}\n'
    )
