"""The contract of an eval: a model in, named numbers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from agglo.types import Features, FeatureSpec

Progress = Callable[[str], None]
"""Called with a short phrase now and then, so that long work can be seen to move."""


Place = Literal["data", "answers", "weights", "output"]
"""What a file or folder is to an eval whose key names it.

- ``data``: what is true (a benchmark's own file); its content is part of the data's hash.
- ``answers``: what another program made of the model; its content is part of what makes two measurements the same, and
  the answers of two models compare.
- ``weights``: of a fixed part of the eval, a name on the hub or a place; what a place holds is part of the protocol.
- ``output``: written to; an eval that writes is run each time.
"""


class Backbone(Protocol):
    """What an eval measures: a Model, a Teacher, anything that encodes images."""

    spec: FeatureSpec

    def __call__(self, images: Tensor) -> Features:
        """RGB ``(B, 3, H, W)`` in [0, 1] to features."""
        ...


class Eval(ABC):
    """One benchmark; its keyword-only constructor arguments are its protocol.

    Attributes:
        needs_text: only models with ``encode_text`` and ``encode_image`` can be measured.
        lower_is_better: names of the metrics that are better when lower; all others are better when higher.
        deterministic: the same call gives the same numbers; False for evals that measure time.
        needs_heads: it reads heads beside those that speak a text tower's language: all must be loaded.
        bundled: it runs on its defaults; False for evals that must be told of files from outside.
        revision: goes up when the arithmetic changes: results of two revisions do not compare.
        places: the keys that name files or folders (one, or a list), and what those are to the eval. Where they lie is
            never part of the protocol.
    """

    needs_text: bool = False
    needs_heads: bool = False
    lower_is_better: frozenset[str] = frozenset()
    deterministic: bool = True
    bundled: bool = True
    revision: int = 1
    places: ClassVar[Mapping[str, Place]] = {}

    @abstractmethod
    def run(self, model: Backbone, progress: Progress | None = None) -> dict[str, float]:
        """Measure ``model``; deterministic, unless the class says otherwise.

        Raises:
            TypeError: the model lacks what this eval needs (a text tower, a summary, a spatial map).
        """

    def members(self, key: str) -> Sequence[str] | None:
        """Of a folder of data: the files that are read, by their names below it; None: all that lie there."""
        return None
