from __future__ import annotations

import math

import numpy as np
import pytest

from stabkit.diagnosis import Thresholds, bootstrap_interval, diagnose_growth, factor, judge, stretch_of_blocks


def growths(total: float, steps: int = 4, samples: int = 6, spread: float = 0.01) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.full((steps, samples), total / steps) + spread * rng.standard_normal((steps, samples))


@pytest.mark.parametrize(
    ("total", "verdict"),
    [
        (0.0, "stable"),
        (2.0, "stable"),
        (-2.0, "stable"),
        (4.0, "drift"),
        (-6.0, "drift"),
        (8.0, "exploding"),
        (-8.0, "vanishing"),
        (-math.inf, "vanishing"),
        (math.nan, "non-finite"),
        (math.inf, "non-finite"),
    ],
)
def test_verdicts_follow_the_thresholds(total, verdict):
    assert judge(growths(total), ["step"] * 4, Thresholds(), seed=0).name == verdict


def test_samples_that_disagree_are_inconclusive():
    mixed = np.array([[20.0, -20.0, 20.0, -20.0]])
    assert judge(mixed, ["step"], Thresholds(), seed=0).name == "inconclusive"


def test_thresholds_are_arguments():
    assert judge(growths(4.0), ["step"] * 4, Thresholds(stable=5.0), seed=0).name == "stable"
    assert judge(growths(4.0), ["step"] * 4, Thresholds(stable=1.0, drift=2.0), seed=0).name == "exploding"


def test_stems_and_heads_are_not_judged():
    growth = growths(0.0)
    growth[0] += 50
    growth[-1] -= 50
    kinds = ["transition", "step", "step", "transition"]
    assert stretch_of_blocks(kinds) == (1, 2)
    assert judge(growth, kinds, Thresholds(), seed=0).name == "stable"
    assert stretch_of_blocks(["transition"] * 3) == (0, 2)


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).standard_normal(400)
    low, high = bootstrap_interval(values, Thresholds(), seed=0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_interval(np.array([3.0]), Thresholds(), seed=0) == (3.0, 3.0)


def find(growth: np.ndarray, skip: float | None = 0.0):
    kinds, names = ["step"] * len(growth), [f"block{i}" for i in range(len(growth))]
    verdict = judge(growth, kinds, Thresholds(), seed=0)
    return diagnose_growth(verdict, growth, names, names, [skip] * len(growth), Thresholds(), seed=0)


def test_a_finding_names_the_step_that_contributes_most():
    growth = growths(-20.0)
    growth[2] -= 3
    (finding,) = find(growth)
    assert (finding.kind, finding.severity, finding.module_path) == ("vanishing", "critical", "block2")
    assert finding.steps == (0, 1, 2, 3)
    assert finding.confidence == 1.0


def test_the_remedy_undoes_a_typical_step():
    (finding,) = find(growths(-5 * math.log(5.0), steps=5))
    assert "by about" in finding.remedy
    factor_named = float(finding.remedy.split("by about ")[1].split(" ")[0])
    assert factor_named == pytest.approx(5.0, rel=0.05)
    (residual,) = find(growths(20.0), skip=1.0)
    assert "branches" in residual.remedy


def test_a_step_that_is_not_finite_is_named():
    growth = growths(0.0)
    growth[:2] = math.nan
    (finding,) = find(growth)
    assert (finding.kind, finding.steps, finding.module_path) == ("non_finite", (0, 1), "block1")


def test_health_has_no_findings():
    assert find(growths(0.5)) == ()


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        (math.log(2.5), "2.5"),
        (0.0, "1"),
        (-40 * math.log(10), "10^-40"),
        (-math.inf, "0"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_factors_can_be_read(growth, text):
    assert factor(growth) == text
