"""Latency and memory."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agglo.evals.latency import Latency
from agglo.evals.memory import Memory, counted
from agglo.types import ConfigError, Features, FeatureSpec
from support.models import Noise

MIB = 2**20


class Sleeper(nn.Module):
    """Takes a few milliseconds, the first passes many more."""

    spec = FeatureSpec(summary=1, spatial=None, step=8)

    def __init__(self, slow: int = 0) -> None:
        super().__init__()
        self.slow, self.shapes, self.modes = slow, [], []

    def forward(self, images: Tensor) -> Features:
        self.shapes.append(tuple(images.shape))
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        time.sleep(0.2 if len(self.shapes) <= self.slow else 0.004)
        return Features(images.mean((1, 2, 3))[:, None], None)


def test_latency_metrics() -> None:
    model = Sleeper(slow=2).train()
    found = Latency(size=20, batch=3, repeats=5, warmup=2).run(model)
    assert 4 <= found["ms"] < 100  # the slow first passes do not count
    assert found["ms_p90"] >= found["ms"]
    assert found["images_per_second"] == pytest.approx(3 / found["ms"] * 1e3)
    assert model.shapes == [(3, 3, 16, 16)] * 7 or model.shapes == [(3, 3, 24, 24)] * 7
    assert set(model.modes) == {(False, True)}
    assert model.training
    assert not Latency.deterministic


def test_time_limit_keeps_three_passes() -> None:
    model = Sleeper(slow=100)
    assert len(Latency(size=8, repeats=50, warmup=0, seconds=0.1).times(model)) == 3
    assert len(Latency(size=8, repeats=2, warmup=0, seconds=0.1).times(model)) == 2


def test_precision_sets_autocast() -> None:
    class Linear(nn.Module):
        spec = FeatureSpec(summary=4, spatial=None)

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.seen = nn.Linear(3, 4), set()

        def forward(self, images: Tensor) -> Features:
            found = self.inner(images.mean((2, 3)))
            self.seen.add(found.dtype)
            return Features(found, None)

    for precision in ("float32", "bfloat16"):
        model = Linear()
        Latency(size=8, repeats=1, warmup=0, precision=precision).run(model)  # type: ignore[arg-type]
        assert model.seen == {getattr(torch, precision)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"precision": "int8"}, "float32, bfloat16 or float16"),
    ],
)
def test_latency_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Latency(**options)
    if "batch" in options:
        with pytest.raises(ConfigError, match=message):
            Memory(**options)


class Chain(nn.Module):
    """At most two tensors of the images' size live at one time, however many are made."""

    spec = FeatureSpec(summary=3, spatial=3, stride=1)

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("table", torch.zeros(16, dtype=torch.float16))

    def forward(self, images: Tensor) -> Features:
        x = images + 1
        for _ in range(self.steps):
            x = x.transpose(2, 3) * 2  # the view costs nothing
        return Features(x.mean((2, 3)), x)


def test_memory_in_closed_form() -> None:
    one = 3 * 64 * 64 * 4
    for steps, copies in ((0, 1), (1, 2), (9, 2)):
        found = Memory(size=64).run(Chain(steps))
        summary = 3 * 4 if steps == 0 else 0  # made when only one copy lives
        assert found["peak_mib"] * MIB == copies * one + summary
    assert found["parameters"] == 64  # both layers are one
    assert found["weights_mib"] * MIB == 64 * 4 + 16 * 2
    assert Memory(size=64).run(Chain(9)) == found
    assert Memory(size=64, batch=4).run(Chain(9))["peak_mib"] == 4 * found["peak_mib"]


def test_existing_tensors_are_not_counted() -> None:
    class Echo(nn.Module):
        spec = FeatureSpec(summary=None, spatial=3, stride=1)

        def __init__(self) -> None:
            super().__init__()
            self.kept = nn.Parameter(torch.zeros(3, 8, 8))

        def forward(self, images: Tensor) -> Features:
            return Features(None, self.kept.expand(len(images), 3, 8, 8) if self.training else images.view(-1, 3, 8, 8))

    model, images = Echo(), torch.zeros(2, 3, 8, 8)
    with torch.no_grad():
        assert counted(model.train(), images, model.parameters()) == 0
        assert counted(model.eval(), images, model.parameters()) == 0
        assert counted(model.train(), images) > 0


def test_plain_functions_have_no_weights() -> None:
    class Function:
        spec = FeatureSpec(summary=3, spatial=None)

        def __call__(self, images: Tensor) -> Features:
            return Features(images.mean((2, 3)), None)

    found = Memory(size=8).run(Function())
    assert found["parameters"] == found["weights_mib"] == 0
    assert found["peak_mib"] * MIB == 12
    assert set(Latency(size=8, repeats=1).run(Function())) == {"ms", "ms_p90", "images_per_second"}
    assert Memory(size=32).run(Noise())["parameters"] == 0
