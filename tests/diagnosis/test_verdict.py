from __future__ import annotations

import math

import numpy as np
import pytest

from stabkit.diagnosis import Finding, Thresholds, factor, judge, stretch_of_blocks
from stabkit.diagnosis.kinds import headline, headline_tone
from stabkit.diagnosis.verdict import led_by_findings


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
    assert judge(growths(total), ["step"] * 4, Thresholds()).name == verdict


def test_samples_that_disagree_are_inconclusive():
    mixed = np.array([[20.0, -20.0, 20.0, -20.0]])
    assert judge(mixed, ["step"], Thresholds()).name == "inconclusive"


def test_one_sample_that_is_lost_does_not_decide():
    growth = growths(0.0)
    growth[2, 0] = -math.inf
    assert judge(growth, ["step"] * 4, Thresholds()).name == "stable"
    growth[2, :4] = -math.inf
    assert judge(growth, ["step"] * 4, Thresholds()).name == "vanishing"


def test_thresholds_are_arguments():
    assert judge(growths(4.0), ["step"] * 4, Thresholds(stable=5.0)).name == "stable"
    assert judge(growths(4.0), ["step"] * 4, Thresholds(stable=1.0, explosion=2.0)).name == "exploding"


def test_stems_and_heads_are_not_judged():
    growth = growths(0.0)
    growth[0] += 50
    growth[-1] -= 50
    kinds = ["transition", "step", "step", "transition"]
    assert stretch_of_blocks(kinds) == (1, 2)
    assert judge(growth, kinds, Thresholds()).name == "stable"
    assert stretch_of_blocks(["transition"] * 3) == (0, 2)


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


def finding(kind: str, severity: str, path: str = "layers.1") -> Finding:
    return Finding(kind, severity, (1,), path, 1.0, "it does this; tried: that", "do so", "")


@pytest.mark.parametrize("total", [0.0, 4.0, 8.0])
@pytest.mark.parametrize(
    ("kind", "severity"), [("mixed_samples", "warning"), ("mask", "critical"), ("loss", "warning")]
)
def test_the_worst_finding_leads_whatever_the_verdict_on_depth(total, kind, severity):
    verdict = judge(growths(total), ["step"] * 4, Thresholds())
    findings = [finding("order", "info"), finding("rank_collapse", "warning"), finding(kind, severity)]
    findings = findings if severity == "critical" else [findings[0], findings[2]]
    said = led_by_findings(verdict, findings)
    assert said.summary.startswith(f"{severity.capitalize()} at layers.1: it does this. Depth alone: {verdict.name}")
    assert "asks for nothing" not in said.summary
    assert headline(verdict.name, findings) == (
        f"{severity.upper()}, {kind.replace('_', ' ').upper()} (depth alone: {verdict.name})"
    )
    assert headline_tone(verdict.name, findings) != "good"


@pytest.mark.parametrize(
    ("total", "findings"),
    [
        (0.0, []),
        (4.0, [finding("order", "info")]),
        (8.0, [finding("exploding", "critical")]),
        (math.nan, [finding("non_finite", "critical")]),
    ],
)
def test_a_verdict_leads_where_nothing_is_bad_or_it_says_the_same(total, findings):
    verdict = judge(growths(total), ["step"] * 4, Thresholds())
    assert led_by_findings(verdict, findings) == verdict or math.isnan(total)
    assert led_by_findings(verdict, findings).summary == verdict.summary
    assert headline(verdict.name, findings) == verdict.name.upper()


def test_a_drift_by_the_spread_of_samples_says_so_and_not_that_its_mean_is_beyond():
    spread = np.array([[3.4, 1.0, -1.0, 2.8]])  # the mean is 1.55 nats, a factor of 4.71; its interval is wider
    found = judge(np.repeat(spread / 4, 4, axis=0), ["step"] * 4, Thresholds())
    assert found.name == "drift"
    assert abs(found.growth) < Thresholds().stable < found.interval[1]
    assert "4.71" in found.summary
    assert "That is" not in found.summary
    assert factor(found.interval[1]) in found.summary


def test_the_headline_does_not_cut_a_list_in_brackets():
    evidence = "2 of 4 parameters are not used (a.weight, a.bias; 56% of their numbers): nothing is made of them; more"
    stable = judge(growths(0.0), ["step"] * 4, Thresholds())
    told = led_by_findings(stable, [Finding("no_gradient", "warning", (0,), "a", 1.0, evidence, "use them", "")])
    assert "(a.weight, a.bias; 56% of their numbers): nothing is made of them. Depth alone" in told.summary
