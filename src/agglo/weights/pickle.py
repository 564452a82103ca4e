"""Official torch.hub pickles, read with an allow-list; no code of the file runs."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import struct
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agglo.types import AssetError
from agglo.weights.diagnosis import ZIP, damaged

# Errors of torch's restricted unpickler on malformed files.
DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)

REASON = "WeightsUnpickler error: "

_LOCK = threading.Lock()  # torch's allow-list is global: concurrent readers must not reset it


class _NumpyType:
    """Replacement of ``numpy.dtype`` in a pickle: keeps the type code only."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "<"

    def __str__(self) -> str:
        return str(self.code)


def _scalar(kind: _NumpyType, raw: bytes) -> bool | int | float | str:
    """Replacement of numpy's scalar constructor: booleans, numbers and text only, as plain Python values."""
    if not re.fullmatch(r"[biuf][1248]|U\d+", str(kind)):
        raise pickle.UnpicklingError(f"GLOBAL numpy.dtype.{kind}")  # torch's format, so that _foreign() lists it
    return np.frombuffer(raw, np.dtype(f"{kind.order}{kind}"), count=1)[0].item()


ALLOWED: list[Any] = [
    (argparse.Namespace, "argparse.Namespace"),
    (_NumpyType, "numpy.dtype"),
    *((_scalar, f"numpy.{package}.multiarray.scalar") for package in ("core", "_core")),
    # Pure paths do not access the file system.
    *(
        (pure, f"{module}.{kind}{system}Path")
        for system, pure in (("Posix", PurePosixPath), ("Windows", PureWindowsPath))
        for module in ("pathlib", "pathlib._local")
        for kind in ("", "Pure")
    ),
]
"""Allowed objects besides tensors, and their replacements. torch itself allows its tensors, dtypes and devices,
``OrderedDict`` and Python's plain values."""


def is_archive(path: Path) -> bool:
    """Whether a checkpoint is a zip archive (torch ≥ 1.6); only these can be memory-mapped."""
    with path.open("rb") as stream:
        return stream.read(len(ZIP)) == ZIP


def load(path: Path) -> Any:
    """Unpickle a checkpoint under the allow-list; tensors are memory-mapped if the file is a zip archive.

    Raises:
        AssetError: the file contains foreign objects (named, with the way out), or is damaged.
    """
    if path.suffix == ".safetensors":
        raise AssetError(f"{path} has the suffix of a safetensors file, not of a torch checkpoint (.pth.tar)")
    try:
        archive = is_archive(path)
        with _LOCK, warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")  # about pickle protocols and TorchScript; real problems raise
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
            except DAMAGE as error:
                if foreign := _foreign(path, error):
                    raise _refusal(path, foreign) from None
                raise
    except AssetError:
        raise
    except DAMAGE as error:
        # torch's message begins with the advice to trust the file; quote only its reason.
        raise damaged(path, "a torch checkpoint", str(error).partition(REASON)[2] or error) from None


def _foreign(path: Path, error: BaseException) -> list[str]:
    """Names of objects outside the allow-list, which must be active."""
    names = set(re.findall(r"GLOBAL ([\w.]+)", str(error)))
    names.update(word for word in ("TorchScript archives", "legacy .tar format") if word in str(error))
    if "Unsupported operand" in str(error) and _is_pickle(path):  # instructions of protocol 3 and later
        names.add("a pickle protocol that torch's safe reader does not support")
    with contextlib.suppress(*DAMAGE):
        names.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return sorted(names)


def _is_pickle(path: Path) -> bool:
    """Whether a file begins like a zip archive, or like a pickle of protocol 2 or later."""
    with path.open("rb") as stream:
        start = stream.read(len(ZIP))
    return start == ZIP or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _refusal(path: Path, foreign: list[str]) -> AssetError:
    more = f" and {len(foreign) - 10} more" if len(foreign) > 10 else ""
    return AssetError(
        f"{path} holds more than weights ({', '.join(foreign[:10])}{more}): reading these objects would run code from "
        "the file. Use the model's safetensors release on the Hugging Face hub; or convert the file once in a sandbox "
        "and load the result:\n"
        "    import json, torch\n"
        f"    c = torch.load({path.name!r}, map_location='cpu', weights_only=False)\n"
        "    args = json.dumps(vars(c['args']), default=lambda o: getattr(o, '__dict__', None) or str(o))\n"
        "    keep = {k: c[k] for k in ('state_dict', 'state_dict_ema') if k in c}\n"
        "    torch.save({**keep, 'args': json.loads(args)}, 'converted.pth.tar')"
    )


def plain(value: Any) -> Any:
    """Official args as JSON values, as in ``config.json`` of the Hugging Face layout.

    Namespaces become dicts; sequences and sets, lists; dtypes, their short names (``"bfloat16"``); all else, text.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    return str(value)
