"""Optional dependencies, imported when first needed; a missing one names the line that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from agglo.types import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted module name, e.g. ``"timm"``.
        extra: the extra of the agglo distribution that brings it, e.g. ``"timm"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the module, or one that it needs, is not installed; holds the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = error.name or module
        top = module.partition(".")[0]
        why = f"{top} is not installed" if absent == top else f"{module} needs {absent}, which is not installed"
        raise MissingExtraError(f'{why}: pip install "agglo[{extra}]"', name=absent) from error
