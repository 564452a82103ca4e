"""Diagnosis of unreadable weight files: truncated, a git-lfs pointer, a web page, another format."""

from __future__ import annotations

import json
from pathlib import Path

from agglo.types import AssetError

LFS = b"version https://git-lfs"
ZIP = b"PK\x03\x04"


def damaged(path: Path, expected: str, error: object) -> AssetError:
    """The error for a file that could not be read: what the file is, and what to do.

    Args:
        path: the file.
        expected: what it should be ("a safetensors file").
        error: of the reader; its first line is quoted if the cause is unknown.
    """
    try:
        return AssetError(f"{path} {_verdict(path, expected, error)}")
    except OSError as unreadable:
        return AssetError(f"{path} cannot be read ({unreadable.strerror or unreadable}): check path and permissions")


def _verdict(path: Path, expected: str, error: object) -> str:
    if path.is_dir():
        return f"is a folder, not {expected}: use the path of the file in it"
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(512)
    if not start:
        return "is empty: download it again"
    if start.startswith(LFS):
        return (
            "is a git-lfs pointer, not the weights: run `git lfs pull` in its repository, or download the file itself"
        )
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"is a web page, not {expected}: the download was a login or error page; download it again"
    if start.startswith(ZIP) and "safetensors" in expected:
        return f"is a zip archive, not {expected}; if it is a torch checkpoint, rename it to .pth.tar"
    needed = _safetensors_size(path)
    if needed is not None and size < needed:
        return f"is truncated: {size:,} of {needed:,} bytes; download it again"
    if needed is not None and "safetensors" not in expected:
        return f"is a safetensors file, not {expected}: rename it to model.safetensors"
    if _is_text(start):
        return f"is text, not {expected}: it begins with {start[:40].decode(errors='replace')!r}; download it again"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"is damaged or truncated, not a readable {expected.removeprefix('a ')} ({first[:200]}): download it again"


def _is_text(start: bytes) -> bool:
    """Whether the first bytes are printable text, up to a truncated character at the end."""
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:
            return False
        text = start[: error.start].decode()
    return all(letter.isprintable() or letter in "\r\n\t" for letter in text)


def _safetensors_size(path: Path) -> int | None:
    """Size in bytes of a safetensors file with this header; None if the file has no such header."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= 100_000_000 or stream.read(1) != b"{":
            return None
        stream.seek(8)
        header = stream.read(length)
    if len(header) < length:
        return 8 + length
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return 8 + length + max((end for end in ends if isinstance(end, int)), default=0)
