"""What the native ports of RADIO share: they hold a ViT without heads, and say less of it than its own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agglo.config import nearest
from agglo.model.model import Model
from agglo.types import ConfigError
from agglo.weights.reading import Checkpoint, assign

NOTES = "agglo"
"""The key of a foreign ``config.json`` under which our exports keep what the foreign layout cannot say."""

KEPT = ("pos_dropout", "num_global", "num_windowed")
"""Options of a student that change nothing in a foreign port, and are wanted again when the model comes back."""

OPTIONS = ("window", "align_corners", "num_global", "num_windowed")
"""What may be chosen when a foreign checkpoint is loaded."""


def notes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What one of our exports left in a configuration; empty for a file that somebody else wrote."""
    found = config.get(NOTES)
    return dict(found) if isinstance(found, Mapping) else {}


def chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the caller sets.

    Raises:
        ConfigError: one that these models do not have.
    """
    for key in given:
        if key not in OPTIONS:
            raise ConfigError(f"{key} is no option of this model{nearest(key, OPTIONS)}")
    return {key: value for key, value in given.items() if value is not None}


def build(
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    tokens: Sequence[str],
    summary_slots: Sequence[int],
    preferred_size: int,
    licence: str | None,
    given: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Model:
    """A model on the meta device, then its tensors.

    Args:
        checkpoint: for its notes and for messages.
        options: of the ``vit`` student, without its kind.
        tensors: by our names.
        tokens: names for the class tokens, used where the notes hold none.
        summary_slots: which of them are the summary.
        preferred_size: in pixels, used where the notes hold none.
        licence: of the weights, used where the notes hold none.
        given: options of the student that the caller chose; see :func:`chosen`.
        dtype, device: as for :func:`agglo.weights.reading.assign`.
    """
    left = notes(checkpoint.config)
    kept = {key: left[key] for key in KEPT if key in left}
    names = left.get("tokens")
    provenance = left.get("provenance")
    if not isinstance(provenance, Mapping):
        provenance = {"license": licence or "unknown", "max_size": options["max_grid"] * options["patch"]}
    preferred = left.get("preferred_size")
    with torch.device("meta"):
        model = Model(
            {"kind": "vit", **options, **kept, **chosen(given)},
            {},
            tokens=names if _are_names(names) else tokens,
            summary_slots=summary_slots,
            preferred_size=preferred if isinstance(preferred, int) and preferred > 0 else preferred_size,
            provenance={**provenance, "source": checkpoint.source},
            installed=False,
        )
    assign(model, tensors, dtype, device, source=checkpoint.source)
    model.conditioner.float()  # buffers of 8 mantissa bits would shift every pixel
    return model.eval()


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
