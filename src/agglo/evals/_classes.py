"""Classes that a source should have and has no images of."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from agglo.sources.base import Source

_SHOWN = 3


def warn_of_empty(source: Source) -> None:
    """A warning that counts and names the class folders without images: an answer is never one of their classes."""
    folders: Callable[[], list[str]] | None = getattr(source, "empty_folders", None)
    empty = folders() if folders is not None else []
    if empty:
        shown = ", ".join(empty[:_SHOWN]) + (", ..." if len(empty) > _SHOWN else "")
        where = getattr(source, "root", type(source).__name__)
        warnings.warn(
            f"{len(empty)} class folder{'s' if len(empty) > 1 else ''} of {where} without an image ({shown}): left out "
            "of the classes; add the images, or remove what is no class",
            stacklevel=3,
        )
