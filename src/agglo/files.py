"""Files: atomic writes, JSON, and the versions that a number depends on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from agglo.types import ConfigError

PARTIAL = ".partial"
"""Suffix of the temporary file beside the target of an atomic write."""

LOCK = ".lock"
"""File in a folder that :func:`exclusive` locks."""

_PACKAGES = ("agglo", "torch", "torchvision", "timm", "transformers", "numpy", "pillow", "safetensors")


def printable(name: str) -> str:
    """A file name that can be written anywhere: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on failure.

    Readers get the old file or the new one, never a part. The parent folder is created if needed. The temporary
    name keeps the suffix of ``path``, because many writers choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.urandom(4).hex()}{PARTIAL}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside ``folder``; rename it to ``folder`` on success, remove it on failure.

    The old folder is removed after the new one is in its place, and kept on failure.
    """
    mark = f".{folder.name}.{os.urandom(4).hex()}"
    partial, old = folder.with_name(f"{mark}{PARTIAL}"), folder.with_name(f"{mark}.old")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.replace(old)
        try:
            partial.replace(folder)
        except OSError:
            if old.exists():
                old.replace(folder)
            raise
    finally:
        for path in (partial, old):
            shutil.rmtree(path, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> Path:
    """Replace a file atomically; return its path."""
    with replacing(path) as partial:
        partial.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Replace a UTF-8 text file atomically; return its path."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> Path:
    """Replace a JSON file atomically; return its path."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def exclusive(folder: Path, advice: str) -> Iterator[None]:
    """Lock a folder for one writer; the system releases the lock when the process ends. The folder is created.

    Without locks (Windows, some network file systems) it is up to the user to start one writer at a time.

    Args:
        folder: to lock.
        advice: the end of the error message.

    Raises:
        ConfigError: another process, or another thread of this one, has the lock.
        OSError: the folder cannot be created or written.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = _lock(folder / LOCK, advice)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # still locked, so that it is never the file of a later writer
        os.close(file)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing was written


def _lock(path: Path, advice: str) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino != os.fstat(file).st_ino:
                raise FileNotFoundError(path)
        except BlockingIOError:
            owner = os.read(file, 20).decode(errors="replace").strip()
            os.close(file)
            process = f" (process {owner})" if owner else ""
            raise ConfigError(f"another process is writing to {path.parent}{process}: {advice}") from None
        except FileNotFoundError:  # the writer before removed it between opening and locking
            os.close(file)
            continue
        except (ImportError, OSError):
            return file
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
        return file


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start}): save it as UTF-8"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty object.

    Raises:
        ConfigError: the file is not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return dict(content)


def versions() -> dict[str, str]:
    """Versions of Python, the platform and every package that can change a number."""
    import torch

    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
