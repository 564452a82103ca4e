"""Paths in recipes: variables, ``~``, braces, globs, and the file extensions of images."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from pathlib import Path

from agglo.files import printable
from agglo.types import ConfigError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".qoi", ".tga",
)  # fmt: skip
_SIDECARS = frozenset(
    [
        "txt",
        "json",
        "jsonl",
        "ndjson",
        "csv",
        "tsv",
        "md",
        "yaml",
        "yml",
        "xml",
        "html",
        "htm",
        "log",
        "ini",
        "cfg",
        "toml",
        "py",
        "ipynb",
        "sh",
        "cls",
        "cls2",
        "caption",
        "db",
        "ds_store",
        "parquet",
        "arrow",
        "npz",
        "pt",
        "pth",
        "safetensors",
        "pickle",
        "pkl",
        "lock",
        "sha256",
        "md5",
        "url",
    ]
)
"""Endings, without the dot, of files beside images that are never images themselves."""
_NAMED = 5
_MAX_PATHS = 1_000_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


def expanded(path: str) -> str:
    """The path with ``${VARIABLES}`` and ``~`` substituted; a path that exists is returned as it is.

    Raises:
        ConfigError: a variable is not set.
    """
    if os.path.lexists(path):
        return path
    result = os.path.expandvars(path)
    if "${" in result:
        variable = result.partition("${")[2].partition("}")[0]
        raise ConfigError(f"{path}: the environment variable {variable} is not set: export {variable}=/path/to/images")
    return os.path.expanduser(result)


def left_out(others: Counter[str], of: str, where: str) -> str:
    """A message that counts and names the files or members that are not read; empty if all are read or sidecars.

    Args:
        others: number of files by ending, without the dot, or by a phrase ("pipes or devices").
        of: what is counted, ``files`` or ``members``.
        where: the folder or the shards.
    """
    lost = Counter({ending: n for ending, n in others.items() if ending.rpartition(".")[2] not in _SIDECARS})
    if not lost:
        return ""
    shown = ", ".join(
        f"{count} {printable(ending) if ' ' in ending else '.' + printable(ending)}"
        for ending, count in lost.most_common(_NAMED)
    )
    more = f", and {len(lost) - _NAMED} more endings" if len(lost) > _NAMED else ""
    message = f"left out {lost.total()} other {of} of {printable(where)}: {shown}{more}"
    return f"{message}; name the endings of images in `extensions`"


def not_found(path: str, resolved: Path) -> str:
    """Message for a path that does not exist, with the nearest name in its parent folder."""
    parent = resolved.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(resolved.name, names, n=1)
    return f"{path!r} does not exist" + (f"; did you mean {parent / near[0]}?" if near else "")


def braces(pattern: str) -> list[str]:
    """All paths of a brace pattern, expanded as in a shell: ``{000..127}`` keeps its zeros, ``{a,b}``, nested.

    Braces without a comma or a range are kept literally.

    Raises:
        ConfigError: more than a million paths.
    """
    for start, end in _brace_pairs(pattern):
        inner = pattern[start + 1 : end]
        choices = _choices(inner)
        if choices is None:
            continue
        rest = braces(pattern[end + 1 :])
        heads = [pattern[:start] + text for choice in choices for text in braces(choice)]
        if len(heads) * len(rest) > _MAX_PATHS:
            raise ConfigError(f"{pattern}: expands to more than {_MAX_PATHS:,} paths; use fewer")
        return [head + tail for head in heads for tail in rest]
    return [pattern]


def _brace_pairs(pattern: str) -> list[tuple[int, int]]:
    """Positions of the outermost opening and closing braces."""
    found, depth, start = [], 0, 0
    for at, letter in enumerate(pattern):
        if letter == "{":
            start = at if depth == 0 else start
            depth += 1
        elif letter == "}" and depth:
            depth -= 1
            if depth == 0:
                found.append((start, at))
    return found


def _choices(inner: str) -> list[str] | None:
    """The alternatives inside a pair of braces, or None for a literal."""
    if match := _RANGE.fullmatch(inner):
        first, last = match.groups()
        padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-").startswith("0") for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        low, high = int(first), int(last)
        if abs(high - low) >= _MAX_PATHS:
            raise ConfigError(f"{{{inner}}}: expands to more than {_MAX_PATHS:,} paths; use fewer")
        step = 1 if high >= low else -1
        return [f"{number:0{width}d}" for number in range(low, high + step, step)]
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(inner):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append(inner[start:at])
            start = at + 1
    return [*parts, inner[start:]] if parts else None
