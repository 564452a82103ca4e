"""Official RADIO and C-RADIO checkpoints, in torch.hub and Hugging Face layout, as agglo models.

Widths and depths are read off the tensors' shapes; token layout, heads and teachers off the training arguments; other
facts come from the release table (:mod:`agglo.zoo.releases`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agglo.checkpoints.heads import read_head
from agglo.checkpoints.spectral import materialized
from agglo.checkpoints.trunks import Trunk, recognize
from agglo.config import nearest
from agglo.model.heads import HeadConfig
from agglo.model.model import Model
from agglo.types import AggloError, AssetError, ConfigError
from agglo.weights.reading import Checkpoint, assign, read_folder, read_hub, read_safetensors
from agglo.weights.tensors import Renamed

PICKLES = (".tar", ".pth", ".pt", ".bin", ".ckpt")
OPTIONS = ("window", "align_corners", "num_global", "num_windowed", "neck", "num_tokens")


@dataclass(frozen=True, slots=True)
class Release:
    """Facts of a release that its checkpoint lacks.

    Args:
        preferred_size: recommended side in pixels.
        max_size: largest side of its training; larger ones run.
        num_global, num_windowed: of windowed attention.
        align_corners: of the position table's resize.
        licence: of the weights.
    """

    preferred_size: int = 512
    max_size: int = 2048
    num_global: int = 4
    num_windowed: int | None = None
    align_corners: bool = False
    licence: str = "unknown"


def read(path: str | Path) -> Checkpoint:
    """Open a file or folder in any official layout.

    Raises:
        AssetError: damaged, with foreign objects, or not a checkpoint.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return read_folder(path)
    return read_hub(path) if path.suffix in PICKLES else read_safetensors(path)


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` belongs to a RADIO release on the Hugging Face hub."""
    return isinstance(config.get("args"), dict) and "teachers" in config["args"]


def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    heads: Iterable[str] | None = None,
    release: Release | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    fill: bool = True,
    **student: Any,
) -> Model:
    """An official checkpoint as an agglo model.

    Args:
        checkpoint: of :func:`read`, with ``args``.
        heads: teachers whose heads to load; None for none, ``"all"`` for all, ``"text"`` for those with a text tower.
        release: facts that the checkpoint lacks; by default from its ``config.json``, else those of the newest release.
        dtype: of the weights; None to keep the file's.
        device: target.
        fill: False to leave the weights on the meta device, without reading them.
        student: options of the student to change: ``window``, ``align_corners``, ``neck``, ``num_tokens``.

    Returns:
        The model in eval mode; only the weights of the chosen heads are read.

    Raises:
        ConfigError: unknown head, architecture or option.
        AssetError: tensors of another architecture; names the first ten missing or left over.
    """
    args = _args(checkpoint)
    try:
        return _from_checkpoint(checkpoint, args, heads, release, dtype, device, fill, student)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, AggloError):
            raise
        raise AssetError(
            f"{checkpoint.source}: its args or tensors are not those of a RADIO release "
            f"({type(error).__name__}: {error})"
        ) from error


def _from_checkpoint(
    checkpoint: Checkpoint,
    args: Mapping[str, Any],
    heads: Iterable[str] | None,
    release: Release | None,
    dtype: torch.dtype | None,
    device: torch.device | str,
    fill: bool,
    student: Mapping[str, Any],
) -> Model:
    release = release or _release(checkpoint.config)
    canonical = Renamed(checkpoint.tensors, _canonical)
    # EMA checkpoints have the reparametrisations folded in: no-op.
    plain = materialized(canonical, args)
    trunk = recognize(canonical, args, checkpoint.source)
    options = {**trunk.options, **_windows(trunk.options["kind"], release), **_student_options(trunk.options, student)}
    found = {n: _head(plain, checkpoint, args, n, len(trunk.tokens)) for n in _wanted(heads, plain, args)}
    trunk = _with_slots(trunk, 1 + max((config.slot for config, _ in found.values()), default=0))
    options |= {key: trunk.options[key] for key in ("registers",) if key in trunk.options}
    normalizers: dict[Any, Any] = {}
    if "_feature_normalizer.tx" in plain:
        normalizers["features"] = True
    if "_intermediate_feature_normalizer.rotation" in plain:
        shape = plain["_intermediate_feature_normalizer.rotation"].shape
        normalizers["intermediates"] = "per_block" if len(shape) == 3 else True
    with torch.device("meta"):
        model = Model(
            options,
            {name: config for name, (config, _) in found.items()},
            tokens=trunk.tokens,
            summary_slots=_summary_slots(canonical, args, len(trunk.tokens)),
            normalizers=normalizers,
            preferred_size=release.preferred_size,
            provenance={
                "source": checkpoint.source,
                "license": release.licence,
                "max_size": release.max_size,
                "teachers": {str(t["name"]): str(t.get("model") or t.get("type")) for t in args.get("teachers") or ()},
                "available_heads": _available(plain, args),
            },
        )
    if not fill:
        return model.eval()
    names = {official: f"heads.{name}.{ours}" for name, (_, keys) in found.items() for ours, official in keys.items()}
    derived = {f"student.{ours}": derive for ours, derive in trunk.derived.items()}
    if "input_conditioner.norm_mean" not in plain:
        for name in ("mean", "std"):
            derived[f"conditioner.{name}"] = partial(_constant, getattr(model.student, name))
    renamed = Renamed(plain, lambda key: _ours(key, names, trunk.names), derived=derived)
    assign(model, _without_strays(renamed, model, checkpoint.source), dtype, device, source=checkpoint.source)
    for name in ("mean", "std"):  # half precision has too few digits for pixel means
        setattr(model.conditioner, name, renamed[f"conditioner.{name}"].to(device, torch.float32, copy=True))
    return model.eval()


# --- names ------------------------------------------------------------------------------------------------------------

_HUGGING_FACE = (
    ("radio_model.model.", "base_model."),
    ("radio_model.input_conditioner.", "input_conditioner."),
    ("radio_model.feature_normalizer.", "_feature_normalizer."),
    ("radio_model.inter_feature_normalizer.", "_intermediate_feature_normalizer."),
    ("radio_model.summary_idxs", "summary_idxs"),
)
_OURS = (
    ("input_conditioner.norm_", "conditioner."),
    ("_feature_normalizer.", "feature_normalizer."),
    ("_intermediate_feature_normalizer.", "intermediate_normalizer."),
)
_ADAPTOR = re.compile(r"radio_model\.adaptors\.(.+)\.(head_mlp|feat_mlp)\.(.+)")


def _canonical(key: str) -> str | None:
    """A key of either layout as in torch.hub."""
    for prefix, hub in _HUGGING_FACE:
        if key.startswith(prefix):
            return hub + key.removeprefix(prefix)
    if match := _ADAPTOR.fullmatch(key):
        name, which, rest = match.groups()
        return f"{'_heads' if which == 'head_mlp' else '_feature_projections'}.{name}.{rest}"
    return key


def _ours(key: str, heads: Mapping[str, str], trunk: Any) -> str | None:
    if key in heads:
        return heads[key]
    for official, ours in _OURS:
        if key.startswith(official):
            return ours + key.removeprefix(official)
    if not key.startswith("base_model."):
        return None
    name = trunk(key)
    return None if name is None else f"student.{name}"


def _constant(values: tuple[float, float, float], _: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def _without_strays(tensors: Renamed, model: Model, source: str) -> Mapping[str, Tensor]:
    """Drop unknown tensors outside the blocks, with a warning: they are unused."""
    expected = model.state_dict()
    strays = [key for key in tensors if key not in expected]
    lost = [key for key in expected if key not in tensors]
    if not strays or lost or any(".blocks." in key or ".levels." in key for key in strays):
        return tensors  # complete, or assign() raises
    warnings.warn(f"{source}: {len(strays)} tensors are not used: {', '.join(strays[:10])}", stacklevel=4)
    return Renamed(tensors, lambda key: None if key in strays else key)


# --- training arguments -----------------------------------------------------------------------------------------------


def _args(checkpoint: Checkpoint) -> dict[str, Any]:
    if not checkpoint.args.get("model"):
        raise ConfigError(
            f"{checkpoint.source}: no training arguments. An official checkpoint has `args` with `model` and "
            "`teachers`, in the pickle or in config.json beside model.safetensors; use the folder of both"
        )
    return checkpoint.args


def _release(config: Mapping[str, Any]) -> Release:
    preferred = config.get("preferred_resolution") or (512, 512)
    return Release(preferred_size=int(preferred[0]), max_size=int(config.get("max_resolution") or 2048))


def _windows(kind: str, release: Release) -> dict[str, Any]:
    if kind == "hybrid":
        return {}
    rule = {"num_global": release.num_global, "num_windowed": release.num_windowed} if kind == "vit" else {}
    return {"align_corners": release.align_corners, **rule}


def _student_options(trunk: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    for key in given:
        if key not in OPTIONS:
            raise ConfigError(f"{key} is not an option of a released model{nearest(key, OPTIONS)}")
    if given.get("window") and trunk["kind"] != "vit":
        raise ConfigError(f"window: a {trunk['kind']} model has no windowed attention")
    return {key: value for key, value in given.items() if value is not None}


def _with_slots(trunk: Trunk, slots: int) -> Trunk:
    """Count registers as class tokens if a head reads them (a teacher listed late, or an explicit slot)."""
    more = slots - len(trunk.tokens)
    if more <= 0 or trunk.options["kind"] == "hybrid":
        return trunk
    if more > trunk.options["registers"]:
        raise ConfigError(f"a head reads class token {slots - 1}, which exceeds the class and register tokens")
    names = tuple(f"register {index}" for index in range(more))
    registers = {"registers": trunk.options["registers"] - more}
    return replace(trunk, options={**trunk.options, **registers}, tokens=(*trunk.tokens, *names))


def _summary_slots(tensors: Mapping[str, Tensor], args: Mapping[str, Any], slots: int) -> list[int]:
    """Class tokens of the summary: the file's list, or the first place of each teacher with a summary."""
    if slots == 1:
        return [0]
    if "summary_idxs" in tensors:
        return [int(index) for index in tensors["summary_idxs"]]
    first: dict[str, int] = {}
    for index, teacher in enumerate(args.get("teachers") or ()):
        if teacher.get("use_summary", True):
            first.setdefault(str(teacher["name"]), index)
    chosen = sorted(first.values())
    if chosen and chosen[-1] >= slots:
        raise ConfigError(f"the summary needs class token {chosen[-1]} of {slots}: a teacher is listed twice")
    return chosen or [0]


# --- heads ------------------------------------------------------------------------------------------------------------


def available_heads(checkpoint: Checkpoint) -> list[str]:
    """Names of the teachers with heads in a checkpoint."""
    return _available(Renamed(checkpoint.tensors, _canonical), _args(checkpoint))


def _available(tensors: Mapping[str, Tensor], args: Mapping[str, Any]) -> list[str]:
    present = {key.split(".")[1] for key in tensors if key.startswith(("_heads.", "_feature_projections."))}
    names = dict.fromkeys(str(teacher["name"]) for teacher in args.get("teachers") or ())
    indices = {name: _index(args, name) for name in names}
    return [name for name in names if name in present or str(indices[name]) in present]


def _wanted(heads: Iterable[str] | None, tensors: Mapping[str, Tensor], args: Mapping[str, Any]) -> list[str]:
    available = _available(tensors, args)
    if heads is None:
        return []
    if heads == "all":
        return available
    if heads == "text":
        return [name for name in available if _text_tower(args["teachers"][_index(args, name)])]
    chosen = [heads] if isinstance(heads, str) else list(heads)
    for name in chosen:
        if name not in available:
            raise ConfigError(f"no head {name!r} in this checkpoint{nearest(name, available) or ', which has none'}")
    return chosen


def _head(
    tensors: Mapping[str, Tensor], checkpoint: Checkpoint, args: Mapping[str, Any], name: str, slots: int
) -> tuple[HeadConfig, dict[str, str]]:
    """A teacher's pair of heads, and ``agglo's key → official key`` below ``heads.<name>.``."""
    index = _index(args, name)
    teacher = args["teachers"][index]
    adaptor = (checkpoint.config.get("adaptor_configs") or {}).get(name) or {}
    version = teacher.get("mlp_version") or args.get("mlp_version") or "v2"
    spatial_version = (
        teacher.get("spatial_mlp_version") or args.get("spatial_mlp_version") or args.get("mlp_version") or "v2"
    )
    upsample = (adaptor.get("feature") or {}).get("upsample_factor") or teacher.get("fd_upsample_factor") or 1
    keys: dict[str, str] = {}
    made: dict[str, tuple[dict[str, Any], int] | None] = {"summary": None, "spatial": None}
    for part, folder, kind, factor in (
        ("summary", "_heads", version, 1),
        ("spatial", "_feature_projections", spatial_version, int(upsample)),
    ):
        prefix = next(
            (p for p in (f"{folder}.{name}.", f"{folder}.{index}.") if any(k.startswith(p) for k in tensors)), None
        )
        if prefix is not None:
            options, _, width, renamed = read_head(tensors, prefix, str(kind), factor)
            made[part] = (options, width)
            keys |= {f"{part}.{ours}": official for ours, official in renamed.items()}
    if made["summary"] is None and made["spatial"] is None:
        raise AssetError(f"{checkpoint.source}: no weights for the head {name!r}")
    slot = int(adaptor.get("head_idx", teacher.get("token_slot") if teacher.get("token_slot") is not None else index))
    config = HeadConfig(
        summary=made["summary"] and made["summary"][0],
        spatial=made["spatial"] and made["spatial"][0],
        summary_width=made["summary"] and made["summary"][1],
        spatial_width=made["spatial"] and made["spatial"][1],
        slot=slot if slots > 1 else 0,
        text=_text_tower(teacher) if made["summary"] else None,
    )
    return config, keys


def _index(args: Mapping[str, Any], name: str) -> int:
    return next(index for index, teacher in enumerate(args["teachers"]) if str(teacher["name"]) == name)


def _text_tower(teacher: Mapping[str, Any]) -> dict[str, Any] | None:
    """The text tower that matches a teacher's summary."""
    model = teacher.get("model")
    if not model:
        return None
    if teacher.get("type") == "siglip2":
        return {"kind": "siglip2", "repo": str(model)}
    if teacher.get("type") == "open_clip":
        return {"kind": "open_clip", "model": str(model), "pretrained": str(teacher.get("pretrained") or "")}
    return None
