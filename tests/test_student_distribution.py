"""Student's distribution against scipy's."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from scipy.special import stdtr, stdtrit

from stabkit.student_distribution import quantile, upper_tail

DEGREES = [1, 2, 3, 4, 7, 15, 31, 79, 80, 81, 255, 1000, 99_999, 10_000_000]


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("t", [-3.0, -0.4, 0.0, 0.1, 1.0, 1.3, 2.5, 8.0, 40.0])
def test_tails_are_those_of_scipy(degrees: int, t: float) -> None:
    assert upper_tail(t, degrees) == pytest.approx(stdtr(degrees, -t), rel=precision(degrees))


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("tail", [0.4, 0.18, 0.018, 0.0036, 1e-6, 1e-9])
def test_quantiles_are_those_of_scipy(degrees: int, tail: float) -> None:
    expected = -stdtrit(degrees, tail)
    assert quantile(tail, degrees) == pytest.approx(expected, rel=precision(degrees))


def precision(degrees: int) -> float:
    """Beyond some thousand degrees of freedom 1 - x, which the fraction needs, has lost digits."""
    return 1e-12 if degrees <= 1000 else 1e-9


def test_one_degree_of_freedom_is_the_cauchy_distribution() -> None:
    for t in (1e-9, 0.3, 1.0, 50.0, 1e9):
        assert upper_tail(t, 1) == pytest.approx(math.atan2(1.0, t) / math.pi, rel=1e-14)


def test_a_tail_at_the_ends() -> None:
    assert upper_tail(float("inf"), 3) == 0.0
    assert upper_tail(float("-inf"), 3) == 1.0
    assert upper_tail(float("nan"), 3) != upper_tail(float("nan"), 3)


def test_a_verdict_loads_no_scipy() -> None:
    code = (
        "import sys, torch, stabkit\n"
        "from stabkit.diagnosis import examine\n"
        "model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(8)])\n"
        "found = examine(stabkit.trace(model, torch.randn(4, 8)))\n"
        "assert found.verdict.interval[0] < found.verdict.growth\n"
        "print(*(name for name in sys.modules if name.split('.')[0] in ('scipy', 'networkx', 'matplotlib', 'pandas')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
