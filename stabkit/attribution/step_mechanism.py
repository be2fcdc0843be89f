"""The mechanism of one step, from its eigenvalues and its identified method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stabkit.attribution.field_spectra import FieldJacobians, FieldSpectrum, field_spectrum
from stabkit.attribution.mechanism import (
    TOLERANCE,
    ComplexArray,
    FloatArray,
    Mechanism,
    is_inverted,
    largest_step_factor,
    region_margin,
    shares,
    z_of_one_stage,
)
from stabkit.identification import Identification
from stabkit.integrators import GeneralLinearMethod
from stabkit.tracing import Step

_SPREAD = 1e-6  # of the norm of J_f, beyond rounding in single precision


@dataclass(frozen=True)
class StepSpectrum:
    """Eigenvalues of a step, or of the part of it before the tail.

    Attributes:
        values: ``(samples, k)``, complex, NaN where masked or not found; None where there are none.
        complete: whether these are all.
        size: coordinates of the state.
        masked: share of coordinates that the tail switches off.
        J: ``(samples, d, d)`` where the matrix is at hand.
        fields: Jacobians of the fields of a method with several stages, or why there are none.
        notes: about them.
    """

    values: ComplexArray | None
    complete: bool
    size: int
    masked: float = 0.0
    J: FloatArray | None = None
    fields: FieldJacobians | str | None = None
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
) -> Mechanism:
    """The mechanism of a step.

    Args:
        step: the step.
        found: its method.
        spectrum: its eigenvalues, and those of its fields.
        damped_below: modulus under which a mode counts as overdamped.
        tolerance: on the modulus and on Re lambda, for rounding.
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
    read = _read(found, spectrum, tolerance)
    energy, modes, excess = (None, None, None)
    if spectrum.complete:
        energy, modes, excess = shares(read.values, read.growing, tolerance, damped_below, spectrum.size)
    margin, factor = 1.0 - float(np.nanmax(np.abs(read.values))), None  # in every gauge whose branch has factor 1
    if read.method is not None:
        margin = region_margin(read.method, *read.fields)
        factor = largest_step_factor(read.method, *read.fields, tolerance=tolerance, growing=read.hopeless)
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
        spread=read.spread,
        commutator=read.commutator,
        notes=(*spectrum.notes, *read.notes),
        z=read.fields[0] if read.total is None else read.total,
        field_z=read.fields if read.seen else None,
    )


@dataclass(frozen=True)
class _Reading:
    """z of every mode, with the method that it was read with (None for the convention) and what is known of it.

    Attributes:
        method: whose region is asked; None for the convention z = eig(J) - 1.
        values: what a step multiplies each mode by.
        fields: z of every mode, for every field.
        growing: whether the continuous system amplifies the mode.
        hopeless: ``(samples, k)`` of ``fields``: modes that grow at every small step, since the system amplifies them.
        evidence: how sure z is.
        seen: whether z comes from the fields themselves.
        defect: how far R(z) is from the step, as a fraction of it.
        spread: the distance of the stages from each other.
        commutator: the size of the commutator of the fields.
        notes: what else to know.
        total: z of the whole system, of several fields.
    """

    method: GeneralLinearMethod | None
    values: ComplexArray
    fields: tuple[ComplexArray, ...]
    growing: npt.NDArray[np.bool_]
    hopeless: npt.NDArray[np.bool_] | None
    evidence: str
    seen: bool = False
    defect: float | None = None
    spread: float | None = None
    commutator: float | None = None
    notes: tuple[str, ...] = ()
    total: ComplexArray | None = None


def _read(found: Identification, spectrum: StepSpectrum, tolerance: float) -> _Reading:
    values = np.asarray(spectrum.values)
    above_one = values.real > 1.0 + tolerance
    method, notes = _readable(found)
    z = z_of_one_stage(method, values) if method is not None and is_inverted(method) else None
    if method is not None and z is not None and np.isfinite(z).any():  # none where the method has no such factor at all
        hopeless = z.real > tolerance if method.states > 1 or method.V[0, 0] == 1.0 else None
        growing = above_one if method.states == 1 else _rates(found, z).real > tolerance
        return _Reading(method, values, (z,), growing, hopeless, found.evidence, defect=0.0, notes=notes)
    fields = spectrum.fields
    if method is None or isinstance(fields, str) or fields is None or spectrum.J is None:
        why = f"{fields}: z = eig(J) - 1 by convention" if isinstance(fields, str) and method is not None else ""
        z = np.asarray(values - 1.0, dtype=complex)
        notes = (*notes, why) if why else notes
        return _Reading(None, values, (z,), above_one, None, "convention", notes=notes)
    joint = field_spectrum(fields, spectrum.J, second_order=is_second_order(found))
    if isinstance(joint, str):
        z = np.asarray(values - 1.0, dtype=complex)
        return _Reading(None, values, (z,), above_one, None, "convention", notes=(*notes, joint))
    notes = (*notes, *_said(fields, joint))
    rates = _with_linear_part(method, joint.rates)
    total = rates.reshape(*joint.z.shape[1:], -1)[..., 0]
    hopeless = total.real > tolerance
    return _Reading(
        method, joint.values, tuple(joint.z), rates.real > tolerance, hopeless, "measured", True,
        None if math.isnan(joint.defect) else joint.defect, fields.spread,
        joint.commutator if len(joint.z) > 1 else None, notes, total if len(joint.z) > 1 else None,
    )  # fmt: skip


def _with_linear_part(method: GeneralLinearMethod, rates: ComplexArray) -> ComplexArray:
    """The rates over a step of the whole system, where a method carries a linear part on by a number a besides h f.

    Of x' = f(x) - lambda x, h lambda = -log a, the weights of f sum to h phi_1(log a) with phi_1(z) = (e^z - 1) / z.
    """
    a = complex(method.V[0, 0])
    if method.states > 1 or a.imag or a.real <= 0 or a == 1:
        return rates
    rate = math.log(a.real)
    whole: ComplexArray = rates * (rate / math.expm1(rate)) + rate
    return whole


def _rates(found: Identification, z: ComplexArray) -> ComplexArray:
    return np.sqrt(z) if is_second_order(found) else z


def is_second_order(found: Identification) -> bool:
    """Whether a method integrates x'' = f(x), so that z = h^2 eig(J_f) and a mode grows unless z <= 0."""
    return found.system.startswith("x''")


def _said(fields: FieldJacobians, joint: FieldSpectrum) -> tuple[str, ...]:
    """How far the prediction R(h J_f) is from the step, and why."""
    said = [] if math.isnan(joint.defect) else [f"R(h J_f) differs from J by {joint.defect:.1e} of its norm"]
    if fields.spread > _SPREAD:
        said.append(f"J_f changes by up to {fields.spread:.2g} of its norm between the stages")
    if joint.commutator:
        said.append(
            f"the fields do not commute (relative commutator {joint.commutator:.2g}): z of each field are quotients in "
            "the modes of J"
        )
    return tuple(said)


def _readable(found: Identification) -> tuple[GeneralLinearMethod | None, tuple[str, ...]]:
    """The method that z is read with, or None for the convention z = eig(J) - 1."""
    method = found.method
    if isinstance(method, GeneralLinearMethod) and method.characteristic.degree > 0:
        return method, ()
    if method is not None:
        return None, (f"R of {found.name} does not depend on z: z = eig(J) - 1 by convention",)
    has_skip = found.skip is not None and math.isfinite(found.skip) and found.skip != 0.0
    if has_skip and not found.name.endswith("no branch"):
        return GeneralLinearMethod([[0]], [[1]], [[1]], [[found.skip]], name=found.name), ()
    return None, ("no method was read: z = eig(J) - 1 by convention",)
