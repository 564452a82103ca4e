"""Shared by the ports of RADIO in timm and transformers: a ViT without heads, with less metadata than NVIDIA's own."""

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
"""Key of a foreign ``config.json`` with the metadata of agglo's exports that the foreign layout lacks."""

KEPT = ("pos_dropout", "num_global", "num_windowed")
"""Student options without effect in a foreign port, kept for loading the model again."""

OPTIONS = ("window", "align_corners", "num_global", "num_windowed")
"""Options that the caller may set when loading a foreign checkpoint."""


def notes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of agglo's exports in a configuration; empty for other files."""
    found = config.get(NOTES)
    return dict(found) if isinstance(found, Mapping) else {}


def chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None; raises :class:`ConfigError` for one that these models lack."""
    for key in given:
        if key not in OPTIONS:
            raise ConfigError(f"{key} is not an option of this model{nearest(key, OPTIONS)}")
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
    """Build a model on the meta device and fill it.

    Args:
        checkpoint: for its notes and for messages.
        options: of the ``vit`` student, without its kind.
        tensors: by agglo's names.
        tokens: names for the class tokens, unless the notes have them.
        summary_slots: indices of those in the summary.
        preferred_size: in pixels, unless the notes have it.
        licence: of the weights, unless the notes have it.
        given: options of the student from the caller; see :func:`chosen`.
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
    model.conditioner.float()  # bfloat16 has too few digits for pixel means
    return model.eval()


def channels(values: Any, _: Mapping[str, Tensor]) -> Tensor:
    """Mean or standard deviation from a ``config.json`` as ``(3, 1, 1)``, in the form of a derived tensor."""
    try:
        return torch.tensor([float(value) for value in values]).view(3, 1, 1)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"mean and std in config.json need three numbers each, found {values!r}") from None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)
