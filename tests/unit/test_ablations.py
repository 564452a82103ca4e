"""Verdicts of the ablations: a difference counts if it exceeds the spread of the seeds."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def claims(monkeypatch: pytest.MonkeyPatch) -> None:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of this distribution")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def number(mean: float, spread: float) -> dict[str, float]:
    return {"mean": mean, "spread": spread}


@pytest.mark.parametrize(
    ("without", "with_it", "word"),
    [
        ((0.413, 0.006), (0.416, 0.021), "within the seeds' spread"),
        ((0.413, 0.006), (0.436, 0.021), "yes"),
        ((0.413, 0.021), (0.430, 0.001), "within the seeds' spread"),
        ((0.413, 0.006), (0.390, 0.021), "no"),
        ((0.413, 0.006), (0.410, 0.021), "within the seeds' spread"),
    ],
)
def test_a_difference_is_compared_with_the_spread_over_seeds(without, with_it, word: str) -> None:
    from claims.sizes import Cpe

    claim = Cpe()
    arms = {
        arm: {claim.UNSEEN: number(*unseen), claim.SEEN: number(0.36, 0.01)}
        for arm, unseen in zip(claim.arms, (without, with_it), strict=True)
    }
    assert claim.judge(arms)[0] == word


@pytest.mark.parametrize(
    ("worst", "jump", "same", "word"),
    [(0.5, 0.03, 0.8, "yes"), (0.9, 0.03, 0.8, "no"), (0.5, 0.06, 0.8, "no"), (0.5, 0.03, 0.7, "no")],
)
def test_resolutions_are_judged_by_loss_jump_and_neighbours(worst: float, jump: float, same: float, word: str) -> None:
    from claims.sizes import Resolutions

    claim = Resolutions()
    rows = ((1.2, 0.104, 0.77), (worst, jump, same))
    arms = {
        arm: {key: number(value, 0.01) for key, value in zip((claim.WORST, claim.JUMP, claim.SAME), row, strict=True)}
        for arm, row in zip(claim.arms, rows, strict=True)
    }
    found, verdict = claim.judge(arms)
    assert found == word
    met = ("(halved)" in verdict, "(none)" in verdict, "(as many)" in verdict)
    assert met == (worst < 0.6, jump < 0.05, same > 0.77)
