"""What the exports of a RADIO ViT share: what fits, what is left out, and how a folder is written."""

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
    """The student, if nothing in the model but its heads would be missing.

    Args:
        model: what shall be exported.
        where: the foreign architecture, for messages.

    Raises:
        ConfigError: it does not fit; says why and what to do.
    """
    student, kind = model.student, model.student_config["kind"]
    if not isinstance(student, ViT):
        raise ConfigError(f"{where} is a ViT, this model's student is a {kind}: only students of kind vit fit")
    if student.window:
        raise ConfigError(
            f"{where} has no windows, and this model looks through windows of {student.window} patches: load it "
            "without window= (the weights are the same)"
        )
    if student.patch_generator.position != "cropped":
        raise ConfigError(
            f"{where} crops its position table after resizing it, this student has position: "
            f"{student.patch_generator.position}; only position: cropped fits"
        )
    if model.student_config["mlp_norm"]:
        raise ConfigError(f"{where} has no norm (of epsilon 1e-5) inside its MLPs, this student has: mlp_norm: true")
    if student.pool != "token":
        raise ConfigError(f"{where} has a class token for its summary, this student has pool: {student.pool}")
    if model.feature_normalizer is not None:
        raise ConfigError(f"{where} has no feature normalizer, and this model's map goes through one")
    if not isinstance(model.conditioner, Conditioner):
        raise ConfigError("this model's conditioner was taken: put it back (model.conditioner = ...) or load it again")
    return student


def left_out(model: Model, where: str) -> list[str]:
    """What the foreign layout has no place for, warned of and returned as phrases for the card."""
    parts = []
    # An official checkpoint is loaded without its heads, and they stay behind all the same.
    heads = dict.fromkeys([*model.heads, *model.provenance.get("available_heads", ())])
    if heads:
        parts.append(f"the heads ({', '.join(heads)})")
    if model.intermediate_normalizer is not None:
        parts.append("the normalizers of intermediate features")
    if parts:
        warnings.warn(f"{where} has no place for {' and '.join(parts)}: left out", stacklevel=3)
    return parts


def notes(model: Model) -> dict[str, Any]:
    """What the foreign layout cannot say and our own importer wants to know; foreign readers ignore it."""
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
    """The preferred side, in pixels, as a multiple of a patch."""
    return nearest_size((model.preferred_size, model.preferred_size), model.spec.step)[0]


def hidden_width(student: ViT) -> int:
    """Of the MLPs."""
    return next(m.in_features for n, m in student.blocks[0].mlp.named_modules() if n in ("fc2", "w3"))  # type: ignore[return-value]


def ratio(width: int, hidden: int) -> float:
    """A number whose product with ``width`` is ``hidden`` when its fraction is cut off, as others compute it."""
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
        model: what was exported.
        name: of the folder.
        library: the library that loads it.
        usage: Python code that does.
        missing: phrases, from :func:`left_out`.
        remarks: what its user has to know.
    """
    facts = model.provenance
    licence = str(facts.get("license", "other"))
    front = f"license: {licence.lower()}" if " " not in licence else f"license: other\nlicense_name: {licence!r}"
    teachers = "\n".join(f"- `{n}`: {t}" for n, t in facts.get("teachers", {}).items()) or "- unknown"
    lost = f"Left out, because {library} has no place for them: {', '.join(missing)}.\n\n" if missing else ""
    size = sum(p.numel() for p in model.student.parameters()) / 1e6
    return (
        f"---\nlibrary_name: {library}\n{front}\npipeline_tag: image-feature-extraction\n"
        "tags: [agglomerative, feature-extraction, agglo]\n---\n\n"
        f"# {name}\n\nThe backbone of an agglomerative vision model ({size:.1f} M parameters, patches of "
        f"{model.spec.stride} pixels, at its best at {side(model)} pixels), written for {library} by agglo, which "
        f"loads it too (`agglo.load`).\n\n```python\n{usage}```\n\n{remarks}\n\n"
        f"{lost}Teachers and their licences:\n\n{teachers}\n"
    )
