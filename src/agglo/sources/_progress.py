"""Saying how far a long count has come."""

from __future__ import annotations

import logging
import sys
import time

_log = logging.getLogger(__name__)


class Tally:
    """Counts, and shows the count every few seconds once it has taken some: on a terminal as one line that is written
    over, elsewhere in the log.

    Args:
        what: the sentence before the count, e.g. ``"indexing photos"``.
        unit: what is counted.
        total: how many there will be, or None where nobody knows.
        every: seconds between two lines.
    """

    def __init__(self, what: str, unit: str, total: int | None = None, every: float = 3.0) -> None:
        self.count = 0
        self._what, self._unit, self._total, self._every = what, unit, total, every
        self._due = time.monotonic() + every
        self._shown = False

    def add(self, count: int = 1) -> None:
        """So many more."""
        self.count += count
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every
            self._show()

    def done(self) -> None:
        """Close the line, if there is one."""
        if self._shown:
            self._show()
            if sys.stderr.isatty():
                sys.stderr.write("\n")

    def _show(self) -> None:
        self._shown = True
        of = f" of {self._total:,}" if self._total is not None else ""
        line = f"{self._what}: {self.count:,}{of} {self._unit}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{line}")
            sys.stderr.flush()
        else:
            _log.info(line)
