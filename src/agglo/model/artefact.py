"""A model's folder: safetensors, a JSON configuration and a card."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from agglo.files import read_json, replacing
from agglo.types import ConfigError, StorageError
from agglo.weights.reading import assign, read_safetensors

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
EXPORTED, EXPORT_FORMAT = "export.json", 1
"""Facts of a folder that holds an exported graph instead of weights, and their format."""
TEXTS = "agglo.texts"
"""Key of the weights' metadata: hash of each text file written with them."""
_TITLE = re.compile(rb"^# (.+)$", re.MULTILINE)
"""First heading of a card: the name of its folder."""


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    texts: Mapping[str, str],
    dtype: torch.dtype,
    *,
    keep: tuple[str, ...] = (),
) -> Path:
    """Write weights and text files; all are replaced together, after all were written.

    Only files of an earlier call are replaced: the weights list the hashes of the texts written with them.

    Args:
        folder: created if needed.
        tensors: by name; floating-point ones are cast to ``dtype``.
        texts: file name to content.
        dtype: precision on disk.
        keep: tensors whose name contains one of these keep their dtype.

    Raises:
        ConfigError: the folder holds a file of one of these names that agglo did not write, or that was edited since.
        ValueError: a tensor is not finite in ``dtype``.
        StorageError: a file cannot be written.
    """
    if kept := _foreign(folder, texts):
        raise ConfigError(
            f"{folder} holds {', '.join(kept)}, which agglo did not write (or which was edited since): name another "
            "folder, or move it away"
        )
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
            write_tensors(state, partial[WEIGHTS], {name: _hash(text.encode()) for name, text in texts.items()})
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


def _foreign(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Names of the files to be written that exist and are not of an earlier :func:`write_folder`."""
    found = [name for name in (*texts, WEIGHTS) if os.path.lexists(folder / name)]
    metadata: dict[str, str] = {}
    with contextlib.suppress(OSError, SafetensorError), safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata() or {}
    if "agglo" not in metadata:
        return found
    known = json.loads(metadata.get(TEXTS, "null"))
    if known is None:  # written by a version that did not list them
        return []
    return [name for name in found if name != WEIGHTS and known.get(name) != _hash((folder / name).read_bytes())]


def _hash(content: bytes) -> str:
    """Hash of a text without the folder's name, so that a model's weights have the same bytes in every folder."""
    if title := _TITLE.search(content):
        content = content.replace(title[0], b"#", 1)
        content = re.sub(rb'(?<=["/:])' + re.escape(title[1]) + rb'(?=")', b"", content)
    return hashlib.sha256(content).hexdigest()[:16]


def write_tensors(tensors: Mapping[str, Tensor], path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; equal tensors give equal bytes.

    Args:
        tensors: by name.
        path: of the file.
        texts: hashes of the text files beside it, by name.

    Raises:
        StorageError: it cannot be written; no part of it is left.
    """
    metadata = {"format": "pt", "agglo": str(FORMAT)}
    if texts:
        metadata[TEXTS] = json.dumps(texts, sort_keys=True)
    try:
        save_file(dict(tensors), path, metadata=metadata)
        _sort_metadata(path)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes its files readable by the owner only
    except (SafetensorError, OSError) as error:
        path.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written ({error}): free some space or name another folder") from None


def _sort_metadata(path: Path) -> None:
    """Sort the keys of a safetensors file's metadata, whose order differs from process to process."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


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
