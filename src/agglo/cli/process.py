"""Settings of the whole process, made when a command starts."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>
_LARGEST = 2**31 - 1


def configure() -> None:
    """Set up threads and memory for work in large tensors: call it before torch is imported.

    OpenMP's threads wait asleep: by default they spin, and take the cores from the loader's threads, 10 x slower on two
    cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Make glibc's malloc keep freed memory for the next tensor instead of returning it to the kernel.

    By default each block above at most 32 MiB is mapped afresh, and the kernel clears every page of it at first use:
    up to 40 % of the time of inference and training on a CPU. Blocks now come from the heap, whose end is returned
    beyond 2 GiB. Other C libraries, and processes whose environment configures malloc, stay as they are.

    Returns:
        Whether the settings were made.
    """
    if platform.system() != "Linux" or any(_configures_malloc(*each) for each in environment.items()):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - musl has neither this function nor these settings
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def _configures_malloc(name: str, value: str) -> bool:
    return name.startswith("MALLOC_") or (name == "GLIBC_TUNABLES" and "glibc.malloc" in value)
