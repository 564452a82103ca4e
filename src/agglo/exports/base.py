"""The contract of an export: a model goes in, a folder that somebody else's program loads comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from agglo.model.model import Model


class Export(ABC):
    """A layout of another library. A kind's constructor takes its options as keyword-only parameters."""

    @abstractmethod
    def write(self, model: Model, folder: str | Path) -> Path:
        """Write the model; each file is replaced whole.

        What the layout has no place for and what does not change its numbers (heads) is left out, with a warning and a
        word in the card.

        Args:
            model: in any precision, on any device; it is not changed.
            folder: created if need be; what an earlier export of the same kind left there is replaced.

        Returns:
            The folder.

        Raises:
            ConfigError: the architecture does not fit, with the reason and the next move; or the folder holds a model
                of another layout.
            ValueError: a weight is not finite, or leaves the range of the precision on disk.
            StorageError: it cannot be written.
        """
