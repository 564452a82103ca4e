"""The contract of an export, a model written in another library's layout, and the public function that runs one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from agglo.config import build
from agglo.model.model import Model
from agglo.zoo.loading import load


class Export(ABC):
    """A layout of another library. A kind's constructor takes its options as keyword-only parameters."""

    @abstractmethod
    def write(self, model: Model, folder: str | Path) -> Path:
        """Write the model; files are replaced atomically.

        Parts that the layout cannot hold and that do not change the backbone's features (heads) are left out, with a
        warning and a note in the card.

        Args:
            model: in any precision, on any device; unchanged.
            folder: created if needed; an earlier export of the same kind is replaced.

        Returns:
            The folder.

        Raises:
            ConfigError: the architecture does not fit the layout, or the folder holds a model of another layout.
            ValueError: a weight is not finite in the precision on disk.
            StorageError: a file cannot be written.
        """


def export(model: Model | str | Path, kind: str, folder: str | Path, **options: Any) -> Path:
    """Write a model as another library's checkpoint.

    Args:
        model: a model, or an argument of :func:`agglo.load`.
        kind: the layout, e.g. ``transformers`` or ``onnx`` (``agglo kinds exports``).
        folder: created if needed; refused if it holds another layout.
        options: the kind's keys, e.g. ``dtype="bfloat16"``.

    Returns:
        The folder.

    Raises:
        ConfigError: no such kind or key, or the layout cannot express this model.
    """
    writer = build("exports", {"kind": kind, **options})
    # Official checkpoints load their heads only where they are named.
    loaded = model if isinstance(model, Model) else load(model, heads=options.get("heads"))
    return writer.write(loaded, folder)
