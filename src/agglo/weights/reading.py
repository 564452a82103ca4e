"""Reading checkpoints: torch.hub pickles, Hugging Face folders, single safetensors files.

Readers open a file and list its names; a tensor is read when it is accessed, and no code of the file runs.
:func:`assign` fills a module built on the meta device one tensor at a time, so that loading needs little more memory
than the weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from agglo.hub import CONFIG, INDEX, WEIGHTS, weight_map
from agglo.types import AssetError
from agglo.weights import bundled
from agglo.weights import pickle as _pickle
from agglo.weights.diagnosis import damaged
from agglo.weights.tensors import Joined, LazyTensors, Mapped

_Slot = tuple[nn.Module, str, Tensor]
"""A module, the name of one of its parameters or buffers, and its present value."""

SAMPLE = 1024
"""Number of values per tensor that are checked for NaN and infinity."""

FIRST = 10
"""Number of names in an error."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a file or folder.

    Args:
        tensors: by the names of the file; lazy if the format allows it.
        args: official training arguments as JSON values, dtypes by short name (``"bfloat16"``); may be empty.
        config: ``config.json``; may be empty.
        source: the path, for messages.
        ema: whether the tensors are ``state_dict_ema``, with reparametrisations folded in.
    """

    tensors: Mapping[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    ema: bool = False


def read_hub(path: str | Path) -> Checkpoint:
    """Read an official torch.hub pickle (``.pth.tar``): ``{"state_dict" | "state_dict_ema", "args", ...}``.

    ``state_dict_ema`` takes precedence. Only tensors and plain arguments are unpickled. The file may also be a
    bare dict of tensors.

    Raises:
        AssetError: foreign objects (named, with the way out), damage, or another layout.
    """
    path = Path(path).expanduser()
    content = _pickle.load(path)
    key = _state_key(path, content)
    tensors: Mapping[str, Tensor] = _tensors_in(content, key)
    args = content.get("args") if key else None
    try:
        args = _pickle.plain({} if args is None else args)
    except RecursionError:
        raise AssetError(f"{path} is damaged: recursive args; download it again") from None
    if not isinstance(args, dict):
        raise AssetError(f"{path} is not an official checkpoint: its args are {type(args).__name__}, not a namespace")
    if isinstance(args.get("dtype"), str):
        args["dtype"] = args["dtype"].removeprefix("torch.")

    def reopen() -> Callable[[str], Tensor]:
        return _tensors_in(_pickle.load(path), key).__getitem__

    # A file that is not an archive is already in memory.
    if _pickle.is_archive(path):
        tensors = Mapped(tensors, reopen, tensors.__getitem__, path)
    return Checkpoint(tensors, args=args, source=str(path), ema=key == "state_dict_ema")


def read_safetensors(path: str | Path) -> Checkpoint:
    """Read the header of a safetensors file.

    Raises:
        AssetError: missing, truncated, damaged, or another format.
    """
    path = Path(path).expanduser()
    return Checkpoint(_map_safetensors(path), source=str(path))


def read_folder(path: str | Path) -> Checkpoint:
    """Read a Hugging Face folder: ``config.json`` and ``model.safetensors``, or shards with their index.

    Raises:
        AssetError: no such folder, no weights in it, a missing shard, or a damaged file.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise AssetError(f"{path} is not a folder: use the folder that holds {CONFIG} and {WEIGHTS}")
    config = _read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    if (path / WEIGHTS).is_file():
        tensors: LazyTensors = _map_safetensors(path / WEIGHTS)
    elif (path / INDEX).is_file():
        tensors = _map_shards(path)
    else:
        raise AssetError(_no_weights(path))
    args = config.get("args") or {}
    return Checkpoint(tensors, args=dict(args) if isinstance(args, dict) else {}, config=config, source=str(path))


def verify_sha256(path: str | Path, sha256: str) -> Path:
    """As :func:`agglo.weights.bundled.verify`, for a download."""
    return bundled.verify(Path(path).expanduser(), sha256, "download it again")


def assign(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    source: str = "the checkpoint",
) -> None:
    """Fill a module, preferably built under ``torch.device("meta")``, with parameters and persistent buffers.

    Tensors are read, cast and moved one at a time. On the CPU, if nothing is computed or cast, parameters stay in the
    privately mapped file: no copy, pages shared between processes, and training changes only the process's own copy.
    Such a file may be replaced or deleted, but not overwritten in place, while the model exists. Tied parameters stay
    tied. Load hooks of the module are not called.

    Args:
        module: to fill. A submodule with non-persistent buffers on the meta device needs a method
            ``materialize_buffers(device)`` that computes them.
        tensors: by the module's names; see :class:`agglo.weights.tensors.Renamed`.
        dtype: of floating-point tensors; None to keep the file's.
        device: target.
        source: origin of the tensors, for messages.

    Raises:
        AssetError: names are missing or left over, or shapes differ (the first ten of each); the module may then be
            partly filled.
        NotImplementedError: a non-persistent buffer is left on the meta device.
    """
    device, broken = torch.device(device), []
    slots = dict(_slots(module))
    _check_names(slots, tensors, source)
    lazy = tensors if isinstance(tensors, LazyTensors) else None
    if lazy is not None:
        lazy.read_ahead(slots)
    share = device.type == "cpu" and (lazy is None or lazy.shareable(dtype))
    room = {} if share else _room(slots, dtype, device)
    # Release pages after 1/24 of the weights: little memory beside the copies, and few reopenings of the file.
    window = max(sum(old.numel() * (dtype or old.dtype).itemsize for _, _, old in slots.values()) // 24, 1 << 23)
    tied: dict[int, Tensor] = {}
    wrong: list[str] = []
    touched = 0
    for key, (owner, name, old) in slots.items():
        if id(old) not in tied:
            tensor = tensors[key]
            if tensor.shape != old.shape:
                wrong.append(f"{key}: expected {tuple(old.shape)}, found {tuple(tensor.shape)}")
            if wrong:
                continue  # collect the remaining shape errors
            tied[id(old)] = _converted(tensor, old, dtype, device, share, room.pop(id(old), None))
            touched += tensor.nbytes
            if not _is_finite(tensor):
                broken.append(key)
            del tensor
            if lazy is not None and not share and touched > window:
                lazy.release()
                touched = 0
        setattr(owner, name, tied[id(old)])
    if lazy is not None:
        lazy.release()
    if wrong:
        raise AssetError(f"{source} is of another size: {len(wrong)} shapes differ ({_first(wrong, '; ')})")
    if broken:
        warnings.warn(
            f"{source}: NaN or infinity in {len(broken)} of {len(slots)} tensors ({_first(broken)}): download it "
            "again, or use a checkpoint from before its training diverged",
            stacklevel=2,
        )
    _fill_buffers(module, device)


def _room(slots: Mapping[str, _Slot], dtype: torch.dtype | None, device: torch.device) -> dict[int, Tensor]:
    """Uninitialised CPU tensors for the copies, by the identity of the tensors they replace.

    All are allocated before anything is computed: temporaries between them would leave gaps that the C library does not
    always reuse, and memory could double.
    """
    if device.type != "cpu":
        return {}
    return {
        id(old): torch.empty(old.shape, dtype=dtype if dtype and old.is_floating_point() else old.dtype, device=device)
        for _, _, old in slots.values()
    }


def _converted(
    tensor: Tensor, old: Tensor, dtype: torch.dtype | None, device: torch.device, share: bool, room: Tensor | None
) -> Tensor:
    """The module's new tensor, a parameter if ``old`` is one; a copy, in ``room``, unless ``share``."""
    tensor = tensor.detach()
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if room is not None and room.dtype == target:
        new = room.copy_(tensor)
    else:
        # Floats of an unpadded file can have odd addresses, which not every kernel accepts.
        usable = share and tensor.is_contiguous() and tensor.data_ptr() % tensor.element_size() == 0
        new = tensor.to(device, target, memory_format=torch.contiguous_format, copy=not usable)
    if not isinstance(old, nn.Parameter):
        return new
    return nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())


def _is_finite(tensor: Tensor) -> bool:
    """Whether the first values are finite: divergence leaves NaN everywhere, and a full pass would read the file."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    start = tensor.detach().flatten()[:SAMPLE] if tensor.is_contiguous() else tensor.detach()[:1].flatten()[:SAMPLE]
    return bool(start.float().isfinite().all())  # float8 has no isfinite


def _slots(module: nn.Module) -> Iterator[tuple[str, _Slot]]:
    """``key → (owner, attribute, tensor)`` of a state dict; tied parameters under each of their keys."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield dot + name, (owner, name, parameter)
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
            if name not in owner._non_persistent_buffers_set:
                yield dot + name, (owner, name, buffer)


def _check_names(slots: Mapping[str, _Slot], tensors: Mapping[str, Tensor], source: str) -> None:
    missing = [key for key in slots if key not in tensors]
    left_over = [key for key in tensors if key not in slots]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(slots)} tensors are missing ({_first(missing)})")
    if left_over:
        parts.append(f"{len(left_over)} are left over ({_first(left_over)})")
    if parts:
        raise AssetError(f"{source} is of another architecture: {'; '.join(parts)}")


def _first(items: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}…" if len(items) > FIRST else ""
    return separator.join(items[:FIRST]) + more


def _fill_buffers(module: nn.Module, device: torch.device) -> None:
    """Let submodules compute their non-persistent buffers."""
    for name, owner in module.named_modules():
        lost = [key for key, buffer in owner.named_buffers(recurse=False) if buffer.is_meta]
        hook = getattr(owner, "materialize_buffers", None)
        if lost and callable(hook):
            hook(device)
            lost = [key for key, buffer in owner.named_buffers(recurse=False) if buffer.is_meta]
        if lost:
            where = f"{name} ({type(owner).__name__})" if name else type(owner).__name__
            raise NotImplementedError(
                f"{where}: {', '.join(lost)} is not in checkpoints; add a method materialize_buffers(device)"
            )


def _state_key(path: Path, content: object) -> str | None:
    """The key of the tensors; None if the file is itself a dict of tensors."""
    if isinstance(content, Mapping):
        for key in ("state_dict_ema", "state_dict"):
            if isinstance(content.get(key), Mapping):
                return key
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return None
        found = f"it holds {_first([str(key) for key in content]) or 'nothing'}"
    else:
        found = f"it holds a {type(content).__name__}"
    raise AssetError(f"{path} is not an official checkpoint: no state_dict or state_dict_ema, {found}")


def _tensors_in(content: Any, key: str | None) -> dict[str, Tensor]:
    """The tensors of an unpickled checkpoint, without counters and other extras."""
    state = content if key is None else content[key]
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _map_safetensors(path: Path) -> Mapped:
    def reopen() -> Callable[[str], Tensor]:
        return _open_safetensors(path).get_tensor

    return Mapped(_open_safetensors(path).keys(), reopen, path=path)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, "a safetensors file", error) from None


def _map_shards(folder: Path) -> Joined:
    """The shards of an index as one mapping."""
    index = folder / INDEX
    homes = weight_map(_read_json(index), index)
    shards = sorted(set(homes.values()))
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise AssetError(
            f"{folder}: {len(absent)} of {len(shards)} shards are missing ({_first(absent)}): download them into it"
        )
    files = {name: _map_safetensors(folder / name) for name in shards}
    if lost := [key for key, name in homes.items() if key not in files[name]]:
        raise AssetError(f"{index} does not match its shards: {len(lost)} tensors are missing ({_first(lost)})")
    return Joined({key: files[name] for key, name in homes.items()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "a JSON file", error) from None
    if not isinstance(content, dict):
        raise AssetError(f"{path} holds a {type(content).__name__}, not an object: download it again")
    return content


def _no_weights(folder: Path) -> str:
    held = sorted(file.name for file in folder.iterdir())
    if not held:
        return f"{folder} is empty: download {CONFIG} and {WEIGHTS} into it"
    if other := [name for name in held if name.endswith((".safetensors", ".pth.tar", ".pth", ".pt", ".bin"))]:
        return f"{folder} holds no {WEIGHTS} and no {INDEX}, but {_first(other)}: use the path of that file"
    return f"{folder} holds no weights ({_first(held)}): download {WEIGHTS} into it"
