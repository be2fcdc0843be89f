"""Why gradients grow or decay, in one sentence that claims no more than was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stabkit.attribution import Attribution, Mechanism
from stabkit.diagnosis import Verdict

_DECIDES = (0.5, 2.0)  # share of the growth that the eigenvalues predict where they decide it
_MOST = 0.5  # share of what the modes gain or lose from which one mechanism is named


def why(found: Attribution, verdict: Verdict, stable: float) -> str:
    """The sentence.

    Three answers are possible: the field itself grows or damps; the step is too long for its method; or the
    eigenvalues of single steps do not decide, because their Jacobians do not commute or are not normal.

    Args:
        found: the parts of the growth.
        verdict: with the growth that is to be explained and the steps that it is about.
        stable: growth in nats that needs no explanation.
    """
    first, last = verdict.stretch
    growth = verdict.growth
    if not math.isfinite(growth):
        return "No gradient arrives, so there is no growth to explain."
    if abs(growth) <= stable:
        return "The gradient keeps its size over the blocks: there is no growth to explain."
    read = [m for m in found.mechanisms[first : last + 1] if m.excess is not None]
    share = _share(found, first, last)
    decides = share is not None and _DECIDES[0] <= share <= _DECIDES[1]
    if not read or not decides:
        return _undecided(found, first, last, share)
    parts = {k: float(np.mean([getattr(m.excess, k) for m in read])) for k in ("continuous", "discretisation")}
    gained = sum(max(value, 0.0) for value in parts.values())
    told = f"eigenvalues predict {share:.0%} of the growth"
    if growth < 0:
        worst = min(read, key=lambda m: m.excess.overdamped if m.excess is not None else 0.0)
        return f"The steps damp most modes, {worst.name} ({worst.method}) the most: {told}."
    if gained > 0 and parts["discretisation"] > _MOST * gained:
        return f"The step is too long for its method: {_shorter(read)}; {told}."
    if gained > 0:
        worst = max(read, key=lambda m: m.excess.continuous if m.excess is not None else 0.0)
        return f"The field itself grows, most at {worst.name} ({worst.method}), so no shorter step helps: {told}."
    return _undecided(found, first, last, share)


def _share(found: Attribution, first: int, last: int) -> float | None:
    """What eigenvalues alone predict of the growth, carried from step to step as far as steps are alike."""
    rows = found.growth[first : last + 1].mean(1)
    rates = found.predictions["eigenvalues"].per_step[first : last + 1]
    known = rows.isfinite() & rates.isfinite()
    total = float(rows[known].sum())
    return float(rates[known].sum()) / total if total else None


def _shorter(read: Sequence[Mechanism]) -> str:
    factors = [m.largest_step_factor for m in read if m.largest_step_factor is not None]
    least = min(factors, default=math.inf)
    if least == 0.0:
        return "it holds undamped oscillations at no step size, and shorter steps only slow them"
    if math.isfinite(least) and least < 1:
        return f"a step {least:.2g} times as long would hold every mode that the field does not amplify"
    return "modes that the field does not amplify leave its stability region"


def _undecided(found: Attribution, first: int, last: int, share: float | None) -> str:
    """What is left where the region does not decide."""
    parts = {name: getattr(found, name)[first : last + 1].mean(1) for name in ("non_normal", "alignment")}
    sums = {name: float(rates[rates.isfinite()].sum()) for name, rates in parts.items()}
    why = "successive Jacobians are unrelated" if found.applies == "isotropic" else "the Jacobians are not normal"
    told = "no eigenvalues to compare" if share is None else f"eigenvalues predict {share:.0%} of the growth"
    return (
        f"The stability region does not decide it ({why}): {told}; non-normality adds {sums['non_normal']:+.2g} nats "
        f"and the direction of the gradient {sums['alignment']:+.2g}."
    )
