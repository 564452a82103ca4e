"""The command line: one file per group of commands. ``app`` is the Typer application, imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agglo.cli.main import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'agglo.cli' has no attribute {name!r}")
    from agglo.cli.main import app

    return app
