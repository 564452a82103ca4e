"""How recipes name files: variables, ``~``, braces, globs; and which endings are images."""

from __future__ import annotations

import os
import re

from agglo.types import ConfigError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
_MOST = 1_000_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


def expanded(path: str) -> str:
    """The path with its ``${VARIABLES}`` filled in.

    Raises:
        ConfigError: one is not set.
    """
    result = os.path.expandvars(path)
    if "${" in result:
        variable = result.partition("${")[2].partition("}")[0]
        raise ConfigError(f"{path}: the environment variable {variable} is not set: export {variable}=/path/to/images")
    return result


def braces(pattern: str) -> list[str]:
    """Every path a pattern of braces stands for, as a shell would: ``{000..127}`` with its zeros, ``{a,b}``, nested.

    Braces without a comma or a range stand for themselves.

    Raises:
        ConfigError: more than a million paths.
    """
    for start, end in _pairs(pattern):
        inner = pattern[start + 1 : end]
        choices = _choices(inner)
        if choices is None:
            continue
        rest = braces(pattern[end + 1 :])
        heads = [pattern[:start] + text for choice in choices for text in braces(choice)]
        if len(heads) * len(rest) > _MOST:
            raise ConfigError(f"{pattern}: stands for more than {_MOST:,} paths; name fewer")
        return [head + tail for head in heads for tail in rest]
    return [pattern]


def _pairs(pattern: str) -> list[tuple[int, int]]:
    """Where outermost braces open and close."""
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
    """What a pair of braces offers, or None where it is no choice."""
    if match := _RANGE.fullmatch(inner):
        first, last = match.groups()
        padded = any(len(text.lstrip("-")) > 1 and text.lstrip("-").startswith("0") for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        low, high = int(first), int(last)
        if abs(high - low) >= _MOST:
            raise ConfigError(f"{{{inner}}}: stands for more than {_MOST:,} paths; name fewer")
        step = 1 if high >= low else -1
        return [f"{number:0{width}d}" for number in range(low, high + step, step)]
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(inner):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append(inner[start:at])
            start = at + 1
    return [*parts, inner[start:]] if parts else None
