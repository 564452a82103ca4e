"""Output of a run: a live line on the terminal, ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress:
    """The live line and the logs of a run; use as a context manager.

    On a terminal the line is redrawn in place; otherwise a line is printed every ten seconds and at the end.

    Args:
        folder: where ``metrics.jsonl`` is appended and TensorBoard's files go (``folder/tensorboard``).
        total: steps of the whole run.
        quiet: print nothing.
        writes: whether this process prints and logs; only the main process does.
    """

    def __init__(self, folder: Path, total: int, *, quiet: bool = False, writes: bool = True) -> None:
        self.total, self.console = total, Console(stderr=True, quiet=quiet or not writes)
        self._live = Live(console=self.console, refresh_per_second=4, transient=False)
        self._metrics = folder / "metrics.jsonl"
        self._jsonl = self._metrics.open("a", encoding="utf-8") if writes else None
        self._board = _tensorboard(folder / "tensorboard") if writes else None
        self._printed = 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self._live.stop()
        if self._jsonl is not None:
            self._jsonl.close()
        if self._board is not None:
            self._board.close()

    def message(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, soft_wrap=True)  # unwrapped: commands in it can be copied

    def show(self, step: int, terms: dict[str, float], images_per_second: float, seconds_left: float) -> None:
        """Redraw the live line: loss by term, speed, time left."""
        losses = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
        minutes, seconds = divmod(int(seconds_left), 60)
        line = f"step {step}/{self.total}  {minutes}:{seconds:02d} left  {images_per_second:.0f} images/s  {losses}"
        if self.console.is_terminal:
            self._live.update(Text(line))  # losses last: they wrap on a narrow terminal
        elif time.monotonic() - self._printed > 10 or step == self.total:
            self._printed = time.monotonic()
            self.console.print(line, highlight=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """Replace the live line; nothing without a terminal."""
        if self.console.is_terminal:
            self._live.update(Text(text))

    def rewind(self, step: int) -> None:
        """Delete the records of steps after ``step``, which a resumed run repeats."""
        if self._jsonl is None:
            return
        self._jsonl.close()
        lines = self._metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step(line) <= step]
        self._metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._jsonl = self._metrics.open("a", encoding="utf-8")

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Append one JSON line, and the same numbers to TensorBoard."""
        if self._jsonl is None:
            return
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self._jsonl.flush()
        if self._board is not None:
            for name, value in _flat(values):
                self._board.add_scalar(name, value, step)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers = []
    for key, value in values.items():
        if isinstance(value, dict):
            numbers += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            numbers.append((f"{prefix}{key}", float(value)))
    return numbers


def _step(line: str) -> float:
    """The step of a line of metrics; infinity for a truncated line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the `log` extra is optional: metrics.jsonl has the same numbers
        return None
    return SummaryWriter(str(folder))
