"""agglo: agglomerative vision backbones, one student distilled from several teachers.

>>> import agglo
>>> model = agglo.load("agglo-lite")
>>> output = model("cup.jpg")        # output.summary (1, D), output.spatial (1, D', H, W), output.heads[teacher]

Public names are imported when first used, so that ``import agglo`` is fast and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agglo.embedding.encoding import embed
    from agglo.exports.base import export
    from agglo.harness.running import evaluate
    from agglo.model.creation import create
    from agglo.model.model import Model
    from agglo.recipe import Recipe
    from agglo.segmentation.run import segment
    from agglo.training.run import train
    from agglo.types import Features, FeatureSpec, Output, View
    from agglo.zoo.info import describe
    from agglo.zoo.loading import list_models, load, push

__version__ = "0.1.0"

__all__ = [
    "FeatureSpec",
    "Features",
    "Model",
    "Output",
    "Recipe",
    "View",
    "__version__",
    "create",
    "describe",
    "embed",
    "evaluate",
    "export",
    "list_models",
    "load",
    "push",
    "segment",
    "train",
]

_HOME = {
    "FeatureSpec": "agglo.types",
    "Features": "agglo.types",
    "Model": "agglo.model.model",
    "Output": "agglo.types",
    "Recipe": "agglo.recipe",
    "View": "agglo.types",
    "create": "agglo.model.creation",
    "describe": "agglo.zoo.info",
    "embed": "agglo.embedding.encoding",
    "evaluate": "agglo.harness.running",
    "export": "agglo.exports.base",
    "list_models": "agglo.zoo.loading",
    "load": "agglo.zoo.loading",
    "push": "agglo.zoo.loading",
    "segment": "agglo.segmentation.run",
    "train": "agglo.training.run",
}
"""Public name → the module that defines it."""

_FORMER = {"distill": "train"}
"""Name of an earlier version → its name now; scripts that use it keep working."""


def __getattr__(name: str) -> Any:
    if name in _FORMER:
        return __getattr__(_FORMER[name])
    if name not in _HOME:
        raise AttributeError(f"module 'agglo' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
