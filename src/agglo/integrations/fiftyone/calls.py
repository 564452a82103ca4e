"""What a call of FiftyOne knows and does not pass to its model: the samples, the field, ``skip_failures``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MODULE = "fiftyone.core.models"
_FIELDS = {"compute_embeddings": "embeddings_field", "apply_model": "label_field"}
"""Function of FiftyOne → its argument with the name of the field."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of FiftyOne's ``compute_embeddings`` or ``apply_model``.

    Args:
        samples: the collection.
        field: name of the field to fill; a mapping of results to fields; None for results that are returned.
        skip_failures: whether the call continues after an error.
    """

    samples: Any
    field: str | Mapping[str, str] | None
    skip_failures: bool

    def fields(self, keys: list[str] | None) -> list[str]:
        """Names of the fields that are filled, of frames without their prefix.

        Args:
            keys: names of several results, or None for a single one.
        """
        if self.field is None:
            return []
        if isinstance(self.field, Mapping):
            return list(self.field.values())
        name = self.field.removeprefix("frames.") if self.samples.media_type == "video" else self.field
        return [name] if keys is None else [f"{name}_{key}" for key in keys]


def current_call() -> Call | None:
    """The call of FiftyOne that is running, or None.

    FiftyOne 1.22.1 enters a model as a context without arguments; the name of the field and ``skip_failures`` are only
    in the frames of its running functions.
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_name
        if name in _FIELDS and frame.f_globals.get("__name__") == _MODULE:
            known = frame.f_locals
            return Call(known["samples"], known.get(_FIELDS[name]), bool(known.get("skip_failures", True)))
        frame = frame.f_back
    return None
