"""Import of optional dependencies when they are first needed."""

from __future__ import annotations

import importlib
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
        raise MissingExtraError(f'{why}: pip install "agglo[{extra}]"', name=missing) from error
