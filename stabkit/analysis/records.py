"""What was measured, as a report says it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stabkit.analysis.spectra import SpectrumFigures
from stabkit.diagnosis import Diagnosis, Measurement, Thresholds
from stabkit.errors import TraceError
from stabkit.growth import lyapunov_spectrum
from stabkit.identification import Identification
from stabkit.integrators import GeneralLinearMethod
from stabkit.report.schema import Exponents, StepReport
from stabkit.statistics import mean_interval
from stabkit.tracing import Flow, Step

_EXPONENTS = 4  # Lyapunov exponents of the whole flow


def step_report(
    step: Step,
    method: Identification,
    spectrum: SpectrumFigures,
    measurement: Measurement,
    limits: Thresholds,
) -> StepReport:
    """The record of one step, without what explains its growth."""
    growth = measurement.growth[step.index]
    finite = bool(np.isfinite(growth).all())
    mean = float(growth.mean())
    return StepReport(
        index=step.index,
        name=step.name,
        module_path=step.module_path,
        kind=step.kind,
        source_shapes=step.source.sample_shapes,
        target_shapes=step.target.sample_shapes,
        source_size=step.source.size,
        target_size=step.target.size,
        method=method.name,
        skip=method.skip,
        evidence=method.evidence,
        residual=method.residual,
        step_size=method.step_size,
        convention=method.convention if method.step_size is not None else "",
        after=method.after,
        operations=step.operations,
        **_tableau(method),
        z=spectrum.z,
        numerical_range=spectrum.numerical_range,
        spectral_radius=spectrum.radius,
        largest_singular_value=spectrum.norm,
        outside_share=spectrum.outside,
        spectrum_method=spectrum.method,
        spectrum_converged=spectrum.converged,
        growth=mean,
        growth_interval=mean_interval(growth, limits.confidence) if finite else (mean, mean),
        **norms(measurement, step.index, step.source.size, limits),
        notes=(*step.notes, *method.notes, *spectrum.notes),
    )


def norms(measurement: Measurement, index: int, size: int, limits: Thresholds) -> dict[str, Any]:
    """Geometric means over samples of the norms of one state and of its gradient, with their intervals."""
    logs = {
        "gradient_norm": measurement.log_gradients[index],
        "state_norm": measurement.log_states[index] + 0.5 * math.log(max(size, 1)),
    }
    found: dict[str, Any] = {}
    with np.errstate(over="ignore"):
        for name, row in logs.items():
            mean = float(row.mean())
            ends = mean_interval(row, limits.confidence) if np.isfinite(row).all() else (mean, mean)
            found[name] = float(np.exp(mean))
            found[f"{name}_interval"] = (float(np.exp(ends[0])), float(np.exp(ends[1])))
    return found


def _tableau(found: Identification) -> dict[str, Any]:
    """The blocks of a method and the field of each stage; those of several steps together are not those of each."""
    if len(found.steps) != 1 or not isinstance(found.method, GeneralLinearMethod):
        return {}
    blocks = {name: tuple(map(tuple, getattr(found.method, name).tolist())) for name in "AUBV"}
    return {"tableau": blocks, "stage_fields": found.method.fields}


def lyapunov(flow: Flow, seed: int) -> tuple[Exponents | None, tuple[str, ...]]:
    """The largest exponents of the first sample, or why there are none."""
    count = min(_EXPONENTS, *(state.size for state in flow.states))
    if count < 1 or not flow.steps:
        return None, ()
    try:
        found = lyapunov_spectrum(flow, count, seed=seed)
    except (TraceError, ArithmeticError) as error:
        return None, (f"no Lyapunov exponents: {str(error).splitlines()[0]}",)
    if not bool(found.exponents[0].isfinite().any()):
        return None, ("no Lyapunov exponents: a step passes nothing on",)
    first = {name: getattr(found, name)[:1].tolist() for name in ("exponents", "standard_errors", "converged")}
    rows = {name: tuple(map(tuple, values)) for name, values in first.items()}
    growth = tuple((tuple(row),) for row in found.local_growth[:, 0].tolist())
    return Exponents(**rows, local_growth=growth), ()


def restart_notes(flow: Flow, measurement: Measurement) -> tuple[str, ...]:
    """Where cotangents were drawn anew, in sentences."""
    return tuple(
        f"gradient norms before {flow.steps[index].name} are those of a fresh random cotangent"
        for index in measurement.restarts
    )


def untried_notes(diagnosis: Diagnosis) -> tuple[str, ...]:
    """Suspects for whose remedies no trial was left, in a sentence."""
    if not diagnosis.untried:
        return ()
    places = [f"{f.kind} at {f.module_path or f'step {f.steps[0]}'}" for f in diagnosis.untried]
    named = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    return (f"suspected, and no remedy tried, since the trials of a diagnosis are limited: {named}",)


def side_input_notes(flow: Flow) -> tuple[str, ...]:
    """What was held fixed, in a sentence."""
    if not flow.side_inputs:
        return ()
    return (f"depth is counted from {flow.source_name}; held fixed: {', '.join(flow.side_inputs)}",)
