"""Import of optional dependencies when they are first needed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from agglo.types import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted module name, e.g. ``"timm"``.
        extra: agglo's extra that installs it, e.g. ``"timm"``.

    Raises:
        MissingExtraError: the module, or one of its dependencies, is not installed; the message has the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        top = module.partition(".")[0]
        why = f"{top} is not installed" if missing == top else f"{module} needs {missing}, which is not installed"
        raise MissingExtraError(f"{why}: {install_command(extra)}", name=missing) from error


def install_command(extra: str) -> str:
    """The pip command that installs an extra, for this installation: from PyPI, or the checkout that is in use."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "pyproject.toml").is_file() or not (checkout / "src" / "agglo").is_dir():
        return f'pip install "agglo[{extra}]"'
    return f'pip install -e "{"." if Path.cwd() == checkout else checkout}[{extra}]"'
