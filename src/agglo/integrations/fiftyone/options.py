"""Options of a FiftyOne model: names, defaults and checks, and their form in the App."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from agglo.config import nearest
from agglo.types import ConfigError

OUTPUTS = ("summary", "spatial", "all")
FORMATS = ("NCHW", "NLC")
MAPS = ("pca", "rgb", "norm", "heads")
"""Heatmaps of ``maps``; those of ``text`` and ``patch`` are drawn whenever these are given."""


_KEYS = ("pca", "red", "green", "blue", "norm", "patch", "summary")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of :func:`agglo.integrations.fiftyone.load_model`.

    The first eight have the names and the meaning that users of FiftyOne's C-RADIOv4 plugin know.

    Args:
        output_type: result of ``apply_model``. ``summary``: the embedding. ``spatial``: heatmaps. ``all``: embedding,
            embeddings of ``heads`` and heatmaps as a dictionary, from one forward pass.
        feature_format: layout of the spatial features that ``model.features`` returns: ``NCHW`` ``(B, D, H, W)`` or
            ``NLC`` ``(B, H*W, D)``. Heatmaps are the same in both.
        use_mixed_precision: compute in bfloat16 where the device multiplies it natively, as ``agglo embed --dtype
            auto``. None: on GPUs (Ampere and later), not on the CPU.
        use_external_preprocessor: resize as the processor published with C-RADIO: the whole image, its shorter side
            scaled to the preferred size. False: the centre square as in ``agglo embed`` for ``summary``, the whole
            image with its longer side at ``max_size`` for the other outputs.
        apply_smoothing: smooth heatmaps with a Gaussian.
        smoothing_sigma: its standard deviation in cells of the map.
        batch_size: images per batch where the call does not give it. FiftyOne's own default is 1.
        num_workers: reading processes where the call does not give it; None for FiftyOne's default.
        heads: names of teachers. ``summary``: one, whose summary is the embedding. Otherwise those that get an
            embedding of their own (``all``) and heatmaps (``maps`` with ``heads``).
        window: side of the attention windows in patches.
        max_size: longer side of the input in pixels; with ``summary`` the side of the square. None: the preferred
            size, for heatmaps at least 512.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None for the GPU if there is one.
        text: True: the embedding is the unit-norm vector of the text-aligned head, and prompts can be embedded (text
            search). A prompt or a list of prompts (``spatial``, ``all``): heatmaps of the similarity to each.
        maps: heatmaps to draw, of :data:`MAPS`: the first principal component (``pca``), the first three (``rgb``),
            the cells' L2 norm (``norm``), the first component of every teacher in ``heads``.
        patch: ``(x, y)`` in [0, 1] of the image: heatmap of the cosine similarity to the cell there.
        patch_image: path of the image that ``patch`` is in; None for each image's own.
    """

    output_type: str = "summary"
    feature_format: str = "NCHW"
    use_mixed_precision: bool | None = None
    use_external_preprocessor: bool = False
    apply_smoothing: bool = False
    smoothing_sigma: float = 1.51
    batch_size: int = 32
    num_workers: int | None = None
    heads: tuple[str, ...] = ()
    window: int | None = None
    max_size: int | None = None
    device: str | None = None
    text: bool | tuple[str, ...] = False
    maps: tuple[str, ...] = ("pca",)
    patch: tuple[float, float] | None = None
    patch_image: str | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of ``text``."""
        return self.text if isinstance(self.text, tuple) else ()

    @property
    def is_square(self) -> bool:
        """Whether the input is the centre square of an image, as in ``agglo embed``."""
        return self.output_type == "summary" and not self.use_external_preprocessor


def parse(given: Mapping[str, Any]) -> Options:
    """Check options by name, type and range.

    Args:
        given: keyword arguments; single strings are accepted for lists.

    Raises:
        ConfigError: an unknown name (with the nearest one), or a value that is not allowed.
    """
    known = {each.name for each in fields(Options)}
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{nearest(name, known)}")
    values = dict(given)
    for name in ("heads", "maps"):
        if name in values:
            values[name] = _names(name, values[name])
    if "text" in values and not isinstance(values["text"], bool):
        values["text"] = _names("text", values["text"]) or False
    if values.get("patch") is not None:
        values["patch"] = _point(values["patch"])
    for name in ("use_external_preprocessor", "apply_smoothing"):
        _check_type(values, name, bool)
    if values.get("use_mixed_precision") is not None:
        _check_type(values, "use_mixed_precision", bool)
    for name, least in (("batch_size", 1), ("num_workers", 0), ("window", 1), ("max_size", 1)):
        _check_number(values, name, least)
    if values.get("patch_image") is not None:
        if values.get("patch") is None:
            raise ConfigError("patch_image: needs patch=(x, y), a place in it")
        values["patch_image"] = str(values["patch_image"])
    options = Options(**values)
    _check_choice("output_type", options.output_type, OUTPUTS)
    _check_choice("feature_format", options.feature_format, FORMATS)
    for name in options.maps:
        _check_choice("maps", name, MAPS)
    if not isinstance(options.smoothing_sigma, int | float) or options.smoothing_sigma <= 0:
        raise ConfigError(f"smoothing_sigma: {options.smoothing_sigma!r} is not a positive number of cells")
    _check_together(options)
    return options


def field_name(text: str) -> str:
    """A teacher's name or a prompt as part of a field's name."""
    return re.sub(r"\W+", "_", text.lower()).strip("_") or "map"


def _check_together(options: Options) -> None:
    if options.output_type != "summary":
        named = [field_name(each) for each in (*options.heads, *options.prompts)]
        repeated = next((each for each in named if named.count(each) > 1 or each in _KEYS), None)
        if repeated is not None:
            raise ConfigError(f"heads and text: two results would have the name {repeated!r}")
        if options.output_type == "spatial" and not (options.maps or options.prompts or options.patch):
            raise ConfigError(f"maps: is empty; choose from {', '.join(MAPS)}, or give text or patch")
        return
    if options.prompts:
        raise ConfigError(
            f"text={options.prompts[0]!r}: a prompt is drawn as a heatmap, with output_type='spatial'; for embeddings "
            "that are comparable with text use text=True"
        )
    if options.patch is not None:
        raise ConfigError("patch: is drawn as a heatmap; use output_type='spatial'")
    if len(options.heads) > 1:
        raise ConfigError(
            f"heads: {', '.join(options.heads)}: an embedding has one head; output_type='all' gives several"
        )
    if options.heads and options.text:
        raise ConfigError("heads and text: give one of them; text=True selects the text-aligned head")


def _names(option: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (value,)
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"{option}: {name!r} is not a name or text")
    return names


def _point(value: Any) -> tuple[float, float]:
    try:
        x, y = (float(each) for each in value)
    except (TypeError, ValueError):
        raise ConfigError(f"patch: {value!r} is not a point (x, y)") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ConfigError(f"patch: ({x:g}, {y:g}) is outside of the image; x and y are shares of its sides, in [0, 1]")
    return x, y


def _check_type(values: Mapping[str, Any], name: str, kind: type) -> None:
    if name in values and not isinstance(values[name], kind):
        raise ConfigError(f"{name}: {values[name]!r} is not a {kind.__name__}")


def _check_number(values: Mapping[str, Any], name: str, least: int) -> None:
    value = values.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ConfigError(f"{name}: {value!r} is not a whole number of at least {least}")
    if name == "batch_size" and name in values and value is None:
        raise ConfigError("batch_size: None is not a number; leave it out for the default")


def _check_choice(option: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{option}: {value!r} is not allowed{nearest(str(value), choices)}")
