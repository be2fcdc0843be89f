"""What a report says about why its growth is what it is: parts of the growth of every step, and what explains them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from stabkit.analysis.why import why
from stabkit.attribution import Attribution, Mechanism, attribute
from stabkit.attribution.measure import EXPLAINED_PROBES
from stabkit.diagnosis import Diagnosis, Thresholds
from stabkit.errors import TraceError
from stabkit.growth import rate_law
from stabkit.identification import Identification
from stabkit.jacobians.shared import SharedSpectra
from stabkit.parallel import SERIAL, Parallel
from stabkit.report.schema import StepReport
from stabkit.tracing import Flow

_PARTS = ("spectral", "non_normal", "transition")
_FEWEST_RATES = 6  # steps that telling a power from an exponential needs


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
