"""The zoo name and options that load a model again, in other sessions and in the App's server."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from agglo.integrations.fiftyone.model import AggloModel
from agglo.integrations.fiftyone.options import Options
from agglo.integrations.fiftyone.zoo import ANY, register, zoo_names


def zoo_reference(model: Any) -> tuple[str, dict[str, Any]] | None:
    """Zoo name and arguments of a model that was loaded by agglo; registers the zoo source. None for other models.

    Args:
        model: any FiftyOne model.
    """
    if not isinstance(model, AggloModel):
        return None
    values = {each.name: getattr(model.config, each.name) for each in fields(Options)}
    changed = {
        each.name: list(values[each.name]) if isinstance(values[each.name], tuple) else values[each.name]
        for each in fields(Options)
        if values[each.name] != each.default
    }
    register()
    if model.name in zoo_names():
        return model.name, changed
    return ANY, {"model": model.name, **changed}
