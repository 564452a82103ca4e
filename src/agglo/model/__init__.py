"""The saved and loaded unit: conditioner, student and heads; its folder, its inputs, and its creation from a recipe."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazy: the modules of this package import one another.
    if name == "Model":
        from agglo.model.model import Model

        return Model
    raise AttributeError(f"module 'agglo.model' has no attribute {name!r}")
