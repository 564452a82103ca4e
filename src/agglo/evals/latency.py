"""Latency of a forward pass."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch

from agglo.evals.base import Backbone, Eval, EvalContext, device_of, frozen, input_size
from agglo.types import ConfigError

_LEAST = 3


class Latency(Eval):
    """Time of a forward pass on the model's device, for a batch that is already there.

    Each pass is timed separately, with a GPU synchronised. Decoding and resizing are excluded; the model's
    normalisation and heads are included. Timings depend on the machine, its load and its number of threads: compare
    only models measured side by side.

    Metrics: ``ms``, the median, and ``ms_p90``, the 90th percentile (milliseconds per batch, lower is better);
    ``images_per_second``, the batch size over the median.

    Args:
        size: pixels, side or ``(H, W)``; snapped to what the model can take.
        batch: images per pass.
        repeats: number of timed passes.
        warmup: number of passes before them.
        seconds: time limit; no pass begins after it, once three are timed.
        precision: ``float32`` for the model's own; ``bfloat16`` or ``float16`` by autocast.
    """

    lower_is_better = frozenset({"ms", "ms_p90"})
    deterministic = False

    def __init__(
        self,
        *,
        size: int | tuple[int, int] = 224,
        batch: int = 1,
        repeats: int = 20,
        warmup: int = 2,
        seconds: float = 10.0,
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        for key, value, least in (("batch", batch, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
            if value < least:
                raise ConfigError(f"evals.latency: {key} must be at least {least}, got {value}")
        if not seconds > 0:
            raise ConfigError(f"evals.latency: seconds must be positive, got {seconds}")
        if precision not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"evals.latency: precision must be float32, bfloat16 or float16, not {precision!r}")
        self.size = size
        self.batch = batch
        self.repeats = repeats
        self.warmup = warmup
        self.seconds = seconds
        self.precision = precision

    def measure(self, model: Backbone, context: EvalContext) -> dict[str, float]:
        times = self.times(model, context)
        middle = float(np.median(times))
        # "higher" returns a measured pass, not a mean of two.
        slow = float(np.quantile(times, 0.9, method="higher"))
        return {"ms": middle * 1e3, "ms_p90": slow * 1e3, "images_per_second": self.batch / middle}

    def times(self, model: Backbone, context: EvalContext | None = None) -> list[float]:
        """Seconds of each timed pass."""
        context, device = context or EvalContext(), device_of(model)
        view = input_size(model, self.size)
        images = torch.rand(self.batch, 3, *view, generator=torch.Generator().manual_seed(0)).to(device)
        dtype = getattr(torch, self.precision)
        found: list[float] = []
        began = time.perf_counter()
        with frozen(model), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            for number in range(self.warmup + self.repeats):
                _wait(device)
                start = time.perf_counter()
                model(images)
                _wait(device)
                stop = time.perf_counter()
                if number >= self.warmup:
                    found.append(stop - start)
                if number % 10 == 9:
                    context.report(f"pass {number + 1}/{self.warmup + self.repeats}")
                if len(found) >= _LEAST and stop - began > self.seconds:
                    break
        return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
