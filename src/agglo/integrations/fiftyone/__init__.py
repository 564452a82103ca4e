"""agglo in FiftyOne: a zoo of models, embeddings, heatmaps, text search, and the scores that FiftyOne gets wrong.

>>> from agglo.integrations.fiftyone import load_model
>>> model = load_model("agglo-lite")
>>> dataset.compute_embeddings(model, embeddings_field="agglo")

Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agglo.integrations.fiftyone.duplicates import leaky_splits, near_duplicates
    from agglo.integrations.fiftyone.encoding import Report, apply_model, compute_embeddings, compute_patch_embeddings
    from agglo.integrations.fiftyone.index import similarity
    from agglo.integrations.fiftyone.layout import visualization
    from agglo.integrations.fiftyone.model import AggloModel
    from agglo.integrations.fiftyone.pipeline import Settings, curate
    from agglo.integrations.fiftyone.scores import representativeness, uniqueness
    from agglo.integrations.fiftyone.zoo import check_database, load_model, manifest, register, write_source

__all__ = [
    "AggloModel",
    "Report",
    "Settings",
    "apply_model",
    "check_database",
    "compute_embeddings",
    "compute_patch_embeddings",
    "curate",
    "leaky_splits",
    "load_model",
    "manifest",
    "near_duplicates",
    "register",
    "representativeness",
    "similarity",
    "uniqueness",
    "visualization",
    "write_source",
]

_HOME = {
    "AggloModel": "model",
    "Report": "encoding",
    "Settings": "pipeline",
    "apply_model": "encoding",
    "check_database": "zoo",
    "compute_embeddings": "encoding",
    "compute_patch_embeddings": "encoding",
    "curate": "pipeline",
    "leaky_splits": "duplicates",
    "load_model": "zoo",
    "manifest": "zoo",
    "near_duplicates": "duplicates",
    "register": "zoo",
    "representativeness": "scores",
    "similarity": "index",
    "uniqueness": "scores",
    "visualization": "layout",
    "write_source": "zoo",
}
"""Public name → the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
