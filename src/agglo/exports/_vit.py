"""Shared by the exports of a RADIO ViT: compatibility checks, notes, the card and the folder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agglo.checkpoints.foreign import KEPT, NOTES
from agglo.files import read_json
from agglo.model.artefact import CONFIG
from agglo.model.artefact import write_folder as write
from agglo.model.model import Model
from agglo.preprocess import Conditioner, nearest_size
from agglo.students.vit import ViT
from agglo.types import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]


def fitting(model: Model, where: str) -> ViT:
    """Return the student if the layout can express the model, heads excepted.

    Args:
        model: to be exported.
        where: the foreign architecture, for messages.

    Raises:
        ConfigError: the model does not fit.
    """
    student, kind = model.student, model.student_config["kind"]
    if not isinstance(student, ViT):
        raise ConfigError(f"student: {where} is a ViT, this model's student is a {kind}; only kind vit can be exported")
    if student.window:
        raise ConfigError(f"window: {student.window}, but {where} has no windows: load the model without window=")
    if student.patch_generator.position != "cropped":
        raise ConfigError(
            f"position: {student.patch_generator.position}, but {where} resizes its position table before cropping; "
            "only position: cropped can be exported"
        )
    if model.student_config["mlp_norm"]:
        raise ConfigError(f"mlp_norm: true, but {where} has no norm inside its MLPs")
    if student.pool != "token":
        raise ConfigError(f"pool: {student.pool}, but {where} has a class token for its summary")
    if model.feature_normalizer is not None:
        raise ConfigError(f"this model has a feature normalizer, but {where} has none")
    if not isinstance(model.conditioner, Conditioner):
        raise ConfigError("this model's conditioner was taken: restore model.conditioner, or load it again")
    return student


def left_out(model: Model, where: str) -> list[str]:
    """Warn of the parts that the foreign layout cannot hold; return them as phrases for the card."""
    parts = []
    # Includes the heads of an official checkpoint that were not loaded.
    heads = dict.fromkeys([*model.heads, *model.provenance.get("available_heads", ())])
    if heads:
        parts.append(f"the heads ({', '.join(heads)})")
    if model.intermediate_normalizer is not None:
        parts.append("the normalizers of intermediate features")
    if parts:
        warnings.warn(f"{where} does not support {' and '.join(parts)}; omitted", stacklevel=3)
    return parts


def notes(model: Model) -> dict[str, Any]:
    """Configuration that only agglo's importer reads; the foreign library ignores it."""
    config = model.student_config
    return {
        NOTES: {
            "tokens": list(model.tokens),
            "class_tokens": model.student.spec.slots,
            "summary_slots": list(model.summary_slots),
            "preferred_size": model.preferred_size,
            **{key: config[key] for key in KEPT if config[key] is not None},
            "provenance": model.provenance,
        }
    }


def side(model: Model) -> int:
    """The preferred side in pixels, rounded to whole patches."""
    return nearest_size((model.preferred_size, model.preferred_size), model.spec.step)[0]


def hidden_width(student: ViT) -> int:
    """Hidden width of the MLPs."""
    return next(m.in_features for n, m in student.blocks[0].mlp.named_modules() if n in ("fc2", "w3"))  # type: ignore[return-value]


def ratio(width: int, hidden: int) -> float:
    """A ratio with ``int(width * ratio) == hidden``, as other libraries compute it."""
    value = hidden / width
    while int(width * value) < hidden:
        value = math.nextafter(value, math.inf)
    return value


def scaled(student: ViT) -> bool:
    """Whether the blocks have layer scales."""
    return not isinstance(student.blocks[0].ls1, nn.Identity)


# --- the folder -------------------------------------------------------------------------------------------------------


def write_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    texts: Mapping[str, str],
    dtype: Precision,
    same: Callable[[Mapping[str, Any]], bool],
) -> Path:
    """Write an export, see :func:`agglo.model.artefact.write_folder`; a conditioner's constants are not cast.

    Args:
        folder: created if needed.
        tensors: by their foreign names.
        texts: file name to content, ``config.json`` and the card among them.
        dtype: precision on disk.
        same: whether a configuration is of the layout that is written.

    Raises:
        ConfigError: the folder holds a model of another layout.
    """
    folder = Path(folder).expanduser()
    if (folder / CONFIG).is_file() and not same(read_json(folder / CONFIG)):
        raise ConfigError(f"{folder} holds a model of another layout: name another folder")
    return write(folder, tensors, texts, getattr(torch, dtype), keep=("conditioner",))


def card(model: Model, name: str, *, library: str, usage: str, missing: list[str], remarks: str) -> str:
    """A model card for the foreign library.

    Args:
        model: the exported model.
        name: of the folder.
        library: the library that loads it.
        usage: Python code that loads it.
        missing: phrases of :func:`left_out`.
        remarks: limitations.
    """
    facts = model.provenance
    licence = str(facts.get("license", "other"))
    front = f"license: {licence.lower()}" if " " not in licence else f"license: other\nlicense_name: {licence!r}"
    teachers = "\n".join(f"- `{n}`: {t}" for n, t in facts.get("teachers", {}).items()) or "- unknown"
    omitted = f"Left out, because {library} has no place for them: {', '.join(missing)}.\n\n" if missing else ""
    size = sum(p.numel() for p in model.student.parameters()) / 1e6
    return (
        f"---\nlibrary_name: {library}\n{front}\npipeline_tag: image-feature-extraction\n"
        "tags: [agglomerative, feature-extraction, agglo]\n---\n\n"
        f"# {name}\n\nThe backbone of an agglomerative vision model ({size:.1f} M parameters, patches of "
        f"{model.spec.stride} pixels, preferred size {side(model)} pixels), written for {library} by agglo, which "
        f"loads it too (`agglo.load`).\n\n```python\n{usage}```\n\n{remarks}\n\n"
        f"{omitted}Teachers and their licences:\n\n{teachers}\n"
    )
