"""Numbers that a record tells compared with the matrices of its own method; what contradicts them is withdrawn.

With V u = u, U u = 1, y V = y and y u = 1, a field that is 1 everywhere moves the solution by y B 1 a step, which is h
where that is the sum of the weights of all its values. A momentum is an eigenvalue of V, the damping of one state is V
itself. Where no method was recognised, that nothing but h f can be seen was not shown either: h = 1 is then a mere unit
of the matrices, and told as none.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from stabkit.identification.record import Identification
from stabkit.integrators import GeneralLinearMethod

_READ = 1e-3  # relative; names tell three digits
_ROUND = 6e-3  # of a number that is told with three digits
_NOT_READ = "none: which of the numbers in A, U, B and V is the step size was not read"
_SUM = ("h: the sum of the weights of all",)
_MOMENTUM = re.compile(r"momentum \(gamma = ([\d.e-]+)")
_OF_ONE_STATE = re.compile(r"^(?:damped Euler|scaled skip|diagonal skip) \((?:mean )?a = (-?[\d.e-]+)\)")


def consistent(record: Identification) -> Identification:
    """A record without the step size, or without any number, that its own matrices contradict."""
    if record.name.startswith("unnamed") and record.convention.startswith("h = 1"):
        record = replace(record, step_size=None, convention=_NOT_READ)
    method = record.method
    if not isinstance(method, GeneralLinearMethod):
        return record
    why = _contradiction(record, method)
    if not why:
        return record
    note = f"{why}: no number is claimed"
    return replace(record, evidence="measured", step_size=None, convention=_NOT_READ, notes=(note, *record.notes))


def _contradiction(record: Identification, method: GeneralLinearMethod) -> str:
    """Which number of a record is not that of its method; empty where none is."""
    gain = _gain(method) if record.convention.startswith(_SUM) else None
    if gain is not None and abs(gain - 1) > _READ:
        return f"the weights of all values of the field sum to {gain:.3g} h"
    told = _MOMENTUM.search(record.name)
    if told is not None and float(told[1]) and method.states > 1:
        away = np.abs(np.linalg.eigvals(method.V) - float(told[1])).min()
        if away > _ROUND * max(1.0, float(told[1])):
            return f"V has no eigenvalue {told[1]}"
    alone = _OF_ONE_STATE.match(record.name)
    if alone is not None and method.states == 1 and method.stages == 1:
        a = float(method.V[0, 0])
        if abs(a - float(alone[1])) > _ROUND * max(1.0, abs(a)):
            return f"V is {a:.3g}"
    if record.skip is not None and method.states == 1 and not record.after:
        a = float(method.V[0, 0])
        if abs(a - record.skip) > _READ * max(1.0, abs(a)):
            return f"the state is multiplied by {a:.3g}"
    return ""


def _gain(method: GeneralLinearMethod) -> float | None:
    """By how many h a field of one moves the solution in a step; None where the old state is not kept as it is."""
    values, right = np.linalg.eig(method.V)
    places = np.flatnonzero(np.abs(values - 1) < _READ)
    if len(places) != 1:
        return None
    u = right[:, places[0]].real
    reads = method.U @ u
    if not len(reads) or not np.allclose(reads, reads[0], rtol=_READ) or abs(reads[0]) < _READ:
        return None
    values, left = np.linalg.eig(method.V.T)
    y = left[:, np.abs(values - 1).argmin()].real
    return float((y @ method.B).sum() * reads[0] / (y @ u))
