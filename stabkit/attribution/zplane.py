"""The mechanism of one step, from its eigenvalues and its identified method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stabkit.attribution.mechanism import (
    TOLERANCE,
    ComplexArray,
    FloatArray,
    Mechanism,
    disc,
    largest_step_factor,
    region_margin,
    shares,
    solve_z,
    stage_defect,
)
from stabkit.identification import Identification
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing import Step


@dataclass(frozen=True)
class StepSpectrum:
    """Eigenvalues of a step, or of the part of it before the tail.

    Attributes:
        values: ``(samples, k)``, complex, NaN where masked or not found; None where there are none.
        complete: whether these are all.
        size: coordinates of the state.
        masked: share of coordinates that the tail switches off.
        J: ``(samples, d, d)`` where the matrix is at hand.
        notes: about them.
    """

    values: ComplexArray | None
    complete: bool
    size: int
    masked: float = 0.0
    J: FloatArray | None = None
    notes: tuple[str, ...] = ()


def damping_limit(blocks: int) -> float:
    """|R| under which a mode counts as overdamped: half, or less damping where there are many blocks.

    A mode that lost a factor of 10 over all of them would leave what counts as a stable gradient.
    """
    return math.exp(-min(math.log(2), math.log(10) / max(blocks, 1)))


def mechanism_of(
    step: Step,
    found: Identification,
    spectrum: StepSpectrum,
    *,
    damped_below: float,
    tolerance: float = TOLERANCE,
    field_jacobian: FloatArray | None = None,
) -> Mechanism:
    """The mechanism of a step.

    Args:
        step: the step.
        found: its method.
        spectrum: its eigenvalues.
        damped_below: modulus under which a mode counts as overdamped.
        tolerance: on the modulus and on Re lambda, for rounding.
        field_jacobian: ``(samples, d, d)``, h J_f, where it is known; z is then its spectrum.
    """
    if spectrum.values is None or not np.isfinite(spectrum.values).any():
        return Mechanism(
            step=step.index,
            name=step.name,
            method=found.name,
            evidence="unknown",
            masked=spectrum.masked,
            notes=spectrum.notes,
        )
    read = _read(found, spectrum, field_jacobian, tolerance)
    energy, modes, excess = (None, None, None)
    if spectrum.complete:
        energy, modes, excess = shares(read.values, read.growing, tolerance, damped_below, spectrum.size)
    margin, factor = 1.0 - float(np.nanmax(np.abs(read.values))), None  # in every gauge whose branch has factor 1
    if read.method is not None:
        margin, factor = region_margin(read.method, read.z), largest_step_factor(read.method, read.z, tolerance)
    return Mechanism(
        step=step.index,
        name=step.name,
        method=found.name,
        evidence=read.evidence,
        energy=energy,
        modes=modes,
        excess=excess,
        masked=spectrum.masked,
        margin=margin,
        largest_step_factor=factor,
        radius=float(np.nanmax(np.abs(read.values))),
        complete=spectrum.complete,
        tolerance=tolerance,
        damped_below=damped_below,
        defect=read.defect,
        notes=(*spectrum.notes, *read.notes),
        z=read.z,
    )


@dataclass(frozen=True)
class _Reading:
    """z of every mode, with the method that it was read with (None for the convention) and what is known of it."""

    method: GeneralLinearMethod | None
    values: ComplexArray
    z: ComplexArray
    growing: npt.NDArray[np.bool_]
    evidence: str
    defect: float | None
    notes: tuple[str, ...]


def _read(
    found: Identification, spectrum: StepSpectrum, field_jacobian: FloatArray | None, tolerance: float
) -> _Reading:
    values = np.asarray(spectrum.values)
    method, evidence, notes = _readable(found)
    above_one = values.real > 1.0 + tolerance
    if method is None:
        return _Reading(None, values, np.asarray(values - 1.0, dtype=complex), above_one, evidence, None, notes)
    if disc(method) is not None:
        return _Reading(method, values, solve_z(method, values), above_one, evidence, 0.0, notes)
    if field_jacobian is not None and spectrum.J is not None and method.states == 1:
        z = np.linalg.eigvals(field_jacobian).astype(complex)
        defect = stage_defect(method, spectrum.J, field_jacobian)
        notes = (*notes, f"R(h J_f) differs from J by {defect:.1e} of its norm")
        values = method.stability_matrix(z)[..., 0, 0]
        return _Reading(method, values, z, z.real > tolerance, "measured", defect, notes)
    z = solve_z(method, values)
    if method.characteristic.degree > 1:
        evidence = "convention"
        notes = (*notes, "z solved from R(z) = eig(J), the root nearest to 0; exact for equal stage Jacobians")
    return _Reading(method, values, z, z.real > tolerance, evidence, None, notes)


def _readable(found: Identification) -> tuple[GeneralLinearMethod | None, str, tuple[str, ...]]:
    """The method that z is read with, or None for the convention z = eig(J) - 1."""
    method = found.method
    if method is not None and method.n_fields > 1:
        why = f"{found.name} has {method.n_fields} fields: one eigenvalue of J does not tell their z apart"
        return None, "convention", (f"{why}; z = eig(J) - 1",)
    if isinstance(method, GeneralLinearMethod) and method.characteristic.degree > 0:
        return method, found.evidence, ()
    if method is not None:
        return None, "convention", (f"R of {found.name} is not a polynomial to solve for z: z = eig(J) - 1",)
    if found.skip is not None and math.isfinite(found.skip) and found.skip != 0.0 and found.name != "no branch":
        scaled = GeneralLinearMethod([[0]], [[1]], [[1]], [[found.skip]], name=found.name)
        return scaled, found.evidence, ()
    return None, "convention", ("no method was read: z = eig(J) - 1 by convention",)
