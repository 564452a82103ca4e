"""RADIO in NVIDIA's own layout: what its releases are called, and how one becomes a teacher.

transformers would read it by running the repository's own code, so it is converted once instead.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

_VERSION = re.compile(r"(?:[ce]-?)?radio[-_]?v\d[^/]*", re.IGNORECASE)
_REPOSITORY = re.compile(r"nvidia/(?:[ce]-?)?radio(?:[-_]?v?\d[^/]*|[-_][^/]*)?", re.IGNORECASE)
_COMMERCIAL = re.compile(r"(?:nvidia/)?c-radio[-_]?v(\d[^/]*)", re.IGNORECASE)
"""Each C-RADIO has a repository of its own, nvidia/C-RADIOv3-H, and a version name, c-radio_v3-h."""

COPIES_ALIGN = ("c-radio_v3-b", "c-radio_v3-h")
"""Loaded as their repositories' code has it, these resize positions with align_corners, which transformers cannot."""

_NO_PLACE = (
    (r"e-?radio.*", "its trunk is no transformer"),
    (r"radio[-_]?1d.*", "its tokens lie in one dimension"),
    (r"(?:radio(?:[-_]?v2\.5)?-g|dino_v2).*", "it has a norm after its last block"),
    (r".*mlpnorm", "it has norms inside its MLPs"),
    (r"radio.*-norm", "its map goes through a normalizer"),
)
"""By release or by ``args.model``: what transformers' ``RadioModel`` has no place for."""


def is_version(name: str) -> bool:
    """Whether it is the version name of a release, ``c-radio_v3-h``, or written like one: no name of a repository."""
    return _VERSION.fullmatch(name) is not None


def is_repository(name: str) -> bool:
    """Whether a repository, ``owner/name``, is called as NVIDIA calls those of its releases."""
    return _REPOSITORY.fullmatch(name) is not None


def advice(where: str, name: str, config: Mapping[str, Any] | None = None, *, local: bool = False) -> str:
    """What to do with a release that was named as a teacher.

    Args:
        where: whose key it is, for messages.
        name: its version name, its repository without a revision, or the folder it lies in.
        config: its ``config.json``, where that is known.
        local: whether ``name`` is a folder.
    """
    config = config or {}
    said = f"{where}: {name} is a RADIO in NVIDIA's own layout, which this kind does not read"
    why = _no_place(name, config)
    if why is not None:
        return f"{said}, and no layout of transformers holds it: {why}. Name another one: `model: nvidia/C-RADIOv4-H`"
    # By its version name a release is loaded as torch.hub's code has it, which transformers can express.
    release = None if local else _release(name)
    command = f"`agglo export {shlex.quote(release or name)} --to transformers -o FOLDER`"
    if release is None and not {_release(each) for each in _names(name, config)}.isdisjoint(COPIES_ALIGN):
        command = f'`agglo.export(agglo.load({name!r}, align_corners=False), "transformers", "FOLDER")` in Python'
    return f"{said}. Convert it once, with {command}, and name that folder: `model: FOLDER`"


def _release(name: str) -> str | None:
    """The version name of a C-RADIO, from however it is written."""
    found = _COMMERCIAL.fullmatch(name)
    return None if found is None else f"c-radio_v{found[1].lower()}"


def _names(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """What a release is called by its repository or folder, and by its own ``config.json``."""
    return name.rstrip("/").rpartition("/")[2], str(config.get("version", ""))


def _no_place(name: str, config: Mapping[str, Any]) -> str | None:
    """What transformers has no place for, as a phrase; the configuration knows better than a name."""
    args = config.get("args") or {}
    model = str(args.get("model", ""))
    if args.get("model_norm"):
        model = "dino_v2"
    elif config.get("feature_normalizer_config"):
        model = "radio-norm"
    for each in (model,) if model else _names(name, config):
        for pattern, why in _NO_PLACE:
            if re.fullmatch(pattern, each, re.IGNORECASE):
                return why
    return None
