"""Settings of the process that a command makes."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from agglo.cli import process

GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}]
)
def test_environment_of_the_user_wins(environment: dict[str, str]) -> None:
    assert not process.keep_freed_memory(environment)


def test_other_tunables_do_not_matter() -> None:
    assert process.keep_freed_memory({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=off"}) == GLIBC


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_other_systems_stay_as_they_are(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.platform, "system", lambda: system)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: pytest.fail("the C library was opened"))
    assert not process.keep_freed_memory({})


def test_library_without_the_settings_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.platform, "system", lambda: "Linux")
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: object())  # musl: no mallopt
    assert not process.keep_freed_memory({})


@pytest.mark.skipif(not GLIBC, reason="the settings are glibc's")
def test_freed_memory_is_used_again() -> None:
    """Blocks of 64 MiB, each freed before the next: after some, no page of a block is new."""
    code = (
        "import resource, torch\n"
        "from agglo.cli import process\n"
        "process.configure()\n"
        "for _ in range(20): torch.empty(1 << 24).fill_(1)\n"
        "count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = count()\n"
        "for _ in range(20): torch.empty(1 << 24).fill_(1)\n"
        "print(count() - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2**26 // 4096
