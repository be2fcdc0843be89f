"""What a report says about why its growth is what it is: parts of the growth of every step, and what explains them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from stabkit.attribution import Attribution, Mechanism, attribute
from stabkit.attribution.measure import EXPLAINED_PROBES
from stabkit.diagnosis import Diagnosis, Thresholds, Verdict
from stabkit.errors import TraceError
from stabkit.growth import rate_law
from stabkit.identification import Identification
from stabkit.jacobians.shared import SharedSpectra
from stabkit.parallel import SERIAL, Parallel
from stabkit.report.schema import StepReport
from stabkit.tracing import Flow

_PARTS = ("spectral", "non_normal", "transition")
_FEWEST_RATES = 6  # steps that telling a power from an exponential needs
_DECIDES = (0.5, 2.0)  # share of the growth that the eigenvalues predict where they decide it
_ONE_NUMBER = 0.02  # between two shares that are told as one
_KEPT = math.log(2.0)  # of growth that nobody would call any
_MOST = 0.5  # share of what the modes gain or lose from which one mechanism is named


@dataclass(frozen=True)
class Explanation:
    """Why the growth is what it is; empty where it could not be said.

    Attributes:
        attribution: parts of the growth of every step.
        explained: for the report, by name of the number.
        rate_law: how growth depends on depth.
        notes: why something is missing.
    """

    attribution: Attribution | None = None
    explained: Mapping[str, Any] = field(default_factory=dict)
    rate_law: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def completed(self, step: StepReport) -> StepReport:
        """A step's report with its parts, its mechanism and its margin."""
        if self.attribution is None:
            return step
        mechanism = self.attribution.mechanisms[step.index]
        return replace(
            step,
            attribution=_parts(self.attribution, step),
            mechanism=_shares(mechanism),
            margin=mechanism.margin,
            step_factor=mechanism.largest_step_factor,
            field_z=_field_z(mechanism),
            notes=(*step.notes, *(mechanism.notes if mechanism.field_z is not None else ())),
        )


def explain(
    flow: Flow,
    diagnosis: Diagnosis,
    methods: Sequence[Identification],
    samples: int,
    seed: int,
    limits: Thresholds,
    spectra: SharedSpectra,
    loss: Any = None,
    parallel: Parallel = SERIAL,
) -> Explanation:
    """Attribute the growth of a flow; what cannot be attributed is said in the notes.

    Args:
        flow: the traced forward pass.
        diagnosis: with the measured growth.
        methods: from `stabkit.identify`.
        samples: how many samples' spectra are taken.
        seed: the seed of every random choice.
        limits: from which growth on there is something to explain.
        spectra: matrices and eigenvalues of the steps, by index.
        loss: whose gradient was measured; None for random cotangents.
        parallel: who measures which steps.
    """
    law = _law(diagnosis)
    if not np.isfinite(diagnosis.measurement.growth).any():
        return Explanation(rate_law=law, notes=("no growth is finite, so none of it is attributed",))
    try:
        # eigenvalues of large steps are the spectrum's business; here only the terms of the growth are wanted
        found = attribute(
            flow,
            loss,
            samples=samples,
            probes=EXPLAINED_PROBES,
            krylov=0,
            seed=seed,
            identifications=methods,
            pulled=diagnosis.measurement.pulled,
            spectra=spectra,
            parallel=parallel,
        )
    except (TraceError, ArithmeticError) as error:
        return Explanation(rate_law=law, notes=(f"growth is not attributed: {error}",))
    predictor = found.applicable
    return Explanation(
        attribution=found,
        explained={
            "why": why(found, diagnosis.verdict, limits.stable),
            "share": found.explained,
            "predictor": next(name for name, p in found.predictions.items() if p is predictor),
            "predictor_share": predictor.share,
            "persistence": found.persistence.mean,
            "applies": found.applies,
            **{f"{name}_share": prediction.share for name, prediction in found.predictions.items()},
        },
        rate_law=law,
    )


def _law(diagnosis: Diagnosis) -> dict[str, Any]:
    first, last = diagnosis.verdict.stretch
    rows = diagnosis.measurement.growth[first : last + 1]
    if len(rows) < _FEWEST_RATES or not np.isfinite(rows).all():
        return {}
    law = rate_law(np.concatenate([[0.0], rows.mean(axis=1).cumsum()]))
    return {"law": law.law, "margin": law.margin}


def _parts(found: Attribution, step: StepReport) -> dict[str, float] | None:
    """Means over samples; alignment is the remainder of the growth that the report shows, over all its cotangents."""
    parts = {name: _mean(getattr(found, name)[step.index]) for name in _PARTS}
    known = {name: value for name, value in parts.items() if math.isfinite(value) and (value or name != "transition")}
    if not known or not math.isfinite(step.growth):
        return None
    return {**known, "alignment": step.growth - sum(known.values())}


def _mean(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else math.nan


def _field_z(mechanism: Mechanism) -> tuple[tuple[complex, ...], ...] | None:
    """Z of every field, samples one after another."""
    if mechanism.field_z is None:
        return None
    return tuple(tuple(complex(v) for v in z.reshape(-1)) for z in mechanism.field_z)


def _shares(mechanism: Mechanism) -> dict[str, float] | None:
    shares = mechanism.energy
    if shares is None:
        return None
    return {name: float(getattr(shares, name)) for name in ("continuous", "discretisation", "overdamped", "neutral")}


def why(found: Attribution, verdict: Verdict, stable: float) -> str:
    """The sentence.

    Three answers are possible: the field itself grows or damps; the step is too long for its method; or the
    eigenvalues of single steps do not decide, because their Jacobians do not commute or are not normal.

    Args:
        found: the parts of the growth.
        verdict: with the growth that is to be explained and the steps that it is about.
        stable: growth in nats that needs no explanation.

    Returns:
        The sentence; nothing where growth over depth is not judged.
    """
    first, last = verdict.stretch
    growth = verdict.growth
    if not math.isfinite(growth):
        return "No gradient arrives, so there is no growth to explain."
    if verdict.name == "not judged":
        return ""
    if abs(growth) <= stable:
        if abs(growth) <= _KEPT:
            return "The gradient keeps its size over the blocks: there is no growth to explain."
        return f"The growth is within the factor of {math.exp(stable):.3g}, up or down, that needs no explanation."
    read = [m for m in found.mechanisms[first : last + 1] if m.excess is not None]
    share = _share(found, first, last)
    decides = share is not None and _DECIDES[0] <= share[0] <= share[1] <= _DECIDES[1]
    if not read or not decides:
        return _undecided(found, first, last, share)
    parts = {k: float(np.mean([getattr(m.excess, k) for m in read])) for k in ("continuous", "discretisation")}
    gained = sum(max(value, 0.0) for value in parts.values())
    told = _predicted(share)
    if growth < 0:
        worst = min(read, key=lambda m: float(found.spectral[m.step].mean()))
        return f"The steps damp most modes, {worst.name} ({worst.method}) the most: {told}."
    if gained > 0 and parts["discretisation"] > _MOST * gained:
        return f"The step is too long for its method: {_shorter(read)}; {told}."
    if gained > 0:
        worst = max(read, key=lambda m: m.excess.continuous if m.excess is not None else 0.0)
        return f"The field itself grows, most at {worst.name} ({worst.method}), so no shorter step helps: {told}."
    return _undecided(found, first, last, share)


def _share(found: Attribution, first: int, last: int) -> tuple[float, float] | None:
    """What eigenvalues alone predict of the growth, carried from step to step as far as steps are alike.

    The two ends are equal where all of them were computed, and bounds where they were not.
    """
    rows, of = found.growth[first : last + 1].mean(1), slice(first, last + 1)
    rates = found.predictions["eigenvalues"].per_step[of]
    known = rows.isfinite() & rates.isfinite()
    total = float(rows[known].sum())
    if not total:
        return None
    beside = (found.spectral_interval[of] - found.spectral[of][..., None]).mean(1)[known].sum(0)
    low, high = sorted(float(rates[known].sum() + each) / total for each in beside)
    return low, high


def _predicted(share: tuple[float, float] | None) -> str:
    """A share in words."""
    if share is None:
        return "no eigenvalues were computed"
    if share[1] - share[0] < _ONE_NUMBER:
        return f"eigenvalues predict {sum(share) / 2:.0%} of the growth"
    low, high = share
    if not math.isfinite(low) and not math.isfinite(high):
        return "eigenvalues were not computed, and bounds on them say nothing"
    ends = f"at most {high:.0%}" if not math.isfinite(low) else f"at least {low:.0%}"
    between = f"{low:.0%} to {high:.0%}" if math.isfinite(low) and math.isfinite(high) else ends
    return f"eigenvalues predict {between} of the growth, by bounds on those not computed"


def _shorter(read: Sequence[Mechanism]) -> str:
    factors = [m.largest_step_factor for m in read if m.largest_step_factor is not None]
    least = min(factors, default=math.inf)
    if least == 0.0:
        return "it holds undamped oscillations at no step size, and shorter steps only slow them"
    if math.isfinite(least) and least < 1:
        return f"a step {least:.2g} times as long would hold every mode that the field does not amplify"
    return "modes that the field does not amplify leave its stability region"


def _undecided(found: Attribution, first: int, last: int, share: tuple[float, float] | None) -> str:
    """What is left where the region does not decide."""
    if "step" not in found.kinds[first : last + 1]:
        return (
            "The stability region does not decide it: these steps lead from one kind of state to another, so that "
            "eigenvalues say nothing of their growth."
        )
    parts = {name: getattr(found, name)[first : last + 1].mean(1) for name in ("non_normal", "alignment")}
    sums = {name: float(rates[rates.isfinite()].sum()) for name, rates in parts.items()}
    why = "successive Jacobians are unrelated" if found.applies == "isotropic" else "the Jacobians are not normal"
    exact = share is not None and share[1] - share[0] < _ONE_NUMBER
    rest = f"; non-normality adds {sums['non_normal']:+.2g} nats and" if exact else ";"
    return (
        f"The stability region does not decide it ({why}): {_predicted(share)}{rest} the direction of the gradient "
        f"adds {sums['alignment']:+.2g} nats."
    )
