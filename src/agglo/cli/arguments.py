"""Options that several commands share, and checks of their values."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from agglo.types import ConfigError

OVERWRITE = typer.Option(False, "--overwrite", help="Replace the output if it exists.")
JSON = typer.Option(None, "--json", help="Also write the numbers to this .json file.")
OVERWRITE_JSON = typer.Option(False, "--overwrite", help="Replace the .json file if it exists.")


DEVICE = typer.Option(None, help="cpu, cuda, cuda:1, mps; by default cuda if available, else cpu.")


def chosen_device(device: str | None) -> str:
    """The device of ``--device``, after a test that it works: by default CUDA if available, else the CPU.

    Raises:
        ConfigError: it does not work.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"--device {device} cannot be used here ({first}): try --device cpu") from None
    return device


def checked_json(path: Path | None, *, overwrite: bool) -> Path | None:
    """The path of a .json file to write.

    Raises:
        ConfigError: another ending, or the file exists and ``overwrite`` is not set.
    """
    if path is None:
        return None
    from agglo.embedding import check_output

    return check_output(path, overwrite=overwrite, endings=(".json",))


def is_main_process() -> bool:
    """Whether this is the only process or the first of those started by torchrun. Does not import torch."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
