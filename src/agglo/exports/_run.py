"""The public way to an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agglo.config import build
from agglo.model.model import Model
from agglo.zoo.loading import load


def export(model: Model | str | Path, kind: str, folder: str | Path, **options: Any) -> Path:
    """Write a model as another library's checkpoint.

    Args:
        model: a model, or what :func:`agglo.load` takes.
        kind: the layout, e.g. ``transformers`` or ``timm`` (``agglo kinds exports``).
        folder: created if need be; one that holds another layout is refused.
        options: the kind's keys, e.g. ``dtype="bfloat16"``.

    Returns:
        The folder.

    Raises:
        ConfigError: no such kind or key, or the layout cannot express this model; says why.
    """
    loaded = model if isinstance(model, Model) else load(model)
    return build("exports", {"kind": kind, **options}).write(loaded, folder)
